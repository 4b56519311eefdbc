"""Shape rules: the lengths of a node's outputs from those of its inputs.

Only what the specification of an operator says. An operator without a rule keeps the shape that the file declares, if it does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic.graph import MALFORMED, Shape, Stuck, SymbolicGraph, element_type, is_standard, op_names
from graph_passes.symbolic.poly import Clamped, Poly, const, is_nonnegative, poly, product

__all__ = ["axis_of", "broadcast", "divide_lengths", "infer", "reshape_target", "slices"]

_UNBOUNDED = 2**31 - 1
"""An end of a Slice at or beyond this means "to the end" (ONNX, Slice: INT_MAX or INT64_MAX)."""

_BOOL = onnx.TensorProto.BOOL
_INT64 = onnx.TensorProto.INT64

_SAME = op_names(
    "Identity Cast Neg Abs Sqrt Reciprocal Exp Log Erf Sin Cos Tan Tanh Sigmoid Relu LeakyRelu Elu Gelu Softplus "
    "HardSigmoid Not IsNaN IsInf Floor Ceil Round Sign Clip Softmax LogSoftmax Trilu CumSum Dropout "
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization RotaryEmbedding GroupNormalization "
    "BatchNormalization InstanceNormalization LpNormalization ScatterND ScatterElements HardSwish Swish Mish Celu "
    "Selu BitwiseNot QuantizeLinear DequantizeLinear"
)
_ELEMENTWISE = op_names(
    "Add Sub Mul Div Pow Mod And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual Where Max Min Sum Mean "
    "BitwiseAnd BitwiseOr BitwiseXor PRelu"
)
_COMPARISONS = op_names("Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Not IsNaN IsInf")


def infer(sg: SymbolicGraph, node: gs.Node) -> None:
    """Records shapes and element types of the outputs of a node."""
    rule = _rule(node.op) if is_standard(node) or node.op in ("SimplifiedLayerNormalization", "SampleAttention") else None
    found: list[Shape | None] = []
    if rule is not None:
        try:
            found = rule(sg, node)
        except (Stuck, *MALFORMED):  # a malformed graph is refused by the checker; here its shape only stays unknown
            found = []
    for i, out in enumerate(node.outputs):
        if out.name:
            sg.set_shape(out, found[i] if i < len(found) else None)
            sg.set_dtype(out, _dtype(sg, node) if i == 0 or node.op == "Split" else None)


def axis_of(node: gs.Node, rank: int, name: str = "axis", default: int = 0) -> int:
    """An axis attribute counted from the front."""
    axis = int(node.attrs.get(name, default))
    return axis + rank if axis < 0 else axis


def broadcast(sg: SymbolicGraph, node: gs.Node, shapes: list[Shape]) -> Shape:
    """The common shape; a length that cannot be told (two different open ones) is left open."""
    rank = max(len(s) for s in shapes)
    out: list[Poly] = []
    for axis in range(rank):
        lengths: list[Poly] = []
        for s in shapes:
            k = axis - rank + len(s)
            if k >= 0 and s[k].value != 1 and s[k] not in lengths:
                lengths.append(s[k])
        lengths = [n for n in lengths if unclamped(n) == n or unclamped(n) not in lengths]
        fixed = [n for n in lengths if n.value is not None]
        if fixed or len(lengths) < 2:
            out.append((fixed or lengths or [const(1)])[0])
        else:
            out.append(sg.open_length(node.outputs[0], axis))
    return tuple(out)


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
    wanted = sg.integers(node.inputs[1])
    if wanted is None:
        raise Stuck(node, "the shape it is given cannot be followed")
    allow_zero = int(node.attrs.get("allowzero", 0))
    lengths = [source[i] if n.value == 0 and not allow_zero and i < len(source) else n for i, n in enumerate(wanted)]
    free = [i for i, n in enumerate(lengths) if n.value == -1]
    if len(free) == 1:
        rest = divide_lengths(list(source), [n for i, n in enumerate(lengths) if i != free[0]])
        lengths[free[0]] = sg.open_length(node.outputs[0], free[0]) if rest is None else rest
    return tuple(lengths)


def slices(sg: SymbolicGraph, node: gs.Node) -> dict[int, tuple[Poly, Poly, int]]:
    """For each sliced axis: first position, length of the result, step."""
    source = sg.known_shape(node.inputs[0], node)
    if len(node.inputs) < 3:
        raise Stuck(node, "a Slice with attributes (opset < 10) is not followed")
    starts, ends = sg.integers(node.inputs[1]), sg.integers(node.inputs[2])
    axes = sg.constant_integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else None
    steps = sg.constant_integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4].name else None
    if starts is None or ends is None:
        raise Stuck(node, "its bounds cannot be followed")
    out: dict[int, tuple[Poly, Poly, int]] = {}
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[k] if axes else k
        axis += len(source) if axis < 0 else 0
        step = steps[k] if steps else 1
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
    return first, sg.open_length(node.outputs[0], axis)


def _position(p: Poly, length: Poly) -> Poly:
    """A bound of a Slice as a position in 0 .. length."""
    if p.value is not None:
        if p.value >= _UNBOUNDED:
            return length
        if p.value <= -_UNBOUNDED:
            return const(0)
        return length + p.value if p.value < 0 else p
    return p if is_nonnegative(p) else length + p if is_nonnegative(-p - 1) else p


def _rule(op: str) -> Callable[[SymbolicGraph, gs.Node], list[Shape | None]] | None:
    if op in _SAME:
        return lambda sg, node: [sg.shape(node.inputs[0])]
    if op in _ELEMENTWISE:
        return _elementwise
    return _RULES.get(op)


def _dtype(sg: SymbolicGraph, node: gs.Node) -> int | None:
    op = node.op
    if op in _COMPARISONS:
        return _BOOL
    if op in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
        return _INT64
    if op == "Cast":
        to = node.attrs.get("to")
        return int(to) if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))
    if op == "Constant":
        array = sg.array(node.outputs[0])
        return None if array is None else int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    if op == "ConstantOfShape":
        value = node.attrs.get("value")
        return onnx.TensorProto.FLOAT if value is None else element_type(value)
    if op == "Where":
        return sg.dtype(node.inputs[1])
    if node.inputs and (op in _SAME or op in _ELEMENTWISE or op in _RULES):
        return sg.dtype(node.inputs[0])
    return None


def _elementwise(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    return [broadcast(sg, node, [sg.known_shape(t, node) for t in node.inputs])]


def _matmul(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a, b = (sg.known_shape(t, node) for t in node.inputs[:2])
    if len(a) < 2 or len(b) < 2:
        raise Stuck(node, "a product with a vector is not followed")
    return [(*broadcast(sg, node, [a[:-2], b[:-2]]), a[-2], b[-1])]


def _gemm(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a, b = (sg.known_shape(t, node) for t in node.inputs[:2])
    return [(a[1] if node.attrs.get("transA") else a[0], b[0] if node.attrs.get("transB") else b[1])]


def _transpose(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    perm = node.attrs.get("perm") or range(len(a))[::-1]
    return [tuple(a[int(p)] for p in perm)]


def _unsqueeze(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    rank = len(a) + len(_axes(sg, node))
    new = {x + rank if x < 0 else x for x in _axes(sg, node)}
    rest = iter(a)
    return [tuple(const(1) if i in new else next(rest) for i in range(rank))]


def _squeeze(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    return [tuple(n for i, n in enumerate(a) if i not in squeezed_axes(sg, node))]


def squeezed_axes(sg: SymbolicGraph, node: gs.Node) -> set[int]:
    a = sg.known_shape(node.inputs[0], node)
    if "axes" in node.attrs or len(node.inputs) > 1:
        return {x + len(a) if x < 0 else x for x in _axes(sg, node)}
    if any(n.value is None for n in a):
        raise Stuck(node, "a Squeeze without axes of open lengths is not followed")
    return {i for i, n in enumerate(a) if n.value == 1}


def unsqueezed_axes(sg: SymbolicGraph, node: gs.Node, rank: int) -> set[int]:
    """Axes of the result (which has `rank` axes) that an Unsqueeze puts in."""
    return {x + rank if x < 0 else x for x in _axes(sg, node)}


def _axes(sg: SymbolicGraph, node: gs.Node) -> tuple[int, ...]:
    if "axes" in node.attrs:
        return tuple(int(x) for x in node.attrs["axes"])
    axes = sg.constant_integers(node.inputs[1])
    if axes is None:
        raise Stuck(node, "its axes are not constant")
    return axes


def _expand(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    wanted = sg.integers(node.inputs[1])
    if wanted is None:
        raise Stuck(node, "the shape it is given cannot be followed")
    return [broadcast(sg, node, [sg.known_shape(node.inputs[0], node), wanted])]


def _concat(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    parts = [sg.known_shape(t, node) for t in node.inputs]
    axis = axis_of(node, len(parts[0]))
    total = sum((p[axis] for p in parts), start=const(0))
    return [tuple(total if i == axis else n for i, n in enumerate(parts[0]))]


def _gather(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    data, indices = (sg.known_shape(t, node) for t in node.inputs[:2])
    axis = axis_of(node, len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _gather_nd(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    data, indices = (sg.known_shape(t, node) for t in node.inputs[:2])
    depth = indices[-1].value
    if depth is None:
        raise Stuck(node, "the depth of its indices is not fixed")
    return [(*indices[:-1], *data[int(node.attrs.get("batch_dims", 0)) + depth :])]


def _shape(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    rank = len(sg.known_shape(node.inputs[0], node))
    return [(const(len(range(rank)[shape_window(node)])),)]


def shape_window(node: gs.Node) -> slice:
    """The axes that a Shape node reports."""
    end = node.attrs.get("end")
    return slice(int(node.attrs.get("start", 0)), None if end is None else int(end))


def _range(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    start, limit, delta = (sg.value(t, ()) for t in node.inputs)
    if isinstance(start, Poly) and isinstance(limit, Poly) and delta == const(1) and is_nonnegative(limit - start):
        return [(limit - start,)]
    return [(sg.open_length(node.outputs[0], 0),)]


def _constant_of_shape(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    return [sg.integers(node.inputs[0])]


def _constant(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    array = sg.array(node.outputs[0])
    return [None if array is None else tuple(const(n) for n in array.shape)]


def _slice(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    out = list(sg.known_shape(node.inputs[0], node))
    for axis, (_, length, _) in slices(sg, node).items():
        out[axis] = length
    return [tuple(out)]


def _reduce(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    keep = int(node.attrs.get("keepdims", 1))
    has_axes = "axes" in node.attrs or (len(node.inputs) > 1 and node.inputs[1].name)
    if not has_axes and node.attrs.get("noop_with_empty_axes"):
        return [a]
    axes = {x + len(a) if x < 0 else x for x in _axes(sg, node)} if has_axes else set(range(len(a)))
    return [tuple(const(1) if i in axes else n for i, n in enumerate(a) if keep or i not in axes)]


def _arg_reduce(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a))
    keep = int(node.attrs.get("keepdims", 1))
    return [tuple(const(1) if i == axis else n for i, n in enumerate(a) if keep or i != axis)]


def _split(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a))
    return [tuple(size if i == axis else n for i, n in enumerate(a)) for size in split_sizes(sg, node)]


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


def _flatten(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a), default=1)
    return [(product(a[:axis]), product(a[axis:]))]


def _tile(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a, repeats = sg.known_shape(node.inputs[0], node), sg.integers(node.inputs[1])
    return [None if repeats is None else tuple(n * r for n, r in zip(a, repeats, strict=True))]


def _attention(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    q, v = (sg.known_shape(node.inputs[i], node) for i in (0, 2))
    return [(*q[:3], v[3])] if len(q) == len(v) == 4 else []


_RULES: dict[str, Callable[[SymbolicGraph, gs.Node], list[Shape | None]]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": lambda sg, node: [reshape_target(sg, node)],
    "Expand": _expand,
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": lambda sg, node: [sg.shape(node.inputs[1])],
    "Shape": _shape,
    "Size": lambda sg, node: [()],
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Constant": _constant,
    "Slice": _slice,
    "Split": _split,
    "Flatten": _flatten,
    "Tile": _tile,
    "ArgMax": _arg_reduce,
    "ArgMin": _arg_reduce,
    "Attention": _attention,
    "SampleAttention": _attention,
    **{f"Reduce{x}": _reduce for x in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")},
}
