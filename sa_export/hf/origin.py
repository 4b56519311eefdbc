"""Where the bytes of loaded tensors lie on disk: transformers maps weight files, and an address tells the file and the offset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Origin", "origins"]

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ +(/.*)$")


@dataclass(frozen=True)
class Origin:
    """Bytes of a file that are a tensor's values, row-major, little-endian."""

    path: Path
    """As the caller named it, links not followed."""
    offset: int
    length: int


def origins(tensors: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Origin]:
    """The tensors that are still the bytes of their file, by name; nothing is read.

    A tensor that was converted, merged or rearranged when it was loaded lies elsewhere in memory and is left out. So is one whose
    file has pages that were written to since (the kernel keeps private copies of those): its values need not be the file's.

    Args:
        tensors: real tensors on the CPU.
        files: the weight files of the checkpoint.
    """
    names = {str(path.resolve()): path for path in files}
    regions = [region for region in _untouched() if region[3] in names]
    found: dict[str, Origin] = {}
    for name, tensor in tensors.items():
        address, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not length or not tensor.is_contiguous():
            continue
        for start, end, offset, path in regions:
            if start <= address and address + length <= end:
                found[name] = Origin(names[path], offset + address - start, length)
                break
    return found


def _untouched() -> list[tuple[int, int, int, str]]:
    """Start, end, file offset and path of each mapped file region of this process without private pages; empty where /proc is not."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    regions: list[tuple[int, int, int, str]] = []
    current: tuple[int, int, int, str] | None = None
    for line in lines:
        if (head := _MAPPING.match(line)) is not None:
            current = (int(head[1], 16), int(head[2], 16), int(head[4], 16), head[5])
        elif line.startswith("Anonymous:"):
            if current is not None and int(line.split()[1]) == 0:
                regions.append(current)
            current = None
    return regions
