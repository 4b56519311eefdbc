"""Which pictures a report has, and what their files are called."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sa_export.check.result import Candidate, CheckResult, HeadMap, LengthResult
from sa_export.errors import UserError
from sa_export.report.plots import Picture, blocks_figure, cra_figure, density_figure, error_figure, tradeoff_figure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Pictures", "draw_pictures"]


@dataclass
class Pictures:
    """Every picture of a report, by file name in the order of drawing, and where each belongs.

    Attributes:
        files: file name -> picture.
        maps: (index of the candidate, index of the length) -> names of the density and of the CRA map.
        blocks: (index of the candidate, index of the head map) -> name.
        errors, tradeoff: name, or None when there is nothing to draw.
    """

    files: dict[str, Picture] = field(default_factory=dict)
    maps: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    blocks: dict[tuple[int, int], str] = field(default_factory=dict)
    errors: str | None = None
    tradeoff: str | None = None

    def add(self, name: str, picture: Picture) -> str:
        """Files the picture under `<name>.png`; only letters, digits, `.`, `_` and `-` stay, and a name that is taken gets a number."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100] or "picture"
        free, n = f"{plain}.png", 2
        while free.lower() in {f.lower() for f in self.files}:
            free, n = f"{plain}-{n}.png", n + 1
        self.files[free] = picture
        return free


def _arrays(path: Path, maps: list[HeadMap]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(blocks, mass) of each map."""
    import numpy as np

    again = "run `sa-export check` again."
    try:
        with np.load(path, allow_pickle=False) as archive:
            for head in maps:
                names = (f"{head.key}/blocks", f"{head.key}/mass")
                missing = [n for n in names if n not in archive]
                if missing:
                    raise UserError(f"{path} holds no array {missing[0]}, which check.json names; they are not of one run: {again}")
                yield archive[names[0]], archive[names[1]]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {again}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz file ({error}); {again}") from None


def _steps(result: CheckResult, arrays_npz: Path | None, out: Pictures) -> Iterator[Callable[[], None]]:
    def maps(i: int, j: int, candidate: Candidate, row: LengthResult) -> None:
        density = out.add(f"density_{candidate.name}_{row.length}", density_figure(row))
        out.maps[i, j] = density, out.add(f"cra_{candidate.name}_{row.length}", cra_figure(row))

    def errors() -> None:
        picture = error_figure(result)
        out.errors = out.add("errors", picture) if picture else None

    def tradeoff() -> None:
        picture = tradeoff_figure(result)
        out.tradeoff = out.add("tradeoff", picture) if picture else None

    def blocks(i: int, j: int, head: HeadMap, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        name = f"blocks_{head.candidate}_{head.length}_{head.site}_head{head.head}"
        out.blocks[i, j] = out.add(name, blocks_figure(head, *arrays))

    for i, candidate in enumerate(result.candidates):
        for j, row in enumerate(candidate.lengths):
            if any(s.density for s in row.sites):
                yield partial(maps, i, j, candidate, row)
    heads = [(i, j, head) for i, c in enumerate(result.candidates) for j, head in enumerate(c.maps)]
    if arrays_npz is not None and heads:
        for (i, j, head), arrays in zip(heads, _arrays(arrays_npz, [h for _, _, h in heads]), strict=True):
            yield partial(blocks, i, j, head, arrays)
    yield errors
    yield tradeoff


def draw_pictures(result: CheckResult, arrays_npz: Path | None) -> Pictures:
    """Draws every picture in memory, with a progress bar when it takes more than two seconds.

    Raises:
        UserError: `arrays_npz` cannot be read, or is not of the same run as `result`.
    """
    from tqdm import tqdm

    out = Pictures()
    for step in tqdm(_steps(result, arrays_npz, out), desc="pictures", unit="", delay=2, leave=False, disable=None):
        step()
    return out
