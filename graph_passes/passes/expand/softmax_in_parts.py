"""Softmax spelled as `e / ReduceSum(e)` or `e * Reciprocal(ReduceSum(e))` with `e = Exp(x)`: one Softmax of x over the summed axis.

The usual shift by `ReduceMax(x)` stays in x, where softmax does not feel it.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import is_standard, producer

__all__ = ["expand"]


def expand(m: Maker) -> None:
    top, bottom, inverse = _parts(m)
    exp, total = producer(top), producer(bottom)
    if exp is None or total is None or exp.op != "Exp" or total.op != "ReduceSum" or total.inputs[0] is not top:
        return
    if not (is_standard(exp) and is_standard(total)) or not total.attrs.get("keepdims", 1):
        return
    axes = total.attrs.get("axes") or (m.sg.constant_integers(total.inputs[1]) if len(total.inputs) > 1 else None)
    if axes is None or len(axes) != 1:
        return
    gone = [exp, total, *inverse]
    inside = {id(n) for n in (m.node, *gone)}
    made = [n.outputs[0] for n in gone]
    if all(id(r) in inside for t in made for r in t.outputs) and not {t.name for t in made} & m.sg.outputs:
        m.absorbed += gone
    m.op("Softmax", exp.inputs[0], axis=int(axes[0]), into=m.output(0))


def _parts(m: Maker) -> tuple[gs.Tensor, gs.Tensor, list[gs.Node]]:
    """What is divided, by what, and the Reciprocal of it if there is one."""
    left, right = m.needed(*m.inputs(2))
    if m.node.op == "Mul":
        for top, factor in ((left, right), (right, left)):
            inverse = producer(factor)
            if inverse is not None and inverse.op == "Reciprocal" and is_standard(inverse):
                return top, inverse.inputs[0], [inverse]
    return left, right, []
