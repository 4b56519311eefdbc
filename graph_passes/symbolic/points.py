"""Value rules: the element of a node's output at an index, from elements of its inputs.

Comparisons, logic and integer arithmetic are exact; whatever has no rule is a `Load`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic import shapes
from graph_passes.symbolic.constants import element, element_at
from graph_passes.symbolic.graph import Shape, SymbolicGraph, is_standard, producer
from graph_passes.symbolic.logic import (
    Equal,
    Formula,
    Ite,
    LessEqual,
    Not,
    Value,
    atoms,
    choose,
    conjunction,
    disjunction,
    equal,
    ite,
    less_equal,
    lift,
    negation,
    number,
    truth,
)
from graph_passes.symbolic.movement import broadcast_index, move
from graph_passes.symbolic.poly import Load, Poly, const, floordiv, is_nonnegative, product, remainder

__all__ = ["value"]

_FLOATS = frozenset(getattr(onnx.TensorProto, n) for n in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))
_WIDE = frozenset(getattr(onnx.TensorProto, n) for n in ("INT32", "INT64", "UINT32", "UINT64", "FLOAT", "DOUBLE"))
"""Types that hold every length and position exactly; float16 stops at 2048."""


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
    if node is None or not is_standard(node):
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


def _operands(sg: SymbolicGraph, node: gs.Node, index: Shape) -> list[Value]:
    return [sg.value(t, broadcast_index(sg, node, t, index)) for t in node.inputs]


def _is_float(sg: SymbolicGraph, node: gs.Node) -> bool:
    return sg.dtype(node.inputs[0]) in _FLOATS


def _is_unknown_real(v: Value) -> bool:
    """An element of a float tensor of which nothing is known: the rules for integers do not hold for it."""
    if isinstance(v, Ite):
        return _is_unknown_real(v.then) or _is_unknown_real(v.other)
    return isinstance(v, Poly) and any(isinstance(s, Load) for s in v.symbols)


def _arithmetic(op: Callable[[Value, Value, bool], Value | None]) -> Callable[[SymbolicGraph, gs.Node, Shape], Value | None]:
    def rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
        real = _is_float(sg, node)
        values = [number(v) for v in _operands(sg, node, index)]
        if real and any(_is_unknown_real(v) for v in values):
            return None
        total: Value | None = values[0]
        for v in values[1:]:
            total = None if total is None else lift(lambda x, y: op(x, y, real), total, v)
        return total

    return rule


def _real(v: Value) -> float | None:
    if isinstance(v, Poly):
        return None if v.value is None else float(v.value)
    return v if isinstance(v, float) else None


def _both_real(a: Value, b: Value, op: Callable[[float, float], float]) -> float | None:
    x, y = _real(a), _real(b)
    if x is None or y is None:
        return None
    try:
        return float(op(x, y))
    except (ZeroDivisionError, OverflowError, ValueError):
        return None


def _add(a: Value, b: Value, real: bool) -> Value | None:
    return a + b if isinstance(a, Poly) and isinstance(b, Poly) else _both_real(a, b, lambda x, y: x + y)


def _sub(a: Value, b: Value, real: bool) -> Value | None:
    return a - b if isinstance(a, Poly) and isinstance(b, Poly) else _both_real(a, b, lambda x, y: x - y)


def _mul(a: Value, b: Value, real: bool) -> Value | None:
    return a * b if isinstance(a, Poly) and isinstance(b, Poly) else _both_real(a, b, lambda x, y: x * y)


def _div(a: Value, b: Value, real: bool) -> Value | None:
    if real:
        return _both_real(a, b, lambda x, y: x / y)
    if isinstance(a, Poly) and isinstance(b, Poly) and is_nonnegative(a) and is_nonnegative(b - 1):
        return floordiv(a, b)
    return None


def _mod(a: Value, b: Value, real: bool) -> Value | None:
    if isinstance(a, Poly) and isinstance(b, Poly) and is_nonnegative(a) and is_nonnegative(b - 1) and not real:
        return remainder(a, b)
    return None


def _pow(a: Value, b: Value, real: bool) -> Value | None:
    return _both_real(a, b, math.pow) if real else None


def _max(a: Value, b: Value, real: bool) -> Value | None:
    if isinstance(a, Poly) and isinstance(b, Poly):
        return ite(less_equal(a - b), b, a)
    return _both_real(a, b, max)


def _min(a: Value, b: Value, real: bool) -> Value | None:
    if isinstance(a, Poly) and isinstance(b, Poly):
        return ite(less_equal(a - b), a, b)
    return _both_real(a, b, min)


def _unary(op: Callable[[float], float]) -> Callable[[SymbolicGraph, gs.Node, Shape], Value | None]:
    def rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
        return lift(lambda x, _: _both_real(x, 0.0, lambda v, _: op(v)), number(sg.value(node.inputs[0], index)), 0.0)

    return rule


def _neg(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    return lift(lambda x, _: -x if isinstance(x, (Poly, float)) else None, number(sg.value(node.inputs[0], index)), 0.0)


def _comparison(op: Callable[[Value, Value], Formula | None]) -> Callable[[SymbolicGraph, gs.Node, Shape], Value | None]:
    def rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
        a, b = (number(v) for v in _operands(sg, node, index))
        if _is_float(sg, node) and (_is_unknown_real(a) or _is_unknown_real(b)):
            return None
        found = lift(op, a, b)
        return None if found is None else truth(found)

    return rule


def _less_or_equal(a: Value, b: Value) -> Formula | None:
    if isinstance(a, Poly) and isinstance(b, Poly):
        return less_equal(a - b)
    x, y = _real(a), _real(b)
    return None if x is None or y is None else x <= y


def _equals(a: Value, b: Value) -> Formula | None:
    if isinstance(a, Poly) and isinstance(b, Poly):
        return equal(a - b)
    x, y = _real(a), _real(b)
    return None if x is None or y is None else x == y


def _negated(op: Callable[[Value, Value], Formula | None], swap: bool) -> Callable[[Value, Value], Formula | None]:
    def result(a: Value, b: Value) -> Formula | None:
        found = op(b, a) if swap else op(a, b)
        return None if found is None else negation(found)

    return result


def _logic(op: Callable[[Formula, Formula], Formula]) -> Callable[[SymbolicGraph, gs.Node, Shape], Value]:
    def rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value:
        a, b = (truth(v) for v in _operands(sg, node, index))
        return op(a, b)

    return rule


def _not(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value:
    return negation(truth(sg.value(node.inputs[0], index)))


def _where(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value:
    condition, then, other = _operands(sg, node, index)
    if (
        any(isinstance(v, bool) or not isinstance(v, (Poly, float)) for v in (then, other))
        and sg.dtype(node.inputs[1]) == onnx.TensorProto.BOOL
    ):
        return choose(truth(condition), truth(then), truth(other))
    return ite(truth(condition), number(then), number(other))


def _cast(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """Casts that keep an open integer as it is: to bool by truth, between wide integers, and to float and double (exact below 2**24)."""
    source = sg.value(node.inputs[0], index)
    to = sg.dtype(node.outputs[0])
    if to == onnx.TensorProto.BOOL:
        return truth(source)
    from_real = _is_float(sg, node)
    if from_real and _is_unknown_real(source):
        return None

    def convert(x: Value, _: Value) -> Value | None:
        if isinstance(x, Poly) and x.value is None:
            return x if to in _WIDE else None
        number_ = _real(x)
        if number_ is None:
            return None
        if to in _FLOATS:
            return number_
        return const(int(number_)) if math.isfinite(number_) else None

    return lift(convert, number(source), 0.0)


def _shape(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    lengths = sg.known_shape(node.inputs[0], node)[shapes.shape_window(node)]
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
    axis = shapes.axis_of(node, len(sg.known_shape(data, node)))
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
    axis = shapes.axis_of(node, len(index))
    at = _position(sg, node, sg.value(indices, index), sg.known_shape(data, node)[axis])
    return None if at is None else sg.value(data, (*index[:axis], at, *index[axis + 1 :]))


def _trilu(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    diagonal = number(sg.value(node.inputs[1], ())) if len(node.inputs) > 1 and node.inputs[1].name else const(0)
    if not isinstance(diagonal, Poly):
        return None
    row, column = index[-2:]
    kept = sg.value(node.inputs[0], index)
    upper = int(node.attrs.get("upper", 1))
    inside = less_equal(row + diagonal - column) if upper else less_equal(column - row - diagonal)
    zero: Value = 0.0 if _is_float(sg, node) else const(0)
    if sg.dtype(node.inputs[0]) == onnx.TensorProto.BOOL:
        return conjunction(inside, truth(kept))
    return ite(inside, number(kept), zero)


def _cumsum(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """A running sum of a constant: constant * (position + 1)."""
    axis = sg.constant_integers(node.inputs[1])
    if axis is None or node.attrs.get("reverse"):
        return None
    k = axis[0] + len(index) if axis[0] < 0 else axis[0]
    step = number(sg.value(node.inputs[0], index))
    if not isinstance(step, Poly) or step.value is None:
        return None
    return (index[k] + (0 if node.attrs.get("exclusive") else 1)) * step


_RULES: dict[str, Callable[[SymbolicGraph, gs.Node, Shape], Value | None]] = {
    "Add": _arithmetic(_add),
    "Sum": _arithmetic(_add),
    "Sub": _arithmetic(_sub),
    "Mul": _arithmetic(_mul),
    "Div": _arithmetic(_div),
    "Mod": _arithmetic(_mod),
    "Pow": _arithmetic(_pow),
    "Max": _arithmetic(_max),
    "Min": _arithmetic(_min),
    "Neg": _neg,
    "Sqrt": _unary(math.sqrt),
    "Reciprocal": _unary(lambda x: 1 / x),
    "LessOrEqual": _comparison(_less_or_equal),
    "GreaterOrEqual": _comparison(lambda a, b: _less_or_equal(b, a)),
    "Less": _comparison(_negated(_less_or_equal, swap=True)),
    "Greater": _comparison(_negated(_less_or_equal, swap=False)),
    "Equal": _comparison(_equals),
    "And": _logic(conjunction),
    "Or": _logic(disjunction),
    "Xor": _logic(lambda a, b: choose(a, negation(b), b)),
    "Not": _not,
    "Where": _where,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _size,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Trilu": _trilu,
    "CumSum": _cumsum,
}
