"""What tells an export's folder, and the folder made or replaced with that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sa_export import files
from sa_export.files import check_space

__all__ = ["FORMAT", "MANIFEST", "check_replaceable", "check_space", "staged_folder"]

MANIFEST = "export.json"
FORMAT = "sa-export/1"


def staged_folder(output: Path, *, force: bool, may_replace: Sequence[str] = ()) -> AbstractContextManager[Path]:
    """`files.staged_folder` for an export."""
    return files.staged_folder(output, force=force, owner=_manifest_files, may_replace=may_replace)


def check_replaceable(output: Path, *, force: bool, may_replace: Sequence[str] = ()) -> None:
    """`files.check_replaceable` for an export."""
    files.check_replaceable(output, force=force, owner=_manifest_files, may_replace=may_replace)


def _manifest_files(output: Path) -> set[str] | None:
    try:
        manifest: Any = json.loads((output / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return None
        return {MANIFEST, *(str(name).split("/", 1)[0] for name in manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
