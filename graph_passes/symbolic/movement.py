"""Operators that only carry elements elsewhere (Reshape, Transpose, Expand, Slice ...): which input element an output element is a copy of.

The same rules serve masks and the layouts of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from graph_passes.symbolic import arguments
from graph_passes.symbolic.graph import Either, Shape, Stuck, SymbolicGraph, is_standard
from graph_passes.symbolic.poly import Dim, Poly, const, floordiv, is_nonnegative, poly, product, rejoined, remainder

__all__ = ["broadcast_index", "move", "regrouped"]


def broadcast_index(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape, out: Shape | None = None) -> Shape:
    """The index into an operand that the index of a broadcast result reads."""
    shape = sg.known_shape(tensor, node)
    out = sg.known_shape(node.outputs[0], node) if out is None else out
    at: list[Poly] = []
    for k, length in enumerate(shape):
        axis = k - len(shape) + len(index)
        if length.value == 1:
            at.append(const(0))
        elif out[axis] in (length, arguments.unclamped(length)) or (length.value or 0) > 1:
            at.append(index[axis])
        else:
            why = f"it cannot be told whether axis {k} of {tensor.name} (length {length}) is repeated to length {out[axis]}"
            more = out[axis] - length
            if _is_name(length) and _is_name(more):
                # n entries meet n + m: nothing is repeated (m = 0), or the one entry is (n = 1).
                raise Either(node, why, ((_name(more), 0), (_name(length), 1)))
            raise Stuck(node, why)
    return tuple(at)


def _is_name(length: Poly) -> bool:
    return len(length.symbols) == 1 and length == poly(_name(length)) and isinstance(_name(length), Dim)


def _name(length: Poly) -> Dim:
    return next(iter(length.symbols))  # type: ignore[return-value]


def move(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape] | None:
    """The tensor and index that an output element is a copy of; None when the operator computes rather than moves."""
    rule = _MOVES.get(node.op) if is_standard(node) else None
    return None if rule is None else rule(sg, node, tensor, index)


def _identity(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    return node.inputs[0], index


def _reshape(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    source, target = sg.known_shape(node.inputs[0], node), sg.known_shape(tensor, node)
    return node.inputs[0], _regroup(node, source, target, index)


def _regroup(node: gs.Node, source: Shape, target: Shape, index: Shape) -> Shape:
    """Index of the same element in row-major order: axes are matched in the smallest groups of equal size."""
    at: list[Poly] = []
    i = j = 0
    while i < len(source) or j < len(target):
        if i < len(source) and source[i].value == 1 and (j >= len(target) or target[j].value != 1):
            at.append(const(0))
            i += 1
            continue
        if j < len(target) and target[j].value == 1 and (i >= len(source) or source[i].value != 1):
            j += 1
            continue
        a, b = i, j
        i, j = i + 1, j + 1
        while True:
            inner, outer = list(source[a:i]), list(target[b:j])
            size = arguments.divide_lengths(outer, inner)
            if size is not None and size.value == 1:
                break
            if size is not None and i < len(source):
                i += 1
            elif arguments.divide_lengths(inner, outer) is not None and j < len(target):
                j += 1
            elif i < len(source) and j < len(target):
                i, j = i + 1, j + 1
            else:
                raise Stuck(
                    node, f"it regroups axes ({', '.join(map(str, source))}) to ({', '.join(map(str, target))}), which cannot be followed"
                )
        linear = const(0)
        for length, position in zip(target[b:j], index[b:j], strict=True):
            linear = linear * length + position
        linear = rejoined(linear)
        for axis in range(a, i):
            whole = floordiv(linear, product(source[axis + 1 : i]))
            at.append(whole if axis == a else remainder(whole, source[axis]))
    return tuple(at)


def regrouped(node: gs.Node, source: Shape, target: Shape, index: Shape) -> Shape:
    """Index, in axes of the lengths `source`, of the element that stands at `index` in axes of the lengths `target`, both in
    row-major order.

    Raises:
        Stuck: the lengths do not tell.
    """
    return _regroup(node, source, target, index)


def _flatten(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    source, target = sg.known_shape(node.inputs[0], node), sg.known_shape(tensor, node)
    return node.inputs[0], _regroup(node, source, target, index)


def _transpose(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    perm = [int(p) for p in node.attrs.get("perm") or range(len(index))[::-1]]
    return node.inputs[0], tuple(index[perm.index(k)] for k in range(len(index)))


def _unsqueeze(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    new = arguments.unsqueezed_axes(sg, node, len(index))
    return node.inputs[0], tuple(k for i, k in enumerate(index) if i not in new)


def _squeeze(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    gone = arguments.squeezed_axes(sg, node)
    rest = iter(index)
    return node.inputs[0], tuple(const(0) if i in gone else next(rest) for i in range(len(sg.known_shape(node.inputs[0]))))


def _expand(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    return node.inputs[0], broadcast_index(sg, node, node.inputs[0], index, sg.known_shape(tensor, node))


def _tile(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    source, target = sg.known_shape(node.inputs[0], node), sg.known_shape(tensor, node)
    return node.inputs[0], tuple(k if n == whole else remainder(k, n) for k, n, whole in zip(index, source, target, strict=True))


def _slice(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    at = list(index)
    for axis, (first, _, step) in arguments.slices(sg, node).items():
        if not is_nonnegative(first):
            raise Stuck(node, f"its start {first} on axis {axis} is not known to be >= 0")
        at[axis] = first + index[axis] * step
    return node.inputs[0], tuple(at)


def _concat(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape] | None:
    """A copy of one input when the position along the joined axis tells which."""
    axis = arguments.axis_of(node, len(index))
    position = index[axis]
    for part in node.inputs:
        length = sg.known_shape(part, node)[axis]
        if is_nonnegative(length - 1 - position):
            return part, (*index[:axis], position, *index[axis + 1 :])
        position = position - length
        if not is_nonnegative(position):
            return None
    return None


def _split(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    axis = arguments.axis_of(node, len(index))
    which = next(i for i, t in enumerate(node.outputs) if t is tensor)
    offset = sum(arguments.split_sizes(sg, node)[:which], start=const(0))
    return node.inputs[0], (*index[:axis], index[axis] + offset, *index[axis + 1 :])


_MOVES: dict[str, Callable[[SymbolicGraph, gs.Node, gs.Tensor, Shape], tuple[gs.Tensor, Shape] | None]] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
}
