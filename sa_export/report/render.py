"""Draws the report again from `check.json` and `check.npz`."""

from __future__ import annotations

from pathlib import Path

from sa_export.check.result import load_result
from sa_export.errors import UserError
from sa_export.report.html import REPORT, report_files, write_files

__all__ = ["render"]


def render(folder_or_json: Path, output: Path | None = None, force: bool = False) -> Path:
    """Renders the report of a finished check, without running a model.

    Args:
        folder_or_json: the folder that `check` wrote, or its `check.json`; `check.npz` is looked for beside it and may be missing.
        output: folder for `report.html` and the pictures; None is the folder of `check.json`.
        force: replace files of the same names. Without it any such file is an error.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: no usable `check.json`, an unreadable `check.npz`, a file in the way, no room on the disk.
    """
    source = folder_or_json / "check.json" if folder_or_json.is_dir() else folder_or_json
    folder = source.parent if output is None else output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for {REPORT} and the pictures.")
    result = load_result(source)
    if not force and (folder / REPORT).exists():
        raise UserError(f"{folder / REPORT} exists; name another folder with --output, or replace it with --force.")
    arrays = source.parent / "check.npz"
    files = report_files(result, arrays if arrays.is_file() else None)
    taken = [name for name in files if (folder / name).exists()]
    if taken and not force:
        raise UserError(f"{folder / taken[0]} exists; name another folder with --output, or replace it with --force.")
    write_files(files, folder)
    return folder / REPORT
