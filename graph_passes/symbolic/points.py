"""Value rules: the element of a node's output at an index, from elements of its inputs.

`move` covers operators that only carry elements elsewhere (Reshape, Transpose, Expand, Slice ...); the same rule serves masks and the layouts of
queries, keys and values. Comparisons, logic and integer arithmetic are exact; whatever has no rule is a `Load`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic import shapes
from graph_passes.symbolic.graph import Shape, Stuck, SymbolicGraph, is_standard, producer
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
from graph_passes.symbolic.poly import Load, Poly, const, floordiv, is_nonnegative, product, remainder

__all__ = ["broadcast_index", "move", "value"]

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
        found = _constant(array, index)
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


def broadcast_index(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape, out: Shape | None = None) -> Shape:
    """The index into an operand that the index of a broadcast result reads."""
    shape = sg.known_shape(tensor, node)
    out = sg.known_shape(node.outputs[0], node) if out is None else out
    at: list[Poly] = []
    for k, length in enumerate(shape):
        axis = k - len(shape) + len(index)
        if length.value == 1:
            at.append(const(0))
        elif length == out[axis] or (length.value or 0) > 1:
            at.append(index[axis])
        else:
            raise Stuck(node, f"it cannot be told whether axis {k} of {tensor.name} (length {length}) is repeated to length {out[axis]}")
    return tuple(at)


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
            size = shapes.divide_lengths(outer, inner)
            if size is not None and size.value == 1:
                break
            if size is not None and i < len(source):
                i += 1
            elif shapes.divide_lengths(inner, outer) is not None and j < len(target):
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
        for axis in range(a, i):
            whole = floordiv(linear, product(source[axis + 1 : i]))
            at.append(whole if axis == a else remainder(whole, source[axis]))
    return tuple(at)


def _flatten(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    source, target = sg.known_shape(node.inputs[0], node), sg.known_shape(tensor, node)
    return node.inputs[0], _regroup(node, source, target, index)


def _transpose(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    perm = [int(p) for p in node.attrs.get("perm") or range(len(index))[::-1]]
    return node.inputs[0], tuple(index[perm.index(k)] for k in range(len(index)))


def _unsqueeze(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    new = shapes.unsqueezed_axes(sg, node, len(index))
    return node.inputs[0], tuple(k for i, k in enumerate(index) if i not in new)


def _squeeze(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    gone = shapes.squeezed_axes(sg, node)
    rest = iter(index)
    return node.inputs[0], tuple(const(0) if i in gone else next(rest) for i in range(len(sg.known_shape(node.inputs[0]))))


def _expand(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    return node.inputs[0], broadcast_index(sg, node, node.inputs[0], index, sg.known_shape(tensor, node))


def _slice(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape]:
    at = list(index)
    for axis, (first, _, step) in shapes.slices(sg, node).items():
        if not is_nonnegative(first):
            raise Stuck(node, f"its start {first} on axis {axis} is not known to be >= 0")
        at[axis] = first + index[axis] * step
    return node.inputs[0], tuple(at)


def _concat(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor, index: Shape) -> tuple[gs.Tensor, Shape] | None:
    """A copy of one input when the position along the joined axis tells which."""
    axis = shapes.axis_of(node, len(index))
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
    axis = shapes.axis_of(node, len(index))
    which = next(i for i, t in enumerate(node.outputs) if t is tensor)
    offset = sum(shapes.split_sizes(sg, node)[:which], start=const(0))
    return node.inputs[0], (*index[:axis], index[axis] + offset, *index[axis + 1 :])


_MOVES: dict[str, Callable[[SymbolicGraph, gs.Node, gs.Tensor, Shape], tuple[gs.Tensor, Shape] | None]] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
}


def _constant(array: np.ndarray, index: Shape) -> Value | None:
    """Element of an array: at a fixed index, of a uniform array, of a progression, or of a two-valued triangle."""
    fixed = tuple(k.value if k.value is not None else slice(None) for k in index)
    try:
        part = array[fixed]
    except IndexError:
        return None
    free = [k for k in index if k.value is None]
    if part.size == 0:
        return None
    first = _element(part.reshape(-1)[0])
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
    return ite(less_equal(free[1] - free[0] - diagonal), _element(low), _element(high))


def _element(x: np.generic) -> Value:
    if x.dtype.kind == "b":
        return bool(x)
    return const(int(x)) if x.dtype.kind in "iu" else float(x)


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
    return 0.0 if fill is None else _element(np.asarray(fill.values).reshape(-1)[0])


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
