"""transformers' own ONNX exporter, plain and with its fusions for ONNX Runtime's execution providers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data import families
from tests.data.routes.torch_onnx import BATCH, PAST, ROWS

__all__ = ["PACKAGES", "VARIANTS", "export"]

PACKAGES = ("transformers", "torch", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class Variant:
    """Fields of `OnnxConfig`; `past`: one step with a cache, else a prompt without."""

    opset: int | None = None
    fusions: str | None = None
    past: bool = True
    attention: str = "sdpa"


VARIANTS = {
    "hf-exporter": Variant(),
    "hf-exporter-18": Variant(18),
    "hf-exporter-eager": Variant(attention="eager"),
    "hf-exporter-nopast": Variant(past=False),
    "hf-exporter-cpu": Variant(fusions="cpu"),
    "hf-exporter-cuda": Variant(fusions="cuda"),
    "hf-exporter-webgpu": Variant(fusions="webgpu"),
    "hf-exporter-cuda-nopast": Variant(fusions="cuda", past=False),
    "hf-exporter-webgpu-nopast": Variant(fusions="webgpu", past=False),
}


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    import onnx_ir
    import torch
    from transformers.cache_utils import DynamicCache
    from transformers.exporters import OnnxConfig, OnnxExporter

    how = VARIANTS[variant]
    model = families.build(family, how.attention)
    past = PAST if how.past else 0
    ids = torch.arange(BATCH * ROWS).reshape(BATCH, ROWS) % (families.VOCABULARY - 3) + 3
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(BATCH, past + ROWS, dtype=torch.int64)}
    if how.past:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids[:, :past], past_key_values=cache, use_cache=True)
        inputs["past_key_values"] = cache
    else:
        inputs["use_cache"] = False
    config = OnnxConfig(dynamic=True, opset_version=how.opset, ort_fusions=how.fusions)
    program = OnnxExporter().export(model, inputs, config=config).program
    onnx_ir.save(program, path)
