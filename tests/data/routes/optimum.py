"""optimum-onnx: `optimum-cli export onnx`, with its own optimisation levels. Pins transformers 4.57, so it has an environment of its own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.data import families

__all__ = ["PACKAGES", "VARIANTS", "export"]

PACKAGES = ("optimum-onnx", "transformers", "torch", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Variant:
    """Arguments of `main_export`; `fp16` is done by ONNX Runtime's converter, as optimum's own needs a GPU."""

    optimize: str | None = None
    past: bool = True
    fp16: bool = False


VARIANTS = {
    "optimum": Variant(),
    "optimum-O2": Variant("O2"),
    "optimum-O3": Variant("O3"),
    "optimum-fp16": Variant(fp16=True),
    "optimum-nopast": Variant(past=False),
}


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    import onnx
    from optimum.exporters.onnx import main_export

    how = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = families.save(family, Path(folder) / "checkpoint")
        main_export(
            str(checkpoint),
            Path(folder) / "out",
            task="text-generation-with-past" if how.past else "text-generation",
            optimize=how.optimize,
            do_validation=False,
        )
        model = onnx.load(str(Path(folder) / "out" / "model.onnx"))
    if how.fp16:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=False, disable_shape_infer=True)
    onnx.save(model, str(path))
