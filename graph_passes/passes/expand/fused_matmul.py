"""`com.microsoft.FusedMatMul` of ONNX Runtime: a product with its transpositions and its factor inside."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import op_names

__all__ = ["expand"]

_KNOWN = op_names("alpha transA transB transBatchA transBatchB")


def expand(m: Maker) -> None:
    left, right = m.needed(*m.inputs(2))
    m.refuse_unknown_attributes(_KNOWN)
    left = _transposed(m, left, "A")
    right = _transposed(m, right, "B")
    alpha = float(m.node.attrs.get("alpha", 1.0))
    if alpha == 1:
        m.op("MatMul", left, right, into=m.output(0))
    else:
        m.op("Mul", m.op("MatMul", left, right), m.real(alpha, left), into=m.output(0))


def _transposed(m: Maker, x: gs.Tensor, side: str) -> gs.Tensor:
    rank = len(m.shape(x))
    perm = list(range(rank))
    if m.attribute(f"transBatch{side}", 0):
        # The first axis moves to the last but one place: [S, B, H, D] is read as [B, H, S, D].
        perm = [*perm[1:-1], 0, perm[-1]]
    if m.attribute(f"trans{side}", 0):
        perm[-2:] = [perm[-1], perm[-2]]
    return x if perm == list(range(rank)) else m.op("Transpose", x, perm=perm)
