"""Softmax spelled as `e / ReduceSum(e)` with `e = Exp(x)`: one Softmax of x over the summed axis.

The usual shift by `ReduceMax(x)` stays in x, where softmax does not feel it.
"""

from __future__ import annotations

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import is_standard, producer

__all__ = ["expand"]


def expand(m: Maker) -> None:
    top, bottom = m.needed(*m.inputs(2))
    exp, total = producer(top), producer(bottom)
    if exp is None or total is None or exp.op != "Exp" or total.op != "ReduceSum" or total.inputs[0] is not top:
        return
    if not (is_standard(exp) and is_standard(total)) or not total.attrs.get("keepdims", 1):
        return
    axes = total.attrs.get("axes") or (m.sg.constant_integers(total.inputs[1]) if len(total.inputs) > 1 else None)
    if axes is None or len(axes) != 1:
        return
    if len(bottom.outputs) == 1 and {id(r) for r in top.outputs} == {id(m.node), id(total)} and not {top.name, bottom.name} & m.sg.outputs:
        m.absorbed += [exp, total]
    m.op("Softmax", exp.inputs[0], axis=int(axes[0]), into=m.output(0))
