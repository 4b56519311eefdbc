"""Value rules of elementwise operators: arithmetic, comparisons, logic, choices and casts of elements at one index.

Comparisons, logic and integer arithmetic are exact; floats are followed where they are constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic.graph import Shape, SymbolicGraph, is_standard, producer
from graph_passes.symbolic.logic import (
    Formula,
    Ite,
    Value,
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
from graph_passes.symbolic.poly import Load, Poly, const, floordiv, is_nonnegative, remainder

__all__ = ["ELEMENTWISE", "is_float"]

_FLOATS = frozenset(getattr(onnx.TensorProto, n) for n in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))
_INTEGERS = frozenset(getattr(onnx.TensorProto, n) for n in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"))
_WIDE = frozenset(getattr(onnx.TensorProto, n) for n in ("INT32", "INT64", "UINT32", "UINT64", "FLOAT", "DOUBLE"))
"""Types that hold every length and position exactly; float16 stops at 2048."""


def _operands(sg: SymbolicGraph, node: gs.Node, index: Shape) -> list[Value]:
    return [sg.value(t, broadcast_index(sg, node, t, index)) for t in node.inputs]


def is_float(sg: SymbolicGraph, node: gs.Node) -> bool:
    """Whether the first input of a node is of a real type."""
    return sg.dtype(node.inputs[0]) in _FLOATS


def _is_unknown_real(sg: SymbolicGraph, v: Value) -> bool:
    """An element of a float tensor of which nothing is known: the rules for integers do not hold for it."""
    if isinstance(v, Ite):
        return _is_unknown_real(sg, v.then) or _is_unknown_real(sg, v.other)
    return isinstance(v, Poly) and any(isinstance(s, Load) and sg.dtype(sg.tensors[s.tensor]) not in _INTEGERS for s in v.symbols)


def _arithmetic(op: Callable[[Value, Value, bool], Value | None]) -> Callable[[SymbolicGraph, gs.Node, Shape], Value | None]:
    def rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
        real = is_float(sg, node)
        values = [number(v) for v in _operands(sg, node, index)]
        if real and any(_is_unknown_real(sg, v) for v in values):
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


def _inverted(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    """`1 - m` of an integer input m that is cast to a real type: 0 where m is not 0, 1 where it is; the same of `m * f` for f of 0 and 1.

    That m holds only 0 and 1 (a mask; a number of a token or a position is not taken from 1) is noted in `sg.taken_as_flags`.
    """
    one, flags = node.inputs
    if not is_float(sg, node) or sg.scalar(one) != 1:
        return None
    tensor, at = flags, broadcast_index(sg, node, flags, index)
    kept: Formula = True
    while tensor.name not in sg.inputs:
        maker = producer(tensor)
        if maker is None or not is_standard(maker):
            return None
        if maker.op == "Mul":
            sides = [(t, broadcast_index(sg, maker, t, at)) for t in maker.inputs]
            known = [_flag(sg.value(*side)) for side in sides]
            if known[0] is None and known[1] is None:
                return None
            which = 0 if known[0] is not None else 1
            kept = conjunction(kept, known[which])  # type: ignore[arg-type]
            tensor, at = sides[1 - which]
            continue
        moved = (maker.inputs[0], at) if maker.op in ("Cast", "CastLike") else move(sg, maker, tensor, at)
        if moved is None:
            return None
        tensor, at = moved
    if sg.dtype(tensor) not in _INTEGERS:
        return None
    sg.taken_as_flags.add(tensor.name)
    return ite(conjunction(kept, negation(equal(sg.load(tensor, at)))), 0.0, 1.0)


def _flag(v: Value) -> Formula | None:
    """For a value that is 0 or 1: whether it is 1."""
    v = number(v)
    if isinstance(v, Ite):
        then, other = _flag(v.then), _flag(v.other)
        return None if then is None or other is None else choose(v.condition, then, other)
    real = _real(v)
    return real == 1 if real in (0, 1) else None


def _sub_rule(sg: SymbolicGraph, node: gs.Node, index: Shape) -> Value | None:
    found = _inverted(sg, node, index)
    return _arithmetic(_sub)(sg, node, index) if found is None else found


_ABSORBS = 2.0**100
"""A float at least this large is not changed by adding any 64-bit integer."""


def _add(a: Value, b: Value, real: bool) -> Value | None:
    if isinstance(a, Poly) and isinstance(b, Poly):
        return a + b
    for whole, other in ((a, b), (b, a)):
        if isinstance(whole, Poly) and whole.value is None and isinstance(other, float):
            if abs(other) >= _ABSORBS:
                return other
            return whole + int(other) if other.is_integer() else None
    return _both_real(a, b, lambda x, y: x + y)


def _sub(a: Value, b: Value, real: bool) -> Value | None:
    return None if not isinstance(b, (Poly, float)) else _add(a, -b, real)


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
        if is_float(sg, node) and (_is_unknown_real(sg, a) or _is_unknown_real(sg, b)):
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
    for whole, other in ((a, b), (b, a)):
        if isinstance(whole, Poly) and isinstance(other, float):
            return equal(whole - int(other)) if other.is_integer() else False
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
    from_real = is_float(sg, node)
    if from_real and _is_unknown_real(sg, source):
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


ELEMENTWISE: dict[str, Callable[[SymbolicGraph, gs.Node, Shape], Value | None]] = {
    "Add": _arithmetic(_add),
    "Sum": _arithmetic(_add),
    "Sub": _sub_rule,
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
    "CastLike": _cast,
}
"""By the name of the operator; None for an element that a rule cannot tell."""
