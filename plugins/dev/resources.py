"""Registers and shared memory of every compiled kernel, from what ptxas said while a build folder was made.

Usage: python plugins/dev/resources.py <build folder>

Prints one row a kernel and architecture. Exit status 1, with the reason, when a kernel spills, uses local memory or has its wgmma serialised, or when there is
nothing to read. Source: ptxas -v, as kept by compile_gate.sh.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?:, \d+ bytes cumulative stack size)?(?:, (\d+) bytes smem)?")
_SERIALISED = "wgmma.mma_async instructions are serialized"


@dataclass(frozen=True)
class Kernel:
    """One entry function for one architecture. registers: of a thread; stack, spills, shared: bytes (shared: static alone)."""

    unit: str
    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


def parse(unit: str, text: str) -> Iterator[Kernel]:
    """The kernels of one ptxas report."""
    entries = list(_ENTRY.finditer(text))
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        report = text[entry.end() : following.start() if following else len(text)]
        spill, used = _SPILL.search(report), _USED.search(report)
        if used is None:
            raise ValueError(f"{unit}: ptxas gave no resources for {entry[1]} on {entry[2]}; its report has a new form.")
        stack, stores, loads = (int(x) for x in spill.groups()) if spill else (0, 0, 0)
        yield Kernel(unit, entry[1], entry[2], int(used[1]), stack, stores + loads, int(used[3] or 0))


def read(folder: Path) -> list[Kernel]:
    """Every kernel of a build folder. ValueError when it holds no report or a serialised wgmma."""
    kernels: list[Kernel] = []
    for log in sorted(folder.rglob("*.cu.o.log")):
        text = log.read_text(errors="replace")
        if _SERIALISED in text:
            raise ValueError(f"{log.name}: ptxas serialised wgmma.")
        kernels += parse(log.name.removesuffix(".cu.o.log"), text)
    if not kernels:
        raise ValueError(f"{folder} holds no compiler report (*.cu.o.log); build the kernels there first.")
    return kernels


def faults(kernels: list[Kernel]) -> list[str]:
    """One sentence for each kernel that spills or keeps local memory."""
    return [
        f"{k.unit}: {short(k.name)} on {k.architecture} has {k.stack} bytes of stack and {k.spills} of spills."
        for k in kernels
        if k.stack or k.spills
    ]


def short(name: str) -> str:
    """The kernel's own name in a mangled one: an Itanium name stands behind its length."""
    for found in re.finditer("_kernel", name):
        for start in range(found.start() - 1, 0, -1):
            if name[start].isalpha() and name[:start].endswith(str(found.end() - start)):
                return name[start : found.end()]
    return name


def table(kernels: list[Kernel]) -> str:
    rows = [
        ("unit", "kernel", "code", "registers", "shared"),
        *((k.unit, short(k.name), k.architecture, str(k.registers), str(k.shared)) for k in kernels),
    ]
    widths = [max(len(row[c]) for row in rows) for c in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python plugins/dev/resources.py <build folder>", file=sys.stderr)
        return 2
    try:
        kernels = read(Path(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(kernels))
    for sentence in (wrong := faults(kernels)):
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
