"""Runs a model and its rewritten twin in ONNX Runtime and compares them where attention means something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from graph_passes.config import Config
from graph_passes.op import Policy
from graph_passes.pipeline import rewrite
from graph_passes.report import RewriteReport

EXACT = Config(Policy(alpha=(1.0,), min_length=0))
"""Every site goes through the new node's own code, and keeps everything."""


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, str(path))
    return path


def rewritten(path: Path, config: Config = EXACT, **options: object) -> tuple[Path, RewriteReport]:
    out = path.with_name(path.stem + ".sa.onnx")
    return out, rewrite(path, out, config, force=True, **options)  # type: ignore[arg-type]


class Session:
    """A model in ONNX Runtime on the CPU.

    Args:
        optimise: let ONNX Runtime change the graph first, as it does for users.
    """

    def __init__(self, path: Path, *, optimise: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 4
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self._session.get_outputs()]
        self.inputs = [i.name for i in self._session.get_inputs()]

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(None, {k: v for k, v in feeds.items() if k in self.inputs}), strict=True))


def real_rows(mask: np.ndarray, rows: int) -> np.ndarray:
    """[B, S]: the query rows that are real tokens."""
    return mask[:, mask.shape[1] - rows :].astype(bool)


def largest_difference(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float:
    """Largest absolute difference over real rows; `a` and `b` are [B, S, ...]."""
    assert a.shape == b.shape
    x, y = a.astype(np.float64)[rows], b.astype(np.float64)[rows]
    assert np.isfinite(x).all()
    assert np.isfinite(y).all()
    return float(np.abs(x - y).max())
