"""The commands of samples/tensorrt/README.md: those that need no GPU are run, the others are read by the tools' own option tables."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sa_export.cli.main import build_parser, main
from tests.tensorrt.engines import needs_rtx
from tests.tensorrt.test_build_commands import check_trtexec, parsed_by_polygraphy

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "samples/tensorrt/README.md"


def commands(kind: str) -> list[str]:
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line]


@needs_rtx
def test_commands_that_need_no_gpu(
    plugin_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SA_EXPORT_TENSORRT_PLUGIN", str(plugin_library))
    lines = commands("sh")
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "sa-export"
        assert main(arguments) == 0, line
    said = capsys.readouterr().out
    assert "TensorRT's parser (tensorrt_rtx" in said
    assert "nothing that it refuses" in said
    assert "not built (--dry-run)" in said
    assert "plugin layers: 6" in said
    assert "full attention (native), no plugin" in said
    from polygraphy import config

    monkeypatch.setattr(config, "USE_TENSORRT_RTX", True)
    printed = re.findall(r"^(?:POLYGRAPHY_USE_TENSORRT_RTX=1 )?((?:trtexec|polygraphy) (?:.*\\\n)*.*)", said, re.M)
    assert [line.split()[0] for line in printed] == ["trtexec", "polygraphy"] * 3
    for line in printed:
        check_trtexec(line) if line.startswith("trtexec") else parsed_by_polygraphy(_convert(), line)
    assert {p.name for p in (tmp_path / "out/trt").glob("*.plan")} == {"rtx.plan", "rtx_dense.plan"}
    built = json.loads((tmp_path / "out/trt/rtx.plan.json").read_text())
    assert len(built["plugin_layers"]) == 6
    assert built["compute_capabilities"] == ["8.6", "8.9", "12.0"]


def test_commands_that_need_a_gpu_are_of_their_tools() -> None:
    from polygraphy.tools.run import Run

    lines = commands("sh gpu")
    programs = [line.split()[0] for line in lines]
    assert sorted(set(programs)) == ["polygraphy", "python", "sa-export", "trtexec"]
    for line in lines:
        if line.startswith("sa-export"):
            build_parser().parse_args(shlex.split(line)[1:])
        elif line.startswith("trtexec"):
            check_trtexec(line)
        elif line.startswith("polygraphy"):
            parsed_by_polygraphy(Run(), line)


def test_raw_inputs(tmp_path: Path) -> None:
    from polygraphy.json import save_json

    values = {"input_ids": np.arange(6, dtype=np.int64).reshape(1, 6), "past_key_values.0.key": np.zeros((1, 2, 0, 4), np.float16)}
    save_json([values], str(tmp_path / "inputs.json"))
    line = next(c for c in commands("sh gpu") if "raw_inputs.py" in c)
    _, script, *_ = shlex.split(line)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), str(tmp_path / "inputs.json"), "-o", str(tmp_path / "raw")],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.stdout.splitlines() == [
        f"--loadInputs=input_ids:{tmp_path}/raw/input_ids.bin",
        "--shapes=input_ids:1x6,past_key_values.0.key:1x2x0x4",
    ]
    assert np.fromfile(tmp_path / "raw/input_ids.bin", np.int64).tolist() == list(range(6))
    assert shutil.which("trtexec") is None or check_trtexec("trtexec " + " ".join(done.stdout.split()))


def _convert() -> object:
    from polygraphy.tools.convert import Convert

    return Convert()
