"""What tells an export's folder, and the folder made or replaced with that."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sa_export import files
from sa_export.errors import UserError
from sa_export.files import check_space

__all__ = ["FORMAT", "MANIFEST", "check_beside", "check_replaceable", "check_space", "staged_beside", "staged_folder"]

MANIFEST = "export.json"
FORMAT = "sa-export/1"


def staged_folder(output: Path, *, force: bool, may_replace: Sequence[str] = ()) -> AbstractContextManager[Path]:
    """`files.staged_folder` for an export."""
    return files.staged_folder(output, force=force, owner=_manifest_files, may_replace=may_replace)


def check_replaceable(output: Path, *, force: bool, may_replace: Sequence[str] = ()) -> None:
    """`files.check_replaceable` for an export."""
    files.check_replaceable(output, force=force, owner=_manifest_files, may_replace=may_replace)


def check_beside(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuses an export into the checkpoint's own folder where that would overwrite something.

    Args:
        folder: of the checkpoint.
        names: the files that the export may make.
        force: an earlier export there may be replaced.

    Raises:
        UserError: with the file and what to do.
    """
    there = [name for name in names if os.path.lexists(folder / name)]
    ours = _manifest_files(folder) or set()
    foreign = [name for name in there if name not in ours]
    if foreign:
        raise UserError(f"{folder / foreign[0]} exists and is of no earlier export; move it away, or choose another output folder.")
    if there and not force:
        raise UserError(f"{folder} holds an export; choose another output folder, or replace the earlier export with --force.")


@contextmanager
def staged_beside(folder: Path, names: Sequence[str], *, force: bool, may_replace: Sequence[str] = ()) -> Iterator[Path]:
    """The checkpoint's own folder to write `names` into; when the block fails they are gone, and an earlier export is back.

    Args:
        may_replace: patterns (fnmatch) of further files that an earlier export may have gathered and `force` may discard.

    Raises:
        UserError: as `check_beside`, or the folder cannot be written.
    """
    check_beside(folder, names, force=force)
    again = _manifest_files(folder) is not None
    earlier = [path for path in sorted(folder.iterdir()) if path.name in names or (again and _matches(path.name, may_replace))]
    waiting = set(earlier)
    moved: list[tuple[Path, Path]] = []
    done = False
    try:
        for path in earlier:
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            waiting.remove(path)
            moved.append((path, old))
        yield folder
        done = True
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); choose another output folder.") from error
    finally:
        if not done:
            for name in names:
                if folder / name not in waiting:
                    (folder / name).unlink(missing_ok=True)
        for path, old in moved:
            if not done:
                old.rename(path)
            elif old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _manifest_files(output: Path) -> set[str] | None:
    try:
        manifest: Any = json.loads((output / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return None
        return {MANIFEST, *(str(name).split("/", 1)[0] for name in manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
