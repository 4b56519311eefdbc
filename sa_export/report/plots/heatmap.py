"""Density and CRA of every layer and head, as coloured cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sa_export.check.result import LengthResult
from sa_export.report.plots.style import INK, MUTED, Picture, density_map, figure, loss_map, short, site_labels

if TYPE_CHECKING:
    import numpy as np

__all__ = ["cra_figure", "density_figure"]

_LABEL_INCHES = 0.075  # width of one character of a row's label
_NUMBER_INCHES = (0.255, 0.155)  # a cell smaller than this has no room for a number


def _matrix(row: LengthResult, name: str) -> np.ndarray:
    """[sites, heads] of that figure; what was not measured, and heads that a site does not have, are NaN."""
    import numpy as np

    out = np.full((len(row.sites), max(len(s.density) for s in row.sites)), np.nan)
    for i, site in enumerate(row.sites):
        values = getattr(site, name)
        out[i, : len(values)] = values
    return out


def _digits(value: float, floor: bool) -> str:
    """Two digits without the leading zero. `floor`: a CRA of 0.996 reads .99, as 1 would claim that nothing is lost."""
    value = math.floor(100 * value + 1e-9) / 100 if floor else value
    if not floor and 0 < value < 0.005:
        return "<.01"
    return "1" if value >= 0.995 else f"{value:.2f}"[1:]


def _ticks(n: int, inches: float, room: float) -> list[int]:
    """Which of n rows or columns are labelled, when a label takes `room` inches: all of them, or every 2nd, 4th, 5th, 8th, 10th ..."""
    for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50):
        if inches / n * step >= room:
            return list(range(0, n, step))
    return list(range(0, n, max(1, n // 4)))


def _panel(ax: Any, values: np.ndarray, title: str, size: tuple[float, float], cmap: Any, lost: bool) -> Any:
    """One map of `size` inches; `lost` colours by 1 - value. The root scale shows differences near 0, where the figures lie."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    n, heads = values.shape
    shade = np.clip(1 - values if lost else values, 0, 1)
    image = ax.imshow(np.ma.masked_invalid(shade), cmap=cmap, norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    ax.set_title(title)
    ax.set_xlabel("query head")
    ax.set_xticks(_ticks(heads, size[0], 0.24))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    cell = (size[0] / heads, size[1] / n)
    if min(cell) > 0.11:
        ax.vlines(np.arange(heads + 1) - 0.5, -0.5, n - 0.5, colors="white", linewidths=1.2)
        ax.hlines(np.arange(n + 1) - 0.5, -0.5, heads - 0.5, colors="white", linewidths=1.2)
    if cell[0] >= _NUMBER_INCHES[0] and cell[1] >= _NUMBER_INCHES[1]:
        font = min(8.5, 72 * cell[0] / 2.6, 72 * cell[1] / 1.5)
        for (i, j), value in np.ndenumerate(values):
            known = math.isfinite(value)
            red, green, blue, _ = cmap(image.norm(shade[i, j])) if known else (1, 1, 1, 1)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            text = _digits(value, floor=lost) if known else "n/a"
            ax.text(j, i, text, ha="center", va="center", fontsize=font, color="white" if dark else INK if known else MUTED)
    return image


def _row_labels(row: LengthResult) -> tuple[list[str], str]:
    labels, pattern = site_labels([s.id for s in row.sites])
    marked = [label + (" (dense)" if s.policy == "dense" else "") for label, s in zip(labels, row.sites, strict=True)]
    return marked, "attention site" if pattern == "*" else f"layer ({short(pattern, 32)})"


def _label_rows(ax: Any, row: LengthResult, inches: float, left: float) -> None:
    labels, name = _row_labels(row)
    shown = _ticks(len(labels), inches, 0.17)
    ax.set_yticks(shown, [labels[i] for i in shown])
    # A name longer than a low map would be cut off at its ends.
    if len(name) * _LABEL_INCHES <= inches + 0.8:
        ax.annotate(name, (0, 0.5), (-72 * (left - 0.12), 0), xycoords="axes fraction", textcoords="offset points",
                    rotation=90, ha="center", va="center", color=MUTED)  # fmt: skip


def _bar(ax: Any, image: Any, marks: dict[float, str]) -> Any:
    bar = ax.figure.colorbar(image, cax=ax)
    bar.set_ticks(list(marks), labels=list(marks.values()))
    bar.minorticks_off()
    bar.outline.set_visible(False)
    return bar


def _size(row: LengthResult, width: float) -> tuple[float, float, float]:
    """Inches of one panel (width, height), and of the margin on its left."""
    heads, n = max(len(s.density) for s in row.sites), len(row.sites)
    label = max(map(len, _row_labels(row)[0])) * _LABEL_INCHES + 0.42
    return max(1.6, min(0.52 * heads, width)), max(0.9, min(0.3 * n, 7.6)), label


_BELOW, _ABOVE, _RIGHT = 0.52, 0.36, 0.66  # inches for the axis label, the title, and the colour bar


def density_figure(row: LengthResult) -> Picture:
    """Kept pairs / causal pairs of each site (a row) and head (a column), coloured on a root scale from 0 to 1.

    At least one site must have heads.
    """
    width, height, left = _size(row, 8.9)
    with figure(left + width + _RIGHT, _BELOW + height + _ABOVE, layout=None) as drawing:
        ax = drawing.axes(left, _BELOW, width, height)
        image = _panel(ax, _matrix(row, "density"), "density", (width, height), density_map(), lost=False)
        _label_rows(ax, row, height, left)
        _bar(drawing.axes(left + width + 0.12, _BELOW, 0.13, height), image, {0: "0", 0.05: ".05", 0.25: ".25", 0.5: ".5", 1: "1"})
    return drawing.picture


def cra_figure(row: LengthResult) -> Picture:
    """Retained probability of each site and head: mean over the rows on the left, the worst row on the right, coloured by what is lost.

    At least one site must have heads.
    """
    width, height, left = _size(row, 4.4)
    second = left + width + 0.18
    with figure(second + width + _RIGHT, _BELOW + height + _ABOVE, layout=None) as drawing:
        first = drawing.axes(left, _BELOW, width, height)
        image = _panel(first, _matrix(row, "cra_mean"), "CRA, mean", (width, height), loss_map(), lost=True)
        _label_rows(first, row, height, left)
        worst = drawing.axes(second, _BELOW, width, height)
        _panel(worst, _matrix(row, "cra_min"), "CRA, worst row", (width, height), loss_map(), lost=True)
        worst.set_yticks([])
        marks = {0: "1", 0.01: ".99", 0.05: ".95", 0.25: ".75", 0.5: ".5", 1: "0"}
        if height < 1.5:
            del marks[0.01]  # too near to 1
        _bar(drawing.axes(second + width + 0.12, _BELOW, 0.13, height), image, marks).ax.invert_yaxis()
    return drawing.picture
