"""One head at work: its true attention, and which key blocks the operator reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sa_export.check.result import HeadMap
from sa_export.errors import UserError
from sa_export.report.plots.style import BLOCKED, KEPT, MUTED, Picture, attention_map, figure, lost_attention_map, short, token_step
from sa_export.report.wording import fixed, percent

if TYPE_CHECKING:
    import numpy as np

__all__ = ["blocks_figure"]


def _causal(head: HeadMap) -> np.ndarray:
    """[nQ, nK] bool: blocks that begin at or before the last row of the tile."""
    import numpy as np

    tiles = np.arange(-(-head.length // head.block_q))
    last = np.minimum((tiles + 1) * head.block_q, head.length) - 1
    return np.arange(-(-head.length // head.block_k)) * head.block_k <= last[:, None]


def _check(head: HeadMap, blocks: np.ndarray, mass: np.ndarray, shape: tuple[int, ...]) -> None:
    for name, array in (("blocks", blocks), ("mass", mass)):
        if array.shape != shape:
            raise UserError(
                f"check.npz holds {head.key}/{name} of shape {list(array.shape)}, but check.json says {list(shape)} "
                f"({head.length} tokens in blocks of {head.block_q} x {head.block_k}); they are not of one run: "
                "run `sa-export check` again."
            )


def _axes(ax: Any, head: HeadMap, title: str, below: str) -> None:
    from matplotlib.ticker import MultipleLocator

    ax.set_title(title, pad=20)
    ax.annotate(below, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=MUTED)
    ax.set_xlim(0, head.length)
    ax.set_ylim(head.length, 0)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(token_step(head.length)))
    ax.set_xlabel("key position (tokens)")


def _bar(ax: Any, norm: Any, cmap: Any, label: str) -> None:
    from matplotlib.cm import ScalarMappable

    bar = ax.figure.colorbar(ScalarMappable(norm, cmap), cax=ax)
    decades = range(round(math.log10(norm.vmin)), 1)
    bar.set_ticks([10.0**e for e in decades], labels=[f"{10.0 ** (e + 2):.10g} %" for e in decades])
    bar.minorticks_off()
    bar.set_label(label, color=MUTED)
    bar.outline.set_visible(False)


def blocks_figure(head: HeadMap, blocks: np.ndarray, mass: np.ndarray) -> Picture:
    """The true attention of one head beside the blocks that were kept.

    Args:
        blocks: [nQ, nK] bool, kept blocks.
        mass: [nQ, nK] float, mean probability of each key block over the rows of the tile, under full attention.

    Raises:
        UserError: the arrays do not have the shape that `head` says.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.patches import Patch

    allowed = _causal(head)
    _check(head, blocks, mass, allowed.shape)
    nq, nk = allowed.shape
    # A hundredth of an even share is the floor: the scale has to begin somewhere, and what lies below does not matter.
    norm = LogNorm(10.0 ** math.floor(math.log10(0.02 / nk)), 1)
    true_map, lost_map = attention_map(), lost_attention_map()
    level = norm(np.clip(np.nan_to_num(mass), norm.vmin, 1))
    left, right = true_map(level)[..., :3], lost_map(level)[..., :3]
    right[blocks.astype(bool)] = to_rgb(KEPT)
    for image in (left, right):
        image[~allowed] = to_rgb(BLOCKED)
    extent = (0, nk * head.block_k, nq * head.block_q, 0)

    side, base, edges = 3.55, 0.78, (0.75, 5.5)  # inches
    with figure(10.2, 4.8, layout=None) as drawing:
        axes = [drawing.axes(x, base, side, side) for x in edges]
        for ax, image in zip(axes, (left, right), strict=True):
            # Maps finer than the screen are averaged as colours; coarser ones keep hard edges.
            ax.imshow(image, extent=extent, interpolation="antialiased", interpolation_stage="rgba")
        _axes(axes[0], head, "true attention", f"{short(head.site, 44)}, head {head.head}")
        _axes(
            axes[1],
            head,
            f"{short(head.candidate, 32)} reads",
            f"density {fixed(head.density)}, the worst row keeps {percent(head.cra_min, 1)}",
        )
        axes[0].set_ylabel("query position (tokens)")
        axes[1].tick_params(labelleft=False)
        for x, cmap, label in zip(edges, (true_map, lost_map), ("attention to a block (log)", "attention not read (log)"), strict=True):
            _bar(drawing.axes(x + side + 0.1, base, 0.13, side), norm, cmap, label)
        handles = [Patch(facecolor=KEPT, label="kept block"), Patch(facecolor=BLOCKED, label="keys after the query (causal mask)")]
        drawing.fig.legend(handles=handles, loc="lower center", ncols=2, borderaxespad=0.1)
    return drawing.picture
