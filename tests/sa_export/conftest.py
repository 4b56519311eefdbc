"""The sample model, exported and rewritten once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "needle" / "model"


@dataclass(frozen=True)
class Converted:
    folder: Path
    full: Path
    rewritten: Path  # default policy, sparse from 256 tokens on


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The sample model in float32; not to be changed in place."""
    from graph_passes.config import Config
    from graph_passes.op import Policy
    from graph_passes.pipeline import rewrite
    from sa_export.hf.export import export_onnx
    from sa_export.hf.load import load_checkpoint

    folder = tmp_path_factory.mktemp("sample") / "out"
    full = export_onnx(load_checkpoint(str(SAMPLE), dtype="float32"), folder, verify=False).model_path
    rewritten = folder / "model.sa.onnx"
    assert rewrite(full, rewritten, Config(defaults=Policy(min_length=256, dense_rows=64))).rewritten == 6
    return Converted(folder, full, rewritten)
