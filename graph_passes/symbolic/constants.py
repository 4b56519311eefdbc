"""Elements of stored arrays at symbolic indices."""

from __future__ import annotations

import numpy as np

from graph_passes.symbolic.graph import Shape
from graph_passes.symbolic.logic import Value, ite, less_equal
from graph_passes.symbolic.poly import Poly, const

__all__ = ["element", "element_at"]


def element_at(array: np.ndarray, index: Shape) -> Value | None:
    """Element of an array: at a fixed index, of a uniform array, of a progression, or of a two-valued triangle or band."""
    fixed = tuple(k.value if k.value is not None else slice(None) for k in index)
    try:
        part = array[fixed]
    except IndexError:
        return None
    free = [k for k in index if k.value is None]
    if part.size == 0:
        return None
    first = element(part.reshape(-1)[0])
    if (part == part.reshape(-1)[0]).all():
        return first
    if part.ndim == 1 and part.dtype.kind in "iu":
        step = int(part[1]) - int(part[0])
        if (np.diff(part) == step).all():
            return const(int(part[0])) + free[0] * step
    return _band(part, free) if part.ndim == 2 else None


def _band(part: np.ndarray, free: list[Poly]) -> Value | None:
    """A matrix with one value between two diagonals, or on one side of one, and another value elsewhere."""
    rows, columns = part.shape
    # One entry of each diagonal, from the one that starts at the lower left corner to the one at the upper right.
    along = np.concatenate([part[::-1, 0], part[0, 1:]])
    distances = np.arange(1 - rows, columns)
    if not (part == along[np.arange(columns)[None, :] - np.arange(rows)[:, None] + rows - 1]).all():
        return None
    inside = along == along[-1]
    if not inside[0]:
        inside = ~inside
    # `inside` holds at both ends of a band, or at the left end alone of a triangle.
    changes = np.flatnonzero(np.diff(inside))
    left = along[0]
    right = along[changes[0] + 1]
    if len(changes) not in (1, 2) or not (along == np.where(inside, left, right)).all():
        return None
    value: Value = element(right)
    position = free[1] - free[0]
    if len(changes) == 2:
        value = ite(less_equal(position - int(distances[changes[1]])), value, element(left))
    return ite(less_equal(position - int(distances[changes[0]])), element(left), value)


def element(x: np.generic) -> Value:
    if x.dtype.kind == "b":
        return bool(x)
    return const(int(x)) if x.dtype.kind in "iu" else float(x)
