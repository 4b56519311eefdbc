"""That an output folder appears whole or not at all, and that nothing else is ever touched."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sa_export import files as folder_module
from sa_export.errors import UserError
from sa_export.hf import export as export_module
from sa_export.hf.export import export_onnx
from sa_export.hf.folder import staged_folder


def an_export(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text(text)
    (folder / "export.json").write_text(json.dumps({"format": "sa-export/1", "files": ["model.onnx", "export.json"]}))
    return folder


def replace_by_new(folder: Path, **options: Any) -> None:
    with staged_folder(folder, **{"force": False, **options}) as stage:
        assert stage.parent == folder.parent, "a rename is atomic inside one file system only"
        (stage / "model.onnx").write_text("new")


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with staged_folder(out, force=False) as stage:
        (stage / "file").write_text("x")
        assert not out.exists()
    assert content(tmp_path) == {"a/b/out/file": "x"}
    assert out.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "a" / "b" / "out", force=False) as stage:
            (stage / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    replace_by_new(tmp_path / "out")
    assert content(tmp_path) == {"out/model.onnx": "new"}


def test_an_earlier_export_needs_force(tmp_path: Path) -> None:
    out = an_export(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(UserError, match="is not empty; choose another output folder, or replace an earlier output with --force"):
        replace_by_new(out)
    assert content(tmp_path) == before
    replace_by_new(out, force=True)
    assert content(tmp_path) == {"out/model.onnx": "new"}


def test_force_keeps_the_old_export_until_success(tmp_path: Path) -> None:
    out = an_export(tmp_path / "out")
    before = content(tmp_path)

    def fail() -> None:
        with staged_folder(out, force=True) as stage:
            (stage / "model.onnx").write_text("new")
            raise UserError("No.")

    with pytest.raises(UserError, match="No"):
        fail()
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("manifest", [None, "{", '{"format": "other", "files": []}', "[]"], ids=str)
def test_force_never_replaces_what_is_not_ours(tmp_path: Path, manifest: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("three years")
    if manifest is not None:
        (out / "export.json").write_text(manifest)
    before = content(tmp_path)
    with pytest.raises(UserError, match="holds no earlier output of this tool"):
        replace_by_new(out, force=True)
    assert content(tmp_path) == before


def test_force_stops_at_foreign_files_beside_an_export(tmp_path: Path) -> None:
    out = an_export(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"holds notes\.txt beside an earlier output"):
        replace_by_new(out, force=True)
    assert content(tmp_path) == before
    replace_by_new(out, force=True, may_replace=("*.txt",))
    assert content(tmp_path) == {"out/model.onnx": "new"}


def test_files_and_links_are_not_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(an_export(tmp_path / "real"))
    for name in ("file", "link"):
        with pytest.raises(UserError, match="exists and is no folder"):
            replace_by_new(tmp_path / name, force=True)
    with pytest.raises(UserError, match="cannot be made"):
        replace_by_new(tmp_path / "file" / "below")


def test_a_rename_that_fails_brings_the_old_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = an_export(tmp_path / "out")
    before = content(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="cannot be written"):
        replace_by_new(out, force=True)
    assert content(tmp_path) == before


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose traced graph is not needed, since writing it fails."""
    monkeypatch.setattr(export_module, "trace", lambda *_, **__: None)
    monkeypatch.setattr(export_module, "to_proto", lambda *_, **__: (onnx.ModelProto(), {}))


@pytest.mark.usefixtures("no_trace")
def test_a_disk_that_fills_up(loaded: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(_models: Any, _tensors: Any, _where: Any, folder: Path, *_: Any, **__: Any) -> None:
        (folder / "model.onnx.data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "place", place)
    with pytest.raises(UserError, match="No space is left on the disk of"):
        export_onnx(loaded(), tmp_path / "made" / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_trace")
def test_a_disk_without_room_is_refused_beforehand(loaded: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(UserError, match=rf"needs 64 MiB on the disk of {tmp_path}/made, which has 1 MiB free; make room"):
        export_onnx(loaded(), tmp_path / "made" / "out")
    assert not any(tmp_path.iterdir())


def test_the_checkpoint_itself_is_no_output(loaded: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "checkpoint"))
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(UserError, match="holds no earlier output of this tool"):
        export_onnx(loaded(), copy, force=True)
    assert sorted(path.name for path in copy.iterdir()) == before
