"""The sample model, exported and rewritten once a process, and TensorRT for RTX, which builds engines without a GPU."""

from __future__ import annotations

from functools import cache
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "needle" / "model"
SITES = 6

needs_rtx = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None,
    reason="no TensorRT for RTX: nothing was parsed or built by NVIDIA's own code; pip install tensorrt-rtx==1.7.1.116",
)

_FOLDER = TemporaryDirectory(prefix="sa-export-tests-")


def exported(dtype: str = "float16") -> Path:
    """model.onnx of the sample model; not to be changed in place."""
    return _exported(dtype)


@cache
def _exported(dtype: str) -> Path:
    from sa_export.hf.export import export_onnx
    from sa_export.hf.load import load_checkpoint

    return export_onnx(load_checkpoint(str(SAMPLE), dtype=dtype), Path(_FOLDER.name) / dtype, verify=False).model_path


def rewritten(dtype: str = "float16") -> Path:
    """The sample model with one node a site, default policy; not to be changed in place."""
    from graph_passes.pipeline import rewrite

    full = exported(dtype)
    path = full.with_name("model.sa.onnx")
    if not path.exists():
        assert rewrite(full, path).rewritten == SITES
    return path
