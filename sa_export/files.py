"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sa_export.errors import UserError

__all__ = ["Owner", "check_replaceable", "check_space", "staged_files", "staged_folder"]

Owner = Callable[[Path], set[str] | None]
"""Names of a folder's entries that an earlier output of the tool put there; None when the folder is not the tool's."""

_MARGIN_BYTES = 64 * 2**20
_MARGIN_SHARE = 0.02
_SHORT_WRITE = re.compile(r"problem writing element|\d+ requested and \d+ written")


@contextmanager
def staged_folder(output: Path, *, force: bool, owner: Owner, may_replace: Sequence[str] = ()) -> Iterator[Path]:
    """A new, empty sibling of `output` to write into; it takes the place of `output` when the block ends without an exception.

    Whatever goes wrong, the sibling is removed and `output` is what it was before; folders made to hold it are removed, too.

    Args:
        output: the folder to make. It may exist when it is empty, or when `force` is given and all it holds is an earlier output.
        owner: tells an earlier output.
        may_replace: patterns (fnmatch) of further files that an earlier output may have gathered and `force` may discard.

    Raises:
        UserError: `output` may not be replaced, cannot be written, or the disk is full.
    """
    output = Path(os.path.abspath(output.expanduser()))
    check_replaceable(output, force=force, owner=owner, may_replace=may_replace)
    made = _make_parents(output.parent)
    stage: Path | None = None
    done = False
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        # mkdtemp gives 0700; the result shall have what mkdir would have given.
        stage.chmod(0o777 & ~_umask())
        yield stage
        _exchange(stage, output)
        done = True
    except OSError as error:
        raise UserError(_os_sentence(error, output)) from error
    finally:
        if not done:
            if stage is not None:
                shutil.rmtree(stage, ignore_errors=True)
            for folder in made:
                folder.rmdir()


@contextmanager
def staged_files(outputs: Sequence[Path], *, force: bool) -> Iterator[list[Path]]:
    """New files in one folder, each to be written under another name; they take their places when the block ends without an exception.

    Args:
        outputs: the files to make, in one folder. They may exist when `force` is given.

    Yields:
        where to write each of them.

    Raises:
        UserError: a file is in the way, the folder cannot be written, or the disk is full. Nothing of this call is left behind then.
    """
    outputs = [Path(os.path.abspath(path.expanduser())) for path in outputs]
    for path in outputs:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the path of a file.")
        if path.exists() and not force:
            raise UserError(f"{path} exists; choose another name, or replace it with --force.")
    made = _make_parents(outputs[0].parent)
    stage: Path | None = None
    done = False
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{outputs[0].name}.", suffix=".partial", dir=outputs[0].parent))
        yield [stage / path.name for path in outputs]
        for path in outputs:
            (stage / path.name).replace(path)
        done = True
    except OSError as error:
        raise UserError(_os_sentence(error, outputs[0])) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if not done:
            for folder in made:
                folder.rmdir()


def check_replaceable(output: Path, *, force: bool, owner: Owner, may_replace: Sequence[str] = ()) -> None:
    """Refuses an `output` that exists, unless it is an empty folder, or `force` is given and nothing but an earlier output is in it.

    Raises:
        UserError: with the reason and what to do.
    """
    if not (output.exists() or output.is_symlink()):
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(f"{output} exists and is no folder; choose another output folder.")
    held = sorted(path.name for path in output.iterdir())
    if not held:
        return
    if not force:
        raise UserError(f"{output} exists and is not empty; choose another output folder, or replace an earlier output with --force.")
    ours = owner(output)
    if ours is None:
        raise UserError(f"{output} holds no earlier output of this tool and is left alone; choose another output folder.")
    foreign = [name for name in held if name not in ours and not any(fnmatch.fnmatch(name, pattern) for pattern in may_replace)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{output} holds {foreign[0]}{more} beside an earlier output; move that away, or choose another output folder.")


def check_space(folder: Path, payload_bytes: int) -> None:
    """Refuses when the disk of `folder` has no room for `payload_bytes` and a margin (64 MiB and 2 %).

    Raises:
        UserError: with both figures.
    """
    need = payload_bytes + _MARGIN_BYTES + int(payload_bytes * _MARGIN_SHARE)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"The output needs {_size(need)} on the disk of {folder}, which has {_size(free)} free; make room or choose another disk."
        )


def _exchange(stage: Path, output: Path) -> None:
    if not output.exists():
        stage.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old)  # onto an empty folder: POSIX rename replaces it
    try:
        stage.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_parents(parent: Path) -> list[Path]:
    """Makes `parent`; the folders that this made, innermost first."""
    missing = []
    at = parent
    while not at.exists():
        missing.append(at)
        at = at.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {parent} cannot be made ({error.strerror or error}); choose another.") from error
    return missing


def _os_sentence(error: OSError, output: Path) -> str:
    # NumPy, through which tensors are written, reports a short write without an errno.
    short_write = error.errno is None and _SHORT_WRITE.search(str(error)) is not None
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or short_write:
        return f"No space is left on the disk of {output}; nothing was kept there, make room or choose another disk."
    return f"{output} cannot be written ({error.strerror or error}); nothing was kept there, choose another output folder."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
