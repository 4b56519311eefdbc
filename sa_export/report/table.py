"""The terminal table of a check."""

from __future__ import annotations

import os
import sys

from sa_export.check.result import Candidate, CheckResult, LengthResult
from sa_export.report.wording import count, decision, fixed, percent, verdict

__all__ = ["rows_by_length", "text_table"]

HEADER = (
    ("length", "candidate", "density", "CRA", "CRA", "loss", "loss", "loss", "needles", "needles", "verdict"),
    ("", "", "", "mean", "min", "full", "sample", "change", "full", "sample", ""),
)
LEFT = {1, 10}  # columns of words; figures are aligned right
GREEN, RED, DIM, RESET = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def rows_by_length(result: CheckResult) -> list[tuple[Candidate, LengthResult]]:
    """Every (candidate, length) of the run, shortest prompts first, candidates in their own order."""
    rows = [(c, r) for c in result.candidates for r in c.lengths]
    return sorted(rows, key=lambda pair: pair[1].length)


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _cells(candidate: Candidate, row: LengthResult) -> tuple[str, ...]:
    return (
        str(row.length),
        candidate.name,
        fixed(row.density),
        fixed(row.cra_mean),
        fixed(row.cra_min),
        fixed(row.loss_full, 4),
        fixed(row.loss, 4),
        percent(row.loss_change, 2, signed=True),
        count(row.recalled_full, row.needles),
        count(row.recalled, row.needles),
        decision(candidate, row),
    )


def text_table(result: CheckResult, colour: bool | None = None) -> str:
    """The figures of a run as aligned text, one row a (length, candidate), then what was exact, then what failed.

    Args:
        colour: None asks the terminal: colour only if stdout is one, `TERM` is not `dumb` and `NO_COLOR` is unset or empty.

    Returns:
        Lines without a newline at the end.
    """
    colour = _wants_colour() if colour is None else colour
    paint = {"pass": GREEN, "FAIL": RED} if colour else {}
    body = [_cells(c, r) for c, r in rows_by_length(result)]
    widths = [max(len(line[i]) for line in (*HEADER, *body)) for i in range(len(HEADER[0]))]

    def line(cells: tuple[str, ...]) -> str:
        padded = [c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        text = "  ".join(padded).rstrip()
        code = paint.get(cells[-1])
        return f"{text[: -len(cells[-1])]}{code}{cells[-1]}{RESET}" if code else text

    lines = [line(h) for h in HEADER]
    lines.append("-" * max(map(len, lines)))
    lines += [line(b) for b in body]
    if any(not c.gated for c in result.candidates):
        lines.append(f"{DIM if colour else ''}(pass), (fail): shown for comparison, does not decide{RESET if colour else ''}")
    exact = [f"{c.name} {sum(e.ok for e in c.exact)}/{len(c.exact)}" for c in result.candidates if c.exact]
    if exact:
        lines.append(f"alpha = 1 is full attention, cases within tolerance: {', '.join(exact)}")
    said = verdict(result)
    word = "PASS" if said.passed else "NOT DECIDED" if said.passed is None else "FAIL"
    code = (GREEN if said.passed else RED) if colour and said.passed is not None else ""
    sentences = [f"{f}." for f in said.failures] or [said.sentence]
    lines += [f"{code}{word}{RESET if code else ''}  {s}" for s in sentences]
    return "\n".join(lines)
