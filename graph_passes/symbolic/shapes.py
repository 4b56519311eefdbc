"""Shape rules: the lengths of a node's outputs from those of its inputs.

Only what the specification of an operator says. An operator without a rule keeps the shape that the file declares, if it does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic.arguments import axes_of, axis_of, reshape_target, shape_window, slices, split_sizes, squeezed_axes, unclamped
from graph_passes.symbolic.graph import (
    CORE_DOMAIN,
    MALFORMED,
    Contradiction,
    Shape,
    Stuck,
    SymbolicGraph,
    element_type,
    is_standard,
    op_names,
)
from graph_passes.symbolic.poly import Load, Poly, const, is_nonnegative, product

__all__ = ["broadcast", "infer"]

_BOOL = onnx.TensorProto.BOOL
_INT64 = onnx.TensorProto.INT64

_SAME = op_names(
    "Identity Cast CastLike Neg Abs Sqrt Reciprocal Exp Log Erf Sin Cos Tan Tanh Sigmoid Relu LeakyRelu Elu Gelu Softplus "
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
    known = is_standard(node) or node.op in ("SimplifiedLayerNormalization", "SampleAttention")
    rule = _rule(node.op) if known else _MICROSOFT_RULES.get(node.op) if node.domain == "com.microsoft" else None
    found: list[Shape | None] = []
    contradicted = False
    if rule is not None:
        try:
            found = rule(sg, node)
        except Contradiction:
            contradicted = True
        except (Stuck, *MALFORMED):  # a malformed graph is refused by the checker; here its shape only stays unknown
            found = []
    for i, out in enumerate(node.outputs):
        if out.name:
            if contradicted:
                sg.forget_shape(out)
            else:
                sg.set_shape(out, found[i] if i < len(found) else None)
            sg.set_dtype(out, _dtype(sg, node) if i == 0 or node.op == "Split" else None)


def broadcast(sg: SymbolicGraph, node: gs.Node, shapes: list[Shape], *, repeats: bool = False) -> Shape:
    """The common shape; a length that cannot be told (two different open ones) is left open.

    Args:
        repeats: the operator is there to repeat (Expand); elsewhere different open lengths are likely to be equal.
    """
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
            for other in lengths[1:]:
                sg.equal(lengths[0], other, certain=False, repeats=repeats)
            out.append(sg.open_length(node.outputs[0], axis, repeated=True))
    return tuple(out)


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
    if op == "CastLike":
        return sg.dtype(node.inputs[1])
    if op == "Constant":
        array = sg.array(node.outputs[0])
        return None if array is None else int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    if op == "ConstantOfShape":
        value = node.attrs.get("value")
        return onnx.TensorProto.FLOAT if value is None else element_type(value)
    if op == "Where":
        return sg.dtype(node.inputs[1])
    if node.inputs and (node.domain == CORE_DOMAIN or op in _MICROSOFT_RULES or op in _SAME or op in _ELEMENTWISE or op in _RULES):
        return sg.dtype(node.inputs[0])
    return None


def _elementwise(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    return [broadcast(sg, node, [sg.known_shape(t, node) for t in node.inputs])]


def _require_equal(sg: SymbolicGraph, node: gs.Node, left: Poly, right: Poly) -> None:
    """Two lengths that an operator requires to be equal. Of two numbers that are not, nothing follows: a runtime may still run the node
    (ONNX Runtime joins an empty tensor to one of any width), and what it makes is not what the file declares."""
    if left.value is not None and right.value is not None and left != right:
        raise Contradiction(node, f"its inputs have the lengths {left} and {right} where equal ones are required")
    sg.equal(left, right, certain=True)


def _matmul(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a, b = (sg.known_shape(t, node) for t in node.inputs[:2])
    if len(a) < 2 or len(b) < 2:
        raise Stuck(node, "a product with a vector is not followed")
    _require_equal(sg, node, a[-1], b[-2])
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
    rank = len(a) + len(axes_of(sg, node))
    new = {x + rank if x < 0 else x for x in axes_of(sg, node)}
    rest = iter(a)
    return [tuple(const(1) if i in new else next(rest) for i in range(rank))]


def _squeeze(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    return [tuple(n for i, n in enumerate(a) if i not in squeezed_axes(sg, node))]


def _expand(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    source, given = sg.known_shape(node.inputs[0], node), sg.partial_integers(node.inputs[1])
    if given is None:
        raise Stuck(node, "the shape it is given cannot be followed")
    rank = max(len(source), len(given))
    padded = (const(1),) * (rank - len(source)) + source
    given = (const(1),) * (rank - len(given)) + given
    # What is not followed is 1 or the length that is there already, unless that is 1.
    wanted = [
        n if n is not None else padded[i] if (padded[i].value or 0) > 1 else sg.open_length(node.outputs[0], i) for i, n in enumerate(given)
    ]
    # n entries can be expanded to n + m only if m = 0 or n = 1: the result has n + m.
    shorter = tuple(const(1) if n != wanted[i] and is_nonnegative(wanted[i] - n) else n for i, n in enumerate(padded))
    return [broadcast(sg, node, [shorter, tuple(wanted)], repeats=True)]


def _concat(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    parts = [sg.known_shape(t, node) for t in node.inputs]
    axis = axis_of(node, len(parts[0]))
    total = sum((p[axis] for p in parts), start=const(0))
    for part in parts[1:]:
        for k, (first, other) in enumerate(zip(parts[0], part, strict=True)):
            if k != axis:
                _require_equal(sg, node, first, other)
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
    axes = {x + len(a) if x < 0 else x for x in axes_of(sg, node)} if has_axes else set(range(len(a)))
    return [tuple(const(1) if i in axes else n for i, n in enumerate(a) if keep or i not in axes)]


def _conv(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    """[N, M, lengths]; a length is exact for a stride of 1 and pads that are written out."""
    a, weight = (sg.known_shape(t, node) for t in node.inputs[:2])
    count = len(a) - 2
    pads = [int(x) for x in node.attrs.get("pads") or [0] * 2 * count]
    strides, dilations = ([int(x) for x in node.attrs.get(name) or [1] * count] for name in ("strides", "dilations"))
    auto = node.attrs.get("auto_pad", "NOTSET")
    written = (auto.decode() if isinstance(auto, bytes) else str(auto)) == "NOTSET"
    lengths = [
        n + pads[i] + pads[i + count] - (weight[i + 2] - 1) * dilations[i]
        if written and strides[i] == 1
        else sg.open_length(node.outputs[0], i + 2)
        for i, n in enumerate(a[2:])
    ]
    return [(a[0], weight[0], *lengths)]


def _pad(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    pads = sg.integers(node.inputs[1])
    given = sg.constant_integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else tuple(range(len(a)))
    if pads is None or given is None:
        raise Stuck(node, "its pads cannot be followed")
    out = list(a)
    for k, axis in enumerate(given):
        out[axis] = a[axis] + pads[k] + pads[k + len(given)]
    return [tuple(out)]


def _einsum(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    """Lengths by letters; of a letter that has length 1 somewhere the other one."""
    equation = node.attrs["equation"]
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, out = text.partition("->")
    if not arrow or "." in text:
        raise Stuck(node, "an Einsum without letters for every axis is not followed")
    lengths: dict[str, Poly] = {}
    for term, tensor in zip(left.split(","), node.inputs, strict=True):
        for letter, n in zip(term, sg.known_shape(tensor, node), strict=True):
            if lengths.get(letter, const(1)).value == 1:
                lengths[letter] = n
    return [tuple(lengths[x] for x in out)]


def _arg_reduce(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a))
    keep = int(node.attrs.get("keepdims", 1))
    return [tuple(const(1) if i == axis else n for i, n in enumerate(a) if keep or i != axis)]


def _split(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a))
    return [tuple(size if i == axis else n for i, n in enumerate(a)) for size in split_sizes(sg, node)]


def _flatten(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a), default=1)
    return [(product(a[:axis]), product(a[axis:]))]


def _tile(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    repeats = sg.partial_integers(node.inputs[1]) or (None,) * len(a)
    return [tuple(sg.open_length(node.outputs[0], i) if r is None else n * r for i, (n, r) in enumerate(zip(a, repeats, strict=True)))]


def _one_hot(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    indices = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(indices) + 1, default=-1)
    depth = sg.value(node.inputs[1], (const(0),) * len(sg.known_shape(node.inputs[1], node)))
    new = (
        depth if isinstance(depth, Poly) and not any(isinstance(s, Load) for s in depth.symbols) else sg.open_length(node.outputs[0], axis)
    )
    return [(*indices[:axis], new, *indices[axis:])]


def _top_k(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    a = sg.known_shape(node.inputs[0], node)
    axis = axis_of(node, len(a), default=-1)
    count = (sg.partial_integers(node.inputs[1]) or (None,))[0]
    taken = tuple((sg.open_length(node.outputs[0], i) if count is None else count) if i == axis else n for i, n in enumerate(a))
    return [taken, taken]


def _non_zero(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    return [(const(len(sg.known_shape(node.inputs[0], node))), sg.open_length(node.outputs[0], 1))]


def _quantised_product(sg: SymbolicGraph, node: gs.Node) -> list[Shape | None]:
    return [(*sg.known_shape(node.inputs[0], node)[:-1], const(int(node.attrs["N"])))]


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
    "Conv": _conv,
    "Pad": _pad,
    "Einsum": _einsum,
    "Split": _split,
    "Flatten": _flatten,
    "Tile": _tile,
    "TopK": _top_k,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "ArgMax": _arg_reduce,
    "ArgMin": _arg_reduce,
    "Attention": _attention,
    "SampleAttention": _attention,
    **{f"Reduce{x}": _reduce for x in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")},
}

_MICROSOFT_RULES: dict[str, Callable[[SymbolicGraph, gs.Node], list[Shape | None]]] = {
    "MatMulNBits": _quantised_product,
    "MatMulBnb4": _quantised_product,
    "MoE": lambda sg, node: [sg.shape(node.inputs[0])],
    "QMoE": lambda sg, node: [sg.shape(node.inputs[0])],
}
"""Operators of ONNX Runtime that are not taken apart, but stand between attentions."""
