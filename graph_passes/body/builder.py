"""A small builder for ONNX function bodies: values with operators, so that a body reads like the NumPy reference.

Integers are int64 tensors of shape [1] (a dimension can then be used in arithmetic and in a shape alike), truth values are
bool, all other numbers are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["Builder", "Value"]

PREFIX = "__sa_"

_REFERENCE_KINDS = {"FLOAT": ("value_float", "f"), "FLOATS": ("value_floats", "f"), "INT": ("value_int", "i")}


class Value:
    """A named tensor inside a body. `kind` is `i` (int64), `f` (float32), `b` (bool) or `t` (the type of the query)."""

    def __init__(self, builder: Builder, name: str, kind: str) -> None:
        self.builder = builder
        self.name = name
        self.kind = kind

    def _binary(self, op: str, other: Value | float, kind: str | None = None, swap: bool = False) -> Value:
        pair = (self, self.builder.constant(other, self.kind))
        return self.builder.node(op, *(reversed(pair) if swap else pair), kind=kind or self.kind)

    def __add__(self, other: Value | float) -> Value:
        return self._binary("Add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("Sub", other)

    def __rsub__(self, other: float) -> Value:
        return self._binary("Sub", other, swap=True)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("Mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("Div", other)

    def __floordiv__(self, other: Value | float) -> Value:
        """Integer division; ONNX truncates, so the dividend must not be negative."""
        return self._binary("Div", other)

    def __mod__(self, other: Value | float) -> Value:
        """Integer modulus with the sign of the divisor, as in Python."""
        return self._binary("Mod", other)

    def __lt__(self, other: Value | float) -> Value:
        return self._binary("Less", other, "b")

    def __le__(self, other: Value | float) -> Value:
        return self._binary("LessOrEqual", other, "b")

    def __gt__(self, other: Value | float) -> Value:
        return self._binary("Greater", other, "b")

    def __ge__(self, other: Value | float) -> Value:
        return self._binary("GreaterOrEqual", other, "b")

    def __and__(self, other: Value | None) -> Value:
        return self if other is None else self._binary("And", other)

    def __or__(self, other: Value) -> Value:
        return self._binary("Or", other)

    def __invert__(self) -> Value:
        return self.builder.node("Not", self, kind="b")

    def ceil_div(self, other: Value) -> Value:
        return (self + other - 1) // other

    def minimum(self, other: Value | float) -> Value:
        return self._binary("Min", other)

    def maximum(self, other: Value | float) -> Value:
        return self._binary("Max", other)

    def to_float(self) -> Value:
        return self.builder.node("Cast", self, kind="f", to=TensorProto.FLOAT)

    def to_int(self) -> Value:
        return self.builder.node("Cast", self, kind="i", to=TensorProto.INT64)

    def to_bool(self) -> Value:
        return self.builder.node("Cast", self, kind="b", to=TensorProto.BOOL)

    def reshape(self, *dims: Value | int) -> Value:
        return self.builder.node("Reshape", self, self.builder.shape(dims), kind=self.kind)

    def expand(self, *dims: Value | int) -> Value:
        return self.builder.node("Expand", self, self.builder.shape(dims), kind=self.kind)

    def unsqueeze(self, *axes: int) -> Value:
        return self.builder.node("Unsqueeze", self, self.builder.ints(*axes), kind=self.kind)

    def transpose(self, *perm: int) -> Value:
        return self.builder.node("Transpose", self, kind=self.kind, perm=perm)

    def gather(self, indices: Value, axis: int) -> Value:
        return self.builder.node("Gather", self, indices, kind=self.kind, axis=axis)

    def slice(self, axis: int, start: Value | int, end: Value | int) -> Value:
        at = [self.builder.constant(x, "i") for x in (start, end, axis)]
        return self.builder.node("Slice", self, *at, kind=self.kind)

    def pad_end(self, axis: int, count: Value) -> Value:
        """Zeros (false) appended along an axis."""
        pads = self.builder.node("Concat", self.builder.ints(0), count, kind="i", axis=0)
        inputs = [self, pads, None, self.builder.ints(axis)]
        if self.kind == "b":  # Pad takes bool only in part of its implementations
            inputs[0] = self.to_int()
            return self.builder.node("Pad", *inputs, kind="i").to_bool()
        return self.builder.node("Pad", *inputs, kind=self.kind)

    def sum(self, *axes: int, keepdims: bool = False) -> Value:
        return self._reduce("ReduceSum", axes, keepdims)

    def max(self, *axes: int, keepdims: bool = False) -> Value:
        return self._reduce("ReduceMax", axes, keepdims)

    def min(self, *axes: int, keepdims: bool = False) -> Value:
        return self._reduce("ReduceMin", axes, keepdims)

    def _reduce(self, op: str, axes: Sequence[int], keepdims: bool) -> Value:
        return self.builder.node(op, self, self.builder.ints(*axes), kind=self.kind, keepdims=int(keepdims))


class Builder:
    """Collects the nodes of one function; every name begins with the project's prefix."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._seen: dict[bytes, tuple[Value, ...]] = {}

    def formal(self, name: str, kind: str) -> Value:
        return Value(self, PREFIX + name, kind)

    def node(self, op: str, *inputs: Value | None, kind: str, **attributes: Any) -> Value:
        return self.nodes_of(op, *inputs, kinds=(kind,), **attributes)[0]

    def nodes_of(self, op: str, *inputs: Value | None, kinds: Sequence[str], **attributes: Any) -> tuple[Value, ...]:
        """One node with several outputs, one for each letter of `kinds`. The same node asked for twice is one node."""
        node = helper.make_node(op, ["" if value is None else value.name for value in inputs], [], **attributes)
        return self._add(node, kinds)

    def _add(self, node: onnx.NodeProto, kinds: Sequence[str]) -> tuple[Value, ...]:
        key = node.SerializeToString(deterministic=True)
        if key not in self._seen:
            stem = f"{PREFIX}{node.op_type.lower()}_{len(self.nodes)}"
            outputs = tuple(Value(self, f"{stem}_{i}" if i else stem, kind) for i, kind in enumerate(kinds))
            node.output.extend(value.name for value in outputs)
            self.nodes.append(node)
            self._seen[key] = outputs
        return self._seen[key]

    def output(self, value: Value, name: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value.name], [PREFIX + name]))

    def attribute(self, name: str, onnx_type: str) -> Value:
        """The value of a node attribute: INT as int64 [1], FLOAT as float32 scalar, FLOATS as float32 [n]."""
        field, kind = _REFERENCE_KINDS[onnx_type]
        node = helper.make_node("Constant", [], [])
        node.attribute.append(onnx.AttributeProto(name=field, ref_attr_name=name, type=onnx.AttributeProto.AttributeType.Value(onnx_type)))
        (value,) = self._add(node, kind)
        return value.reshape(1) if onnx_type == "INT" else value

    def ints(self, *values: int) -> Value:
        return self.node("Constant", kind="i", value_ints=values)

    def constant(self, value: Value | float, kind: str) -> Value:
        if isinstance(value, Value):
            return value
        return self.ints(int(value)) if kind == "i" else self.node("Constant", kind="f", value_float=float(value))

    def shape(self, dims: Sequence[Value | int]) -> Value:
        if all(isinstance(dim, int) for dim in dims):
            return self.ints(*dims)  # type: ignore[arg-type]
        return self.node("Concat", *(self.constant(dim, "i") for dim in dims), kind="i", axis=0)

    def dim(self, value: Value, axis: int) -> Value:
        return self.node("Shape", value, kind="i", start=axis, end=axis + 1)

    def dims(self, *values: Value) -> list[list[Value]]:
        """The dimensions of each 4-D value, of hidden rank: `dims(q)[0][2]` is the third of the first."""
        sizes = [self.node("Shape", value, kind="i") for value in values]
        hidden = self.of_hidden_rank(self.concat(*sizes, axis=0))
        return [[hidden.gather(self.ints(4 * i + axis), axis=0) for axis in range(4)] for i in range(len(values))]

    def arange(self, count: Value) -> Value:
        """[count] 0, 1, ... of hidden rank."""
        scalars = [self.node("Squeeze", self.constant(x, "i"), kind="i") for x in (0, count, 1)]
        return self.of_hidden_rank(self.node("Range", *scalars, kind="i"))

    def of_hidden_rank(self, value: Value) -> Value:
        """The same tensor, of a rank that shape inference cannot see; nor can it see that of anything computed from it.

        ONNX Runtime's memory planner compares the shape of every value with those of all dead ones. Shapes with unknown dimensions never
        match, so that loading would take time quadratic in the number of nodes: minutes for tens of layers. Values without a shape are
        passed over.
        """
        some = self.node("Squeeze", self.dim(self.formal("query", "t"), 0), kind="i")
        nothing = self.node("Range", some, some, self.node("Squeeze", self.ints(1), kind="i"), kind="i")
        shape = self.node("Concat", self.node("Shape", value, kind="i"), nothing, kind="i", axis=0)
        return self.node("Reshape", value, shape, kind=value.kind)

    def where(self, condition: Value, yes: Value | float, no: Value | float) -> Value:
        kind = yes.kind if isinstance(yes, Value) else no.kind if isinstance(no, Value) else "f"
        return self.node("Where", condition, self.constant(yes, kind), self.constant(no, kind), kind=kind)

    def cumulative(self, x: Value, exclusive: bool = False) -> Value:
        """Cumulative sum over the last axis."""
        last = self.node("Constant", kind="i", value_int=-1)
        return self.node("CumSum", x, last, kind=x.kind, exclusive=int(exclusive))

    def matmul(self, a: Value, b: Value) -> Value:
        return self.node("MatMul", a, b, kind="f")

    def softmax(self, x: Value) -> Value:
        return self.node("Softmax", x, kind="f", axis=-1)

    def concat(self, *values: Value, axis: int) -> Value:
        return self.node("Concat", *values, kind=values[0].kind, axis=axis)

    def split(self, value: Value, sizes: Value, parts: int) -> tuple[Value, ...]:
        """Along axis 0."""
        return self.nodes_of("Split", value, sizes, kinds=value.kind * parts, axis=0)
