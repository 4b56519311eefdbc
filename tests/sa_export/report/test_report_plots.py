"""The pictures, down to the colours of single cells."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest

from sa_export.check.result import HeadMap
from sa_export.report.plots import Picture, blocks_figure, cra_figure, density_figure, error_figure, error_rows, tradeoff_figure
from sa_export.report.plots.heatmap import _digits
from sa_export.report.plots.style import BLOCKED, KEPT, PIXELS_PER_INCH, site_labels, token_step
from tests.sa_export.report import report_samples as samples


def pixels(picture: Picture) -> np.ndarray:
    """[height, width, 3] in 0 .. 255, one pixel a CSS pixel."""
    from matplotlib.image import imread

    image = (imread(io.BytesIO(picture.png), format="png")[..., :3] * 255).round().astype(int)
    assert image.shape == (2 * picture.height, 2 * picture.width, 3)
    return image[::2, ::2]


def colour(text: str) -> list[int]:
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def test_blocks_picture_shows_kept_lost_and_future() -> None:
    head = HeadMap("k", "tile", "layers.0", 3, 512, 128, 64, 0.5, 0.5)
    mass = np.zeros((4, 8), np.float32)
    mass[:, 0], mass[3, 2] = 0.5, 0.5
    blocks = np.zeros((4, 8), bool)
    blocks[:, 0] = True
    blocks[0, 7] = True  # a future block: nothing is read there, whatever the array says
    image = pixels(blocks_figure(head, blocks, mass))
    inch, top = PIXELS_PER_INCH, 4.8 - 0.78 - 3.55

    def cell(panel: int, tile: int, block: int) -> list[int]:
        x = (0.75, 5.5)[panel] + 3.55 * (block + 0.5) / 8
        return image[round((top + 3.55 * (tile + 0.5) / 4) * inch), round(x * inch)].tolist()

    assert cell(1, 0, 0) == cell(1, 3, 0) == colour(KEPT)
    assert cell(0, 0, 7) == cell(1, 0, 7) == cell(0, 2, 6) == cell(1, 1, 4) == colour(BLOCKED)
    assert cell(0, 3, 1) == cell(1, 3, 1) == [255, 255, 255]
    red, _, blue = cell(1, 3, 2)
    assert red > blue + 80  # attention that was not read is orange
    assert sum(cell(0, 3, 2)) < 250  # and dark on the left, as it is half of the attention
    assert cell(0, 3, 2) == cell(0, 3, 0)


@pytest.mark.parametrize("length", [64, 1000, 32768])
def test_blocks_picture_of_any_length(length: int) -> None:
    nq, nk = math.ceil(length / 128), math.ceil(length / 64)
    head = HeadMap("k", "tile", "model.layers.35.self_attn", 63, length, 128, 64, 1.0, 1.0)
    mass = samples.attention(length, 128, 64, 0.5, np.random.default_rng(0))
    assert mass.shape == (nq, nk)
    mass[0, 0] = np.nan
    assert pixels(blocks_figure(head, np.ones((nq, nk), bool), mass)).std() > 10


def test_maps_are_darker_where_more_is_kept_or_lost() -> None:
    row = samples.length_result("residue", 2048, 2, 2)
    density = [[0.0, 1.0], [0.25, math.nan]]
    sites = [replace(s, density=d, cra_mean=[0.9, 1.0], cra_min=[0.0, 1.0]) for s, d in zip(row.sites, density, strict=True)]
    image = pixels(density_figure(replace(row, sites=sites)))
    # Corners of cells, where no number stands; two columns of 0.8 inches after the labels, rows of 0.45 inches.
    left = image.shape[1] - 1.6 * PIXELS_PER_INCH - 66
    corner = [[image[36 + round(45 * i) + 8, round(left + 80 * j) + 10].sum() for j in range(2)] for i in range(2)]
    assert corner[0][0] > 720  # nothing kept: nearly white
    assert corner[0][1] < 160  # all kept: dark blue
    assert 300 < corner[1][0] < 600
    assert 700 < corner[1][1] < 740  # not measured: grey
    cra = pixels(cra_figure(replace(row, sites=sites)))
    worst = cra.shape[1] - 66 - 160
    assert cra[44, worst + 10].sum() < 220  # all lost
    assert cra[44, worst + 90].sum() > 740  # nothing lost


def test_numbers_in_cells_never_promise_too_much() -> None:
    assert [_digits(x, floor=True) for x in (1.0, 0.999, 0.996, 0.29, 0.0)] == ["1", ".99", ".99", ".29", ".00"]
    assert [_digits(x, floor=False) for x in (1.0, 0.996, 0.214, 0.003, 0.0)] == ["1", "1", ".21", "<.01", ".00"]


def test_site_labels_keep_numbers_whole() -> None:
    assert site_labels([f"model.layers.{i}.self_attn" for i in (10, 11, 19)]) == (["10", "11", "19"], "model.layers.*.self_attn")
    assert site_labels(["layers.1", "layers.11", "layers.21"]) == (["1", "11", "21"], "layers.*")
    assert site_labels(["only.one"]) == (["only.one"], "*")
    assert site_labels(["encoder", "x9"]) == (["encoder", "x9"], "*")


def test_token_ticks_are_powers_of_two() -> None:
    assert [token_step(n) for n in (1, 64, 1000, 4096, 8192, 100_000, 131_072)] == [1, 16, 256, 1024, 2048, 32768, 32768]


def test_errors_with_zeros_gaps_and_one_site() -> None:
    c = samples.candidate("tile", (1024, 2048), {}, maps=0, dense=(0, 3))
    c.lengths[1].sites[2] = replace(c.lengths[1].sites[2], output_error=math.nan, drift=math.inf)
    one = samples.result([c])
    assert [(i, label) for i, label, _ in error_rows(one)] == [(0, "1024 tokens"), (1, "2048 tokens")]
    assert error_figure(one)
    other = samples.candidate("residue", (2048,), {}, layers=1, maps=0)
    both = samples.result([c, replace(other, lengths=[replace(other.lengths[0], sites=[])]), other])
    assert [(i, label) for i, label, _ in error_rows(both)] == [(0, "tile"), (2, "residue")]
    assert error_figure(both)
    all_zero = replace(c, lengths=[replace(c.lengths[0], sites=[replace(s, output_error=0.0, drift=0.0) for s in c.lengths[0].sites])])
    assert error_figure(samples.result([all_zero]))
    assert error_figure(samples.result([replace(c, lengths=[])])) is None


def test_tradeoff_needs_two_candidates_with_figures() -> None:
    a, b = (samples.candidate(n, (1024, 2048), {}, maps=0) for n in ("residue", "column_slash"))
    assert tradeoff_figure(samples.result([a])) is None
    blind = replace(b, lengths=[replace(r, loss=math.nan, needles=0) for r in b.lengths])
    assert tradeoff_figure(samples.result([a, blind])) is None
    picture = tradeoff_figure(samples.result([a, b]))
    assert picture
    # Both candidates' colours (blue and vermillion) are drawn.
    image = pixels(picture).reshape(-1, 3)
    for rgb in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(image - rgb).max(1) <= 3).sum() > 50


def test_no_pyplot_and_no_settings_left_behind() -> None:
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    had = "matplotlib.pyplot" in sys.modules
    density_figure(samples.length_result("residue", 2048, 2, 2))
    assert dict(matplotlib.rcParams) == before
    assert had or "matplotlib.pyplot" not in sys.modules
