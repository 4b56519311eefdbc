"""`Einsum` of two tensors that is a batched matrix product, as Transposes, Reshapes and one MatMul.

Letters fall into four groups: in both tensors and the result (batch), in both but not in the result (summed), in one tensor and
the result (rows of the left one, columns of the right one). With one row letter, one column letter and one summed letter the
product needs no Reshape; anything else is left whole.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker

__all__ = ["expand"]


def expand(m: Maker) -> None:
    equation = m.node.attrs["equation"]
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left_right, arrow, out = text.partition("->")
    terms = left_right.split(",")
    if not arrow or len(terms) != 2 or "." in text or any(len(set(t)) != len(t) for t in (*terms, out)):
        return
    left, right = m.needed(*m.inputs(2))
    a, b = terms
    batch = [x for x in out if x in a and x in b]
    summed = [x for x in a if x in b and x not in out]
    rows, columns = [x for x in a if x not in b], [x for x in b if x not in a]
    if not len(rows) == len(columns) == len(summed) == 1 or set(out) != {*batch, *rows, *columns}:
        return
    if any(m.shape(left)[a.index(x)] != m.shape(right)[b.index(x)] for x in batch):
        return  # one of them is of length 1 and broadcast, or that is not known
    left = _in_order(m, left, a, [*batch, *rows, *summed])
    right = _in_order(m, right, b, [*batch, *summed, *columns])
    made = [*batch, *rows, *columns]
    perm = [made.index(x) for x in out]
    if perm == sorted(perm):
        m.op("MatMul", left, right, into=m.output(0))
    else:
        m.op("Transpose", m.op("MatMul", left, right), perm=perm, into=m.output(0))


def _in_order(m: Maker, tensor: gs.Tensor, letters: str, wanted: list[str]) -> gs.Tensor:
    perm = [letters.index(x) for x in wanted]
    return tensor if perm == sorted(perm) else m.op("Transpose", tensor, perm=perm)
