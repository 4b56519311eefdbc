"""Drawing the report again from the files of a finished check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sa_export.errors import UserError
from sa_export.report import render, write_report
from tests.sa_export.report import report_samples as samples


@pytest.fixture
def check(tmp_path: Path) -> Path:
    """The folder of a small check, with a report in it."""
    arrays: dict[str, np.ndarray] = {}
    result = samples.result([samples.candidate("residue", (512,), arrays, layers=2, heads=2, maps=1)])
    folder = tmp_path / "check"
    folder.mkdir()
    result.write(folder / "check.json")
    write_report(result, samples.save_arrays(arrays, folder), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".html", ".png")}


def test_the_same_files_from_json_and_npz(check: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert render(check, out) == out / "report.html"
    assert contents(out) == contents(check)
    assert len(contents(out)) == 5
    assert render(check / "check.json", tmp_path / "more") == tmp_path / "more" / "report.html"


def test_nothing_is_replaced_unasked(check: Path) -> None:
    before = contents(check)
    (check / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists; name another folder with --output, or replace it with --force\."):
        render(check)
    assert (check / "report.html").read_text() == "mine"
    (check / "report.html").unlink()
    with pytest.raises(UserError, match=r"density_residue_512\.png exists"):
        render(check)
    assert not (check / "report.html").exists()
    assert render(check, None, force=True) == check / "report.html"
    assert contents(check) == before
    assert sorted(p.name for p in check.iterdir()) == sorted([*before, "check.json", "check.npz"])


def test_without_arrays(check: Path, tmp_path: Path) -> None:
    (check / "check.npz").unlink()
    report = render(check, tmp_path / "out")
    assert "was not given" in report.read_text(encoding="utf-8")


def test_what_is_no_check_is_refused(check: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check\.json does not exist; run `sa-export check` first"):
        render(tmp_path)
    with pytest.raises(UserError, match="is a file; name a folder"):
        render(check, check / "check.json")
    raw = json.loads((check / "check.json").read_text())
    (check / "check.json").write_text(json.dumps({**raw, "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        render(check, tmp_path / "out")
    (check / "check.json").write_text("{")
    with pytest.raises(UserError, match=r"is not a check\.json"):
        render(check, tmp_path / "out")
    assert not (tmp_path / "out").exists()
