"""Our own export: one `SampleAttention` node for each full causal layer, through transformers' AttentionInterface."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.data import families

__all__ = ["PACKAGES", "VARIANTS", "export"]

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
VARIANTS = {"sa-export-sample-20": ("sample", 20)}


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    from sa_export.hf.export import export_onnx
    from sa_export.hf.load import load_checkpoint

    attention, opset = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(str(families.save(family, Path(folder) / "checkpoint")), dtype="float32")
        made = export_onnx(checkpoint, Path(folder) / "out", opset=opset, attention=attention, single_file=True, verify=False)
        shutil.copy(made.model_path, path)
