"""`Einsum` of two tensors that is a batched matrix product, as Transposes, Reshapes and one MatMul.

Letters fall into four groups: in both tensors and the result (batch), in both but not in the result (summed), in one tensor and
the result (rows of the left one, columns of the right one). One row letter, one column letter and one summed letter make the
product; further row and column letters are batch axes of length 1 in the other tensor. Anything else is left whole.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import producer

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
    if not rows or not columns or len(summed) != 1 or set(out) != {*batch, *rows, *columns}:
        return
    if any(m.shape(left)[a.index(x)] != m.shape(right)[b.index(x)] for x in batch):
        return  # one of them is of length 1 and broadcast, or that is not known
    # Rows and keys are the last axes of scores: those that come out of a first product, and those that go into a second.
    rows.sort(key=(a if _is_probabilities(left) else out).index)
    columns.sort(key=out.index)
    batch = [x for x in (a if _is_probabilities(left) else out) if x in (*batch, *rows[:-1], *columns[:-1])]
    batch += [x for x in columns[:-1] if x not in batch]
    left = _in_order(m, left, a, [*batch, rows[-1], *summed])
    right = _in_order(m, right, b, [*batch, *summed, columns[-1]])
    made = [*batch, rows[-1], columns[-1]]
    perm = [made.index(x) for x in out]
    if perm == sorted(perm):
        m.op("MatMul", left, right, into=m.output(0))
    else:
        m.op("Transpose", m.op("MatMul", left, right), perm=perm, into=m.output(0))


def _is_probabilities(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    while node is not None and node.op in ("Cast", "Identity", "Dropout"):
        node = producer(node.inputs[0])
    return node is not None and node.op == "Softmax"


def _in_order(m: Maker, tensor: gs.Tensor, letters: str, wanted: list[str]) -> gs.Tensor:
    """The axes in the wanted order; letters that the tensor lacks become axes of length 1."""
    there = [x for x in wanted if x in letters]
    perm = [letters.index(x) for x in there]
    if perm != sorted(perm):
        tensor = m.op("Transpose", tensor, perm=perm)
    missing = [i for i, x in enumerate(wanted) if x not in letters]
    return m.op("Unsqueeze", tensor, m.ints(missing)) if missing else tensor
