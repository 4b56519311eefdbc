"""What the attributes and inputs of one node say of its axes and lengths, read as its operator specifies them, in every opset."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.symbolic.graph import Shape, Stuck, SymbolicGraph
from graph_passes.symbolic.poly import Clamped, Poly, const, is_nonnegative, poly, product

__all__ = [
    "axes_of",
    "axis_of",
    "divide_lengths",
    "reshape_target",
    "shape_window",
    "slices",
    "split_sizes",
    "squeezed_axes",
    "unclamped",
    "unsqueezed_axes",
]

_UNBOUNDED = 2**31 - 1
"""An end of a Slice at or beyond this means "to the end" (ONNX, Slice: INT_MAX or INT64_MAX)."""


def axis_of(node: gs.Node, rank: int, name: str = "axis", default: int = 0) -> int:
    """An axis attribute counted from the front."""
    axis = int(node.attrs.get(name, default))
    return axis + rank if axis < 0 else axis


def unclamped(length: Poly) -> Poly:
    """For min(n, bound) the n that it must be where it meets the length n in a broadcast: 1 it can only be when n is 1, since
    bound >= 2."""
    only = next(iter(length.symbols)) if len(length.symbols) == 1 else None
    return only.length if isinstance(only, Clamped) and length == poly(only) else length


def divide_lengths(total: list[Poly], parts: list[Poly]) -> Poly | None:
    """product(total) / product(parts) when it comes out even."""
    total, parts = list(total), list(parts)
    for part in list(parts):
        if part in total:
            total.remove(part)
            parts.remove(part)
    return product(total).divided_by(product(parts))


def reshape_target(sg: SymbolicGraph, node: gs.Node) -> Shape:
    """The shape that a Reshape gives, with 0 and -1 resolved."""
    source = sg.known_shape(node.inputs[0], node)
    given = sg.partial_integers(node.inputs[1])
    if given is None:
        raise Stuck(node, "the shape it is given cannot be followed")
    wanted = [sg.open_length(node.outputs[0], i) if n is None else n for i, n in enumerate(given)]
    allow_zero = int(node.attrs.get("allowzero", 0))
    lengths = [source[i] if n.value == 0 and not allow_zero and i < len(source) else n for i, n in enumerate(wanted)]
    free = [i for i, n in enumerate(lengths) if n.value == -1]
    if len(free) == 1:
        rest = None if None in given else divide_lengths(list(source), [n for i, n in enumerate(lengths) if i != free[0]])
        lengths[free[0]] = sg.open_length(node.outputs[0], free[0]) if rest is None else rest
    return tuple(lengths)


def slices(sg: SymbolicGraph, node: gs.Node) -> dict[int, tuple[Poly, Poly, int]]:
    """For each sliced axis: first position, length of the result, step."""
    source = sg.known_shape(node.inputs[0], node)
    if len(node.inputs) < 3:
        raise Stuck(node, "a Slice with attributes (opset < 10) is not followed")
    starts, ends = sg.integers(node.inputs[1]), sg.integers(node.inputs[2])
    axes, steps = (
        sg.constant_integers(node.inputs[i]) if len(node.inputs) > i and node.inputs[i].name else default
        for i, default in ((3, tuple(range(len(source)))), (4, (1,) * len(source)))
    )
    if starts is None or ends is None or axes is None or steps is None:
        raise Stuck(node, "the bounds of its Slice are not known")
    out: dict[int, tuple[Poly, Poly, int]] = {}
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[k] + (len(source) if axes[k] < 0 else 0)
        step = steps[k]
        out[axis] = (*_bounds(sg, node, axis, source[axis], start, end, step), step)
    return out


def _bounds(sg: SymbolicGraph, node: gs.Node, axis: int, length: Poly, start: Poly, end: Poly, step: int) -> tuple[Poly, Poly]:
    first, last = (_position(p, length) for p in (start, end))
    if length.value is not None and first.value is not None and last.value is not None:
        taken = range(*slice(start.value, end.value, step).indices(length.value))
        return const(taken.start), const(len(taken))
    if step == 1 and is_nonnegative(first) and is_nonnegative(last - first) and is_nonnegative(length - last):
        return first, last - first
    if step == 1 and first.value == 0 and is_nonnegative(last) and (length.value or 0) > 1:
        return first, poly(Clamped(last, length.value or 0))
    # A few entries of an axis of open length: they meet a longer axis by being repeated, and are never taken to be as many.
    few = (last - first).value is not None
    return first, sg.open_length(node.outputs[0], axis, repeated=few)


def _position(p: Poly, length: Poly) -> Poly:
    """A bound of a Slice as a position in 0 .. length."""
    if p.value is not None:
        if p.value >= _UNBOUNDED:
            return length
        if p.value <= -_UNBOUNDED:
            return const(0)
        return length + p.value if p.value < 0 else p
    return p if is_nonnegative(p) else length + p if is_nonnegative(-p - 1) else p


def squeezed_axes(sg: SymbolicGraph, node: gs.Node) -> set[int]:
    """Axes of the input that a Squeeze takes out."""
    a = sg.known_shape(node.inputs[0], node)
    if "axes" in node.attrs or len(node.inputs) > 1:
        return {x + len(a) if x < 0 else x for x in axes_of(sg, node)}
    if any(n.value is None for n in a):
        raise Stuck(node, "a Squeeze without axes of open lengths is not followed")
    return {i for i, n in enumerate(a) if n.value == 1}


def unsqueezed_axes(sg: SymbolicGraph, node: gs.Node, rank: int) -> set[int]:
    """Axes of the result (which has `rank` axes) that an Unsqueeze puts in."""
    return {x + rank if x < 0 else x for x in axes_of(sg, node)}


def axes_of(sg: SymbolicGraph, node: gs.Node) -> tuple[int, ...]:
    """The axes of a node, an attribute or (in newer opsets) its second input, as they are written."""
    if "axes" in node.attrs:
        return tuple(int(x) for x in node.attrs["axes"])
    axes = sg.constant_integers(node.inputs[1])
    if axes is None:
        raise Stuck(node, "its axes are not constant")
    return axes


def shape_window(node: gs.Node) -> slice:
    """The axes that a Shape node reports."""
    end = node.attrs.get("end")
    return slice(int(node.attrs.get("start", 0)), None if end is None else int(end))


def split_sizes(sg: SymbolicGraph, node: gs.Node) -> tuple[Poly, ...]:
    """Lengths of the pieces of a Split along its axis."""
    if "split" in node.attrs:
        return tuple(const(int(n)) for n in node.attrs["split"])
    if len(node.inputs) > 1 and node.inputs[1].name:
        sizes = sg.integers(node.inputs[1])
        if sizes is None:
            raise Stuck(node, "the lengths of its pieces cannot be followed")
        return sizes
    a = sg.known_shape(node.inputs[0], node)
    total = a[axis_of(node, len(a))].value
    pieces = int(node.attrs.get("num_outputs", len(node.outputs)))
    if total is None:
        raise Stuck(node, "it splits an axis of open length")
    size = -(-total // pieces)
    return tuple(const(min(size, total - size * k)) for k in range(pieces))
