"""ONNX Runtime's offline optimisers over a plain export: the graph levels of a session, and `onnxruntime.transformers`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.data.routes import torch_onnx

__all__ = ["PACKAGES", "VARIANTS", "export"]

PACKAGES = ("onnxruntime", "torch", "transformers", "onnx")


@dataclass(frozen=True)
class Variant:
    """`source`: the export that is optimised. `level`: of a session, else `model_type` of the transformers optimiser."""

    source: str
    level: str = ""
    model_type: str = ""


VARIANTS = {
    "ort-basic": Variant("dynamo-sdpa-20", level="ORT_ENABLE_BASIC"),
    "ort-extended": Variant("torchscript-eager-18", level="ORT_ENABLE_EXTENDED"),
    "ort-extended-dynamo": Variant("dynamo-eager-20", level="ORT_ENABLE_EXTENDED"),
    "ort-transformers": Variant("torchscript-eager-18", model_type="gpt2"),
    "ort-transformers-dynamo": Variant("dynamo-sdpa-20", model_type="gpt2"),
}


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    import onnxruntime

    how = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        torch_onnx.export(how.source, family, source)
        if how.level:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, how.level)
            options.optimized_model_filepath = str(path)
            options.log_severity_level = 4
            onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            return
        from onnxruntime.transformers import optimizer

        model = optimizer.optimize_model(str(source), model_type=how.model_type, num_heads=0, hidden_size=0, opt_level=0)
        model.save_model_to_file(str(path))
