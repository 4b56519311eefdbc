"""onnxruntime-genai's model builder: graphs written by hand for ONNX Runtime, attention as contrib operators."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.data import families

__all__ = ["PACKAGES", "VARIANTS", "export"]

PACKAGES = ("onnxruntime-genai", "transformers", "torch", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Variant:
    """Arguments of the builder."""

    precision: str
    provider: str
    options: tuple[str, ...] = ()


VARIANTS = {
    "genai-fp32-cpu": Variant("fp32", "cpu"),
    "genai-int4-cpu": Variant("int4", "cpu"),
    "genai-fp16-cpu": Variant("fp16", "cpu"),
    "genai-fp16-cuda": Variant("fp16", "cuda"),
    "genai-fp16-webgpu": Variant("fp16", "webgpu"),
    "genai-paged": Variant("fp16", "cuda", ("use_paged_attention=true",)),
}

_VOCABULARY = 72
"""The builder takes any matrix as wide as the vocabulary for the last one; no other width is 72."""


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    import onnx
    from onnxruntime_genai.models import builder

    how = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        checkpoint, out, cache = (str(Path(folder) / n) for n in ("checkpoint", "out", "cache"))
        families.save(family, Path(checkpoint), vocabulary=_VOCABULARY)
        options = builder.parse_extra_options("", checkpoint, out, how.precision, how.provider, cache, list(how.options))
        builder.create_model("", checkpoint, out, how.precision, how.provider, cache, **options)
        onnx.save(onnx.load(str(Path(out) / "model.onnx")), str(path))
