"""Errors along the depth of the model, and candidates against each other."""

from __future__ import annotations

import math
from typing import Any

from sa_export.check.result import Candidate, CheckResult, LengthResult
from sa_export.report.plots.style import GRID, INK, MUTED, Picture, figure, line_style, short, site_labels
from sa_export.report.wording import quantity

__all__ = ["error_figure", "error_rows", "tradeoff_figure"]


def error_rows(result: CheckResult) -> list[tuple[int, str, LengthResult]]:
    """What `error_figure` draws: (number of the line's style, label, figures).

    Each length of an only candidate, else each candidate at its longest length, in the style of the candidate's place in the result.
    """
    measured = [(i, c.name, [r for r in c.lengths if r.sites]) for i, c in enumerate(result.candidates)]
    measured = [(i, name, rows) for i, name, rows in measured if rows]
    if len(measured) == 1:
        return [(i, f"{r.length} tokens", r) for i, r in enumerate(sorted(measured[0][2], key=lambda r: r.length))]
    longest = [(i, name, max(rows, key=lambda r: r.length)) for i, name, rows in measured]
    same = len({r.length for _, _, r in longest}) == 1
    return [(i, short(name, 32) if same else f"{short(name, 24)}, {r.length}", r) for i, name, r in longest]


def _depth_axis(ax: Any, row: LengthResult) -> None:
    n = len(row.sites)
    labels, pattern = site_labels([s.id for s in row.sites])
    step = max(1, math.ceil(sum(len(label) + 2 for label in labels) / 55))
    ax.set_xlim(-0.4, n - 0.6)
    ax.set_xticks(range(0, n, step), labels[::step])
    ax.set_xlabel("attention site" if pattern == "*" else f"layer ({short(pattern, 40)})")


def _share(y: float, _: int | None = None) -> str:
    """A tick of a relative error, in percent."""
    return f"{100 * y:.10g} %"


