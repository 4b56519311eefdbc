"""Elements of stored arrays at symbolic indices."""

from __future__ import annotations

import numpy as np

from graph_passes.symbolic.graph import Shape
from graph_passes.symbolic.logic import Value, ite, less_equal
from graph_passes.symbolic.poly import Poly, const

__all__ = ["element", "element_at"]


def element_at(array: np.ndarray, index: Shape) -> Value | None:
    """Element of an array: at a fixed index, of a uniform array, of a progression, or of a two-valued triangle."""
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
    return _triangle(part, free) if part.ndim == 2 else None


def _triangle(part: np.ndarray, free: list[Poly]) -> Value | None:
    """A matrix with one value on and left of a diagonal and another right of it."""
    low, high = part[-1, 0], part[0, -1]
    rows, columns = np.arange(part.shape[0])[:, None], np.arange(part.shape[1])[None, :]
    diagonal = int((part[0] == low).sum()) - 1 if part[0, 0] == low else -int(np.argmax(part[:, 0] == low))
    if low == high or not (part == np.where(columns - rows <= diagonal, low, high)).all():
        return None
    return ite(less_equal(free[1] - free[0] - diagonal), element(low), element(high))


def element(x: np.generic) -> Value:
    if x.dtype.kind == "b":
        return bool(x)
    return const(int(x)) if x.dtype.kind in "iu" else float(x)
