"""One look for every picture: sizes, colours that colour-blind readers tell apart, and how a figure becomes bytes."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLOCKED",
    "GRID",
    "INK",
    "KEPT",
    "MUTED",
    "PIXELS_PER_INCH",
    "Picture",
    "attention_map",
    "density_map",
    "figure",
    "line_style",
    "loss_map",
    "lost_attention_map",
    "short",
    "site_labels",
    "token_step",
]

PIXELS_PER_INCH = 100
"""CSS pixels an inch of figure takes on the page; the file has twice as many, for sharp screens and print."""

INK, MUTED, GRID = "#1c2430", "#5b6675", "#d9dee5"
BLOCKED = "#e3e6ea"
"""Keys after the query: the causal mask."""
KEPT = "#5b8fc7"

# Okabe and Ito's palette, without its yellow (too light on white).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4d4d4d")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # the font that comes with matplotlib: pictures are the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa4b1",
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.parse_math": False,  # a `$` in a name is a character, not mathematics
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A PNG and its size on the page in CSS pixels."""

    png: bytes
    width: int
    height: int


class Drawing:
    """A figure that is being drawn; `picture` is set when the `with` block of `figure` ends."""

    def __init__(self, fig: Figure) -> None:
        self.fig = fig
        self.picture = Picture(b"", 0, 0)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        """Axes at that place, in inches."""
        across, up = self.fig.get_size_inches()
        return self.fig.add_axes((left / across, bottom / up, width / across, height / up))


@contextmanager
def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Iterator[Drawing]:
    """A figure of that many inches in the house style, drawn by Agg without pyplot's global list of figures.

    Args:
        layout: None where every part is placed by hand: where sizes are known it is exact, and several times faster.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, up = round(width * PIXELS_PER_INCH), round(height * PIXELS_PER_INCH)
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page beside the picture has it in full.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # Agg cuts off fractions of a pixel: the millionth keeps a whole number from falling below itself.
        drawing = Drawing(Figure(figsize=(across / PIXELS_PER_INCH + 1e-6, up / PIXELS_PER_INCH + 1e-6), layout=layout))
        canvas = FigureCanvasAgg(drawing.fig)
        yield drawing
        buffer = io.BytesIO()
        canvas.figure.savefig(buffer, format="png", dpi=2 * PIXELS_PER_INCH, metadata={"Software": None})
        drawing.picture = Picture(buffer.getvalue(), across, up)


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the i-th line: told apart without colours, and the same in every picture of a report."""
    n = len(_COLOURS)
    return {"color": _COLOURS[i % n], "marker": _MARKERS[i % n], "linestyle": ("-", "--", ":")[i // n % 3]}


def _ramp(name: str, *colours: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(name, colours).with_extremes(bad="#f1f3f5")


def density_map() -> Any:
    """White = nothing kept, dark blue = everything."""
    return _ramp("density", "#f7fafd", "#c3d9ee", "#6ba3d0", "#2868a6", "#0d2f5c")


def loss_map() -> Any:
    """White = nothing lost, dark orange = all of the attention lost."""
    return _ramp("loss", "#fffdf9", "#fde3bd", "#f8a95a", "#d9601a", "#7f2704")


def attention_map() -> Any:
    """White = no attention, dark violet = all of it."""
    return _ramp("attention", "#ffffff", "#e7e1f0", "#b7a2d3", "#7c56a8", "#44177d", "#1b0438")


def lost_attention_map() -> Any:
    """White = no attention was there to lose, dark orange = all of it."""
    return _ramp("lost", "#ffffff", "#fde6d5", "#f8b585", "#dd6b20", "#7a2705")


def short(text: str, limit: int = 22) -> str:
    """Cut in the middle: the two ends of a name tell it apart."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def _common(texts: list[str]) -> str:
    """The characters with which all begin."""
    return "".join(c[0] for c in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*texts, strict=False)))


def site_labels(ids: list[str]) -> tuple[list[str], str]:
    """What tells the sites apart, and what they share: `layers.0.attn`, `layers.1.attn` are `0`, `1` of `layers.*.attn`.

    Numbers are never cut in two. Ids that share nothing are their own labels, and the pattern is `*`.
    """
    if len(set(ids)) < 2:
        return [short(i) for i in ids], "*"
    head = re.sub(r"\d+$", "", _common(ids))
    rest = [i[len(head) :] for i in ids]
    tail = re.sub(r"^\d+", "", _common([r[::-1] for r in rest])[::-1])
    return [short(r[: len(r) - len(tail)]) or "-" for r in rest], f"{head}*{tail}"


def token_step(length: int, ticks: int = 4) -> int:
    """A power of two that gives about that many ticks on an axis of `length` tokens."""
    return 1 << max(0, round(math.log2(max(1.0, length / ticks))))
