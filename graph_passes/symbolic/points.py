"""The element of a tensor at an index, followed through the nodes that make it; whatever has no rule is a `Load`.

Here are the rules of operators that look elements up at other indices or make them of lengths; `elementwise` has the others, and
`movement` what only moves elements.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic import arguments
from graph_passes.symbolic.constants import element, element_at
from graph_passes.symbolic.elementwise import ELEMENTWISE, is_float
from graph_passes.symbolic.graph import Shape, SymbolicGraph, is_standard, producer
from graph_passes.symbolic.logic import (
    Equal,
    Formula,
    LessEqual,
    Not,
    Value,
    atoms,
    choose,
    conjunction,
    ite,
    less_equal,
    number,
    truth,
)
from graph_passes.symbolic.movement import move
from graph_passes.symbolic.poly import Poly, const, is_nonnegative, product

__all__ = ["value"]


def value(sg: SymbolicGraph, tensor: gs.Tensor, index: Shape) -> Value:
    """The element of `tensor` at `index`.

    Raises:
        Stuck: an index cannot be followed through an operator on the way.
    """
    array = sg.array(tensor)
    if array is not None:
        found = element_at(array, index)
        return sg.load(tensor, index) if found is None else found
    node = producer(tensor)
    if node is None or not is_standard(node) or tensor.name in sg.opaque:
        return sg.load(tensor, index)
    moved = move(sg, node, tensor, index)
    if moved is not None:
        return sg.value(*moved)
    rule = _RULES.get(node.op)
    found = rule(sg, node, index) if rule is not None else None
    if found is None:
        return sg.load(tensor, index)
    if isinstance(found, (LessEqual, Equal, Not)):
        for atom in atoms(found):
            sg.origin.setdefault(atom, node)
    return found


def _shape(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    lengths = sg.known_shape(node.inputs[0], node)[arguments.shape_window(node)]
    return lengths[index[0].value] if index[0].value is not None else None


def _size(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value:
    return product(sg.known_shape(node.inputs[0], node))


def _range(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    start, delta = number(sg.value(node.inputs[0], ())), number(sg.value(node.inputs[2], ()))
    return start + delta * index[0] if isinstance(start, Poly) and isinstance(delta, Poly) else None


def _constant_of_shape(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value:
    fill = node.attrs.get("value")
    return 0.0 if fill is None else element(np.asarray(fill.values).reshape(-1)[0])


def _gather(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    data, indices = node.inputs[:2]
    axis = arguments.axis_of(node, len(sg.known_shape(data, node)))
    depth = len(sg.known_shape(indices, node))
    at = _position(sg, node, sg.value(indices, index[axis : axis + depth]), sg.known_shape(data, node)[axis])
    return None if at is None else sg.value(data, (*index[:axis], at, *index[axis + depth :]))


def _gather_nd(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    data, indices = node.inputs[:2]
    batch = int(node.attrs.get("batch_dims", 0))
    shape, rows = sg.known_shape(data, node), sg.known_shape(indices, node)
    if rows[-1].value is None:
        return None
    at: list[Poly] = []
    for k in range(rows[-1].value):
        found = _position(sg, node, sg.value(indices, (*index[: len(rows) - 1], const(k))), shape[batch + k])
        if found is None:
            return None
        at.append(found)
    return sg.value(data, (*index[:batch], *at, *index[len(rows) - 1 :]))


def _position(sg: SymbolicGraph, node: gs.Node, v: Value, length: Poly) -> Poly | None:
    """A looked-up position counted from the front; None when its sign is open."""
    v = number(v)
    if not isinstance(v, Poly):
        return None
    if is_nonnegative(v):
        return v
    return length + v if is_nonnegative(-v - 1) else None


def _gather_elements(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    data, indices = node.inputs[:2]
    axis = arguments.axis_of(node, len(index))
    at = _position(sg, node, sg.value(indices, index), sg.known_shape(data, node)[axis])
    return None if at is None else sg.value(data, (*index[:axis], at, *index[axis + 1 :]))


def _concat(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """The element of the first piece that the position lies in, where `move` cannot tell which that is."""
    axis = arguments.axis_of(node, len(index))
    lengths = [sg.known_shape(t, node)[axis] for t in node.inputs]
    *starts, _ = accumulate(lengths, initial=const(0))
    is_bool = sg.dtype(node.inputs[0]) == onnx.TensorProto.BOOL
    found: Value | None = None
    for part, start, length in reversed(list(zip(node.inputs, starts, lengths, strict=True))):
        at = const(0) if length.value == 1 else index[axis] - start
        element = sg.value(part, (*index[:axis], at, *index[axis + 1 :]))
        inside = less_equal(index[axis] - start - length + 1)
        if found is None:
            found = element
        elif is_bool:
            found = choose(inside, truth(element), truth(found))
        else:
            found = ite(inside, number(element), number(found))
    return found


def _trilu(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    diagonal = number(sg.value(node.inputs[1], ())) if len(node.inputs) > 1 and node.inputs[1].name else const(0)
    if not isinstance(diagonal, Poly):
        return None
    row, column = index[-2:]
    kept = sg.value(node.inputs[0], index)
    upper = int(node.attrs.get("upper", 1))
    inside = less_equal(row + diagonal - column) if upper else less_equal(column - row - diagonal)
    zero: Value = 0.0 if is_float(sg, node) else const(0)
    if sg.dtype(node.inputs[0]) == onnx.TensorProto.BOOL:
        return conjunction(inside, truth(kept))
    return ite(inside, number(kept), zero)


def _cumsum(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """A running sum of a whole constant: constant * (position + 1)."""
    axis = sg.constant_integers(node.inputs[1])
    if axis is None or node.attrs.get("reverse"):
        return None
    k = axis[0] + len(index) if axis[0] < 0 else axis[0]
    step = number(sg.value(node.inputs[0], index))
    if isinstance(step, float) and step.is_integer():
        step = const(int(step))
    if not isinstance(step, Poly) or step.value is None:
        return None
    return (index[k] + (0 if node.attrs.get("exclusive") else 1)) * step


def _scatter_nd(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """An assignment to a region that begins at 0 on every axis (`x[:, :, :, :n] = updates`): its indices are its own positions."""
    data, indices, updates = node.inputs
    rows, lengths = sg.known_shape(indices, node), sg.known_shape(updates, node)
    if node.attrs.get("reduction", "none") != "none" or rows[-1].value != len(index) or len(lengths) != len(index):
        return None
    inside: Formula = True
    shape = sg.known_shape(data, node)
    for k, (at, written, whole) in enumerate(zip(index, lengths, shape, strict=True)):
        position = number(sg.value(indices, (*index, const(k))))
        if position != at:
            return None
        if written != whole:
            inside = conjunction(inside, less_equal(at - written + 1))
    then, other = sg.value(updates, index), sg.value(data, index)
    if inside is True:
        return then
    return (
        choose(inside, truth(then), truth(other)) if sg.dtype(data) == onnx.TensorProto.BOOL else ite(inside, number(then), number(other))
    )


_RULES: dict[str, Callable[[SymbolicGraph, gs.Node, Shape], Value | None]] = {
    **ELEMENTWISE,
    "Shape": _shape,
    "Size": _size,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Concat": _concat,
    "Trilu": _trilu,
    "CumSum": _cumsum,
    "ScatterND": _scatter_nd,
}
