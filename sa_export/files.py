"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sa_export.errors import UserError

__all__ = ["refuse_existing", "staged_folder"]


def refuse_existing(output: Path, *, force: bool, mark: str) -> None:
    """Raises `UserError` when `output` may not be written.

    A new or empty folder is free. Another is replaced only with `force`, and only when it holds `mark`, the file by which
    an earlier output of this tool is known: nobody else's folder is ever removed.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise UserError(f"{output} exists and is no folder; choose another output.")
    if not any(output.iterdir()):
        return
    if not force:
        raise UserError(f"{output} exists and is not empty; choose another output folder or add --force to replace it.")
    if not (output / mark).is_file():
        raise UserError(f"{output} is not replaced: it holds no {mark}, so this tool did not write it; choose another output folder.")


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool, mark: str) -> Iterator[Path]:
    """A temporary sibling of `output` to write into; renamed to `output` at the end, removed on any error.

    Args:
        output: the folder to appear; force, mark: see `refuse_existing`.

    Raises:
        UserError: the output may not be written, or the disk is full.
    """
    refuse_existing(output, force=force, mark=mark)
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    except OSError as error:
        raise UserError(f"{output} cannot be created ({error.strerror}); choose another output folder.") from None
    os.chmod(stage, 0o777 & ~_umask())
    try:
        yield stage
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=parent))
            os.rename(output, old / "replaced")
            os.rename(stage, output)
            shutil.rmtree(old)
        else:
            os.rename(stage, output)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left on the disk of {parent}; nothing was written: free some space or choose another output folder.") from None
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
