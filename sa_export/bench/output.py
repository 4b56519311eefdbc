"""What a benchmark leaves: a table for the terminal, CSV, JSON with machine and versions, and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_export.bench.attention import Row

__all__ = ["figure_png", "text_table", "write_folder"]

_COLUMNS = (
    "tokens",
    "policy",
    "density",
    "sample",
    "filter",
    "attend",
    "total ms",
    "cuDNN",
    "Flash-2",
    "search",
    "speedup",
    "difference",
)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _cells(row: Row) -> tuple[str, ...]:
    mark = "*" if row.extrapolated else ""
    return (
        str(row.length),
        row.policy,
        _number(row.density, 3),
        _number(row.sample_ms, 3),
        _number(row.filter_ms, 3),
        _number(row.attend_ms, 3),
        _number(row.total_ms, 3),
        _number(row.cudnn_ms, 3) + mark,
        _number(row.flash_ms, 3) + mark,
        _number(100 * row.search_share, 1) + " %" if math.isfinite(row.search_share) else "-",
        _number(row.speedup, 2) + "x" + mark,
        _number(row.difference, 4),
    )


def text_table(rows: Sequence[Row]) -> str:
    """Aligned text, one line a (length, policy). Times are milliseconds; search and speedup are against the faster dense baseline."""
    body = [_cells(r) for r in rows]
    widths = [max(len(line[i]) for line in (_COLUMNS, *body)) for i in range(len(_COLUMNS))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()

    lines = [line(_COLUMNS), "-" * len(line(_COLUMNS)), *(line(b) for b in body)]
    if any(r.extrapolated for r in rows):
        lines.append("* dense is extrapolated: 16 times the measured time of a quarter of the length")
    return "\n".join(lines)


def write_folder(folder: Path, rows: Sequence[Row], environment: dict[str, Any]) -> None:
    """attention.csv, attention.json and attention.png in an existing folder."""
    values = [r.to_dict() for r in rows]
    with (folder / "attention.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()} for value in values]
    (folder / "attention.json").write_text(json.dumps({"environment": environment, "rows": plain}, indent=1) + "\n", encoding="utf-8")
    (folder / "attention.png").write_bytes(figure_png(rows, environment))


def figure_png(rows: Sequence[Row], environment: dict[str, Any]) -> bytes:
    """Speedup over dense by length (left) and where the time goes at the longest length (right)."""
    from sa_export.report.plots.style import GRID, MUTED, figure, line_style

    names = list(dict.fromkeys(r.policy for r in rows))
    with figure(9.8, 3.8) as drawing:
        left, right = drawing.fig.subplots(1, 2)
        for i, name in enumerate(names):
            points = sorted((r.length, r.speedup) for r in rows if r.policy == name and math.isfinite(r.speedup))
            left.plot(*zip(*points, strict=True) if points else ([], []), label=name, linewidth=1.5, markersize=4.5, **line_style(i))
        left.axhline(1.0, color=MUTED, linewidth=0.8)
        left.set_xscale("log", base=2)
        lengths = sorted({r.length for r in rows})
        left.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        left.set_ylim(bottom=0)
        left.set_ylabel("dense time / ours")
        left.set_xlabel("tokens")
        left.set_title("speedup over the faster dense baseline")
        left.grid(color=GRID)
        left.legend()
        longest = [r for r in rows if r.length == lengths[-1]]
        bottom = [0.0] * len(longest)
        for i, (label, field) in enumerate((("sample", "sample_ms"), ("filter", "filter_ms"), ("attend", "attend_ms"))):
            heights = [getattr(r, field) if math.isfinite(getattr(r, field)) else 0.0 for r in longest]
            right.bar(range(len(longest)), heights, bottom=bottom, label=label, color=line_style(i)["color"], width=0.6)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        known = [min(ms for ms in (r.cudnn_ms, r.flash_ms) if math.isfinite(ms)) for r in longest if math.isfinite(r.speedup)]
        if known:
            right.axhline(
                known[0], color=MUTED, linestyle="--", linewidth=1.0, label="dense" + (" (extrapolated)" if longest[0].extrapolated else "")
            )
        right.set_xticks(range(len(longest)), [r.policy for r in longest])
        right.set_ylabel("ms")
        right.set_title(f"{lengths[-1]} tokens, {environment.get('gpu', '')}")
        right.legend()
    return drawing.picture.png