def error_figure(result: CheckResult) -> Picture | None:
    """Relative error of each site's own output (left) and the drift of its output from the original model (right), logarithmic.

    None when no row has sites. Zeros (a dense site) are drawn on the bottom line, which is then marked 0; unmeasured values are gaps.
    """
    rows = error_rows(result)
    if not rows:
        return None
    values = [v for _, _, r in rows for s in r.sites for v in (s.output_error, s.drift) if v > 0 and math.isfinite(v)]
    low = 10.0 ** math.floor(math.log10(min(values))) if values else 1e-8
    high = 10.0 ** math.ceil(math.log10(max(values) * 1.001)) if values else 1.0
    zeros = any(v == 0 for _, _, r in rows for s in r.sites for v in (s.output_error, s.drift))
    bottom = low / 10 if zeros else low
    legend_rows = math.ceil(len(rows) / 4)
    with figure(9.8, 3.3 + 0.22 * legend_rows) as drawing:
        axes = drawing.fig.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
        for ax, name, title in zip(
            axes, ("output_error", "drift"), ("error of the site alone", "drift from the original model"), strict=True
        ):
            for i, label, row in rows:
                ys = [max(getattr(s, name), bottom) if math.isfinite(getattr(s, name)) else math.nan for s in row.sites]
                size = 4.5 if len(ys) <= 40 else 0
                ax.plot(range(len(ys)), ys, linewidth=1.5, label=label, clip_on=False, zorder=3, markersize=size, **line_style(i))
            ax.set_yscale("log")
            ax.set_ylim(bottom, high)
            ax.set_title(title)
            ax.grid(axis="y")
            ax.spines[["top", "right"]].set_visible(False)
            _depth_axis(ax, max((r for _, _, r in rows), key=lambda r: len(r.sites)))
        if zeros:
            ticks = [10.0**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
            axes[0].set_yticks([bottom, *ticks], ["0", *map(_share, ticks)])
        else:
            axes[0].yaxis.set_major_formatter(_share)
        axes[0].set_ylabel("|difference| / |full|")
        if len(rows) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            drawing.fig.legend(handles, labels, loc="outside lower center", ncols=min(len(rows), 4))
    return drawing.picture


def _limit(result: CheckResult, field: str) -> float | None:
    """The limit of the gates on that figure of a row, if all gated candidates share one."""
    limits = {g.limit for c in result.candidates if c.gated for r in c.lengths for g in r.gates if quantity(g, r) == field}
    return limits.pop() if len(limits) == 1 else None


def _points(candidate: Candidate, field: str) -> list[tuple[float, float, int]]:
    """(density, percent, length), shortest first, unmeasured points left out."""
    out = []
    for r in sorted(candidate.lengths, key=lambda r: r.length):
        y = math.nan if field == "recall_ratio" and not r.needles else 100 * getattr(r, field)
        if math.isfinite(r.density) and math.isfinite(y):
            out.append((r.density, y, r.length))
    return out


def tradeoff_figure(result: CheckResult) -> Picture | None:
    """Density against the change of the loss and against the needles still recalled, one colour a candidate.

    None when fewer than two candidates have figures.
    """
    from matplotlib.lines import Line2D

    drawn = [(i, c) for i, c in enumerate(result.candidates) if _points(c, "loss_change") or _points(c, "recall_ratio")]
    if len(drawn) < 2:
        return None
    named = len(drawn) <= 4 and len({r.length for _, c in drawn for r in c.lengths}) > 1  # more labels would cover each other
    panels = (
        ("loss_change", "loss against full attention", "change of the loss (%)"),
        ("recall_ratio", "needles against full attention", "needles recalled (% of full attention's)"),
    )
    with figure(9.8, 3.7 + 0.22 * math.ceil(len(drawn) / 4)) as drawing:
        axes = drawing.fig.subplots(1, 2)
        for ax, (what, title, label) in zip(axes, panels, strict=True):
            for i, c in drawn:
                points = _points(c, what)
                if not points:
                    continue
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                ax.plot(xs, ys, linewidth=0.9, markersize=7, zorder=3, markeredgecolor="white", clip_on=False, **line_style(i))
                # First above, last below: the two stay apart even where the points coincide.
                ends = {points[0]: (6, 5, "left"), points[-1]: (-6, -11, "right")} if named else {}
                for (x, y, length), (right, up, side) in ends.items():
                    ax.annotate(str(length), (x, y), (right, up), textcoords="offset points", ha=side, fontsize=7.5, color=MUTED, zorder=4)
            limit = _limit(result, what)
            if limit is not None:
                ax.axhline(100 * limit, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
                ax.annotate(
                    "limit",
                    (1, 100 * limit),
                    (-2, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                )
            ax.set_xlim(0, 1)
            if what == "loss_change":
                ax.axhline(0, color=GRID, linewidth=1.2, zorder=1)
                spread = [abs(p[1]) for _, c in drawn for p in _points(c, what)] or [1.0]
                if max(spread) > 5 and min(spread) < 0.5:
                    ax.set_yscale("symlog", linthresh=0.5)
                    marks = [s * m for s in (-1, 1) for m in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000)]
                    low, high = min([0.0, *(p[1] for _, c in drawn for p in _points(c, what))]) - 0.15, ax.get_ylim()[1]
                    ax.set_ylim(low, high * 1.6)
                    ax.set_yticks([0, *(m for m in marks if low <= m <= high * 1.6)])
                    ax.minorticks_off()
                else:
                    ax.margins(y=0.15)
                ax.yaxis.set_major_formatter(lambda y, _: f"{y:+.4g}" if y else "0")
            else:
                ax.set_ylim(bottom=0, top=max(110.0, ax.get_ylim()[1] * 1.05))
            ax.set_title(title)
            ax.set_xlabel("density (share of full attention that is computed)")
            ax.set_ylabel(label)
            ax.grid()
            ax.spines[["top", "right"]].set_visible(False)
        density = _limit(result, "density")
        for ax in axes if density is not None else []:
            ax.axvline(density, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        handles = [Line2D([], [], linewidth=0.9, markersize=7, label=short(c.name, 32), **line_style(i)) for i, c in drawn]
        drawing.fig.legend(handles=handles, loc="outside lower center", ncols=min(len(drawn), 4))
    return drawing.picture
