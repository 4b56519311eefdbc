"""Softmax in parts, as one Softmax of x over the summed axis:

1. `e / ReduceSum(e)` or `e * Reciprocal(ReduceSum(e))` with `e = Exp(x)`;
2. `(e @ v) / ReduceSum(e)`, or that by a Reciprocal, where the product is divided instead of the probabilities, for a sum over the
   last axis;
3. `Exp(LogSoftmax(x))` and `Exp(x - ReduceLogSumExp(x))`.

The usual shift by `ReduceMax(x)` stays in x, where softmax does not feel it.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import is_standard, producer

__all__ = ["expand_exp", "expand_share"]


def expand_share(m: Maker) -> None:
    top, bottom, inverse = _parts(m)
    product = producer(top)
    divided_late = product is not None and product.op == "MatMul" and is_standard(product)
    exponentials = product.inputs[0] if product is not None and divided_late else top
    exp, total = producer(exponentials), producer(bottom)
    if exp is None or total is None or exp.op != "Exp" or total.op != "ReduceSum" or total.inputs[0] is not exponentials:
        return
    axis = _axis(m, total)
    if not is_standard(exp) or axis is None:
        return
    if divided_late and product is not None:
        if axis not in (-1, len(m.shape(exponentials)) - 1):
            return
        _absorb(m, exp, total, product, *inverse)
        m.op("MatMul", m.op("Softmax", exp.inputs[0], axis=-1), product.inputs[1], into=m.output(0))
    else:
        _absorb(m, exp, total, *inverse)
        m.op("Softmax", exp.inputs[0], axis=axis, into=m.output(0))


def _parts(m: Maker) -> tuple[gs.Tensor, gs.Tensor, list[gs.Node]]:
    """What is divided, by what, and the Reciprocal of it if there is one."""
    left, right = m.needed(*m.inputs(2))
    if m.node.op == "Mul":
        for top, factor in ((left, right), (right, left)):
            inverse = producer(factor)
            if inverse is not None and inverse.op == "Reciprocal" and is_standard(inverse):
                return top, inverse.inputs[0], [inverse]
    return left, right, []


def expand_exp(m: Maker) -> None:
    (logarithm,) = m.needed(*m.inputs(1))
    node = producer(logarithm)
    if node is None or not is_standard(node):
        return
    if node.op == "LogSoftmax":
        axis = int(node.attrs.get("axis", -1 if m.sg.opset >= 13 else 1))
        _absorb(m, node)
        m.op("Softmax", node.inputs[0], axis=axis, into=m.output(0))
    elif node.op == "Sub":
        x, total = node.inputs[0], producer(node.inputs[1])
        if total is None or total.op != "ReduceLogSumExp" or total.inputs[0] is not x or (over := _axis(m, total)) is None:
            return
        _absorb(m, total, node)
        m.op("Softmax", x, axis=over, into=m.output(0))


def _axis(m: Maker, total: gs.Node) -> int | None:
    """The one axis that a sum runs over and keeps."""
    if not is_standard(total) or not total.attrs.get("keepdims", 1):
        return None
    axes = total.attrs.get("axes") or (m.sg.constant_integers(total.inputs[1]) if len(total.inputs) > 1 else None)
    return int(axes[0]) if axes is not None and len(axes) == 1 else None


def _absorb(m: Maker, *parts: gs.Node) -> None:
    """Takes the parts along, unless something else reads what one of them makes."""
    inside = {id(m.node), *map(id, parts)}
    made = [t for p in parts for t in p.outputs]
    if all(id(r) in inside for t in made for r in t.outputs) and not {t.name for t in made} & m.sg.outputs:
        m.absorbed += parts
