"""Where batch, heads, rows and keys stand in the two products of an attention, and on the way between them.

Scores are [B, Hq, S, T] in most graphs; [B * Hq, S, T] where batched products of three axes are used, and [B, Hkv, Hq / Hkv, S, T]
where the query heads of a group are an axis. In row-major order all are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.layout import follow
from graph_passes.patterns.masks import MaskTerm
from graph_passes.site import Refusal, label
from graph_passes.symbolic.graph import Shape, Stuck, SymbolicGraph
from graph_passes.symbolic.movement import regrouped
from graph_passes.symbolic.poly import Index, Poly, const, floordiv, poly, product, remainder

__all__ = ["Axes", "carried", "measured"]

Place = tuple[Shape, Shape]
"""Index and lengths: of the element (b, h, q, kv) and of the tensor that holds it."""


@dataclass(frozen=True)
class Axes:
    """Where the axes stand.

    Attributes:
        grid: the lengths of the attention.
        lead: index in front of rows and keys in the product of queries and keys, and `lengths` of these axes.
        last: the same for the probabilities that the product with the values reads.
        places: where element (b, h, q, kv) stands in the result of each node on the way.
    """

    grid: Grid
    lead: Place
    last: Place
    places: Mapping[int, Place] = field(default_factory=dict)

    def read(self, sg: SymbolicGraph, tensor: gs.Tensor, row: Poly, column: Poly) -> Shape:
        """The element of an operand that a product reads; an axis of length 1 is repeated by the product."""
        lead = self.last[0] if column == self.grid.w else self.lead[0]
        index = (*lead, row, column)
        shape = sg.known_shape(tensor)
        return tuple(const(0) if n.value == 1 else k for n, k in zip(shape, index[len(index) - len(shape) :], strict=True))

    def placed(self, terms: list[MaskTerm]) -> list[MaskTerm]:
        """Mask terms with the index and lengths of the scores where they meet them."""
        standard = self.grid.scores
        out = []
        for term in terms:
            at, lengths = self.places[id(term.node)]
            out.append(term if len(lengths) == len(standard) and at == self.grid.at else replace(term, at=at, lengths=lengths))
        return out

    def output_lead(self) -> tuple[int, ...]:
        """The axes in front of the rows of the output as a Reshape takes them; empty when they are batch and heads."""
        index, lengths = self.last
        if len(lengths) == 2 and index == (self.grid.b, self.grid.h):
            return ()
        if len(lengths) == 1:
            return (-1,)
        return (0, *(n.value or 0 for n in lengths[1:]))


def measured(sg: SymbolicGraph, scores: gs.Node, output: gs.Node) -> Axes:
    """The axes of the two products; `carried` then follows them from one to the other.

    Raises:
        Refusal: batch and heads cannot be told apart, or the heads or their size are not fixed.
    """
    q, k, v, p = (sg.shape(t) for t in (*scores.inputs, output.inputs[1], output.inputs[0]))
    if q is None or k is None or v is None or p is None:
        raise Refusal("the shapes of its queries, keys and values are not known.", label(scores))
    if not (len(q) == len(k) >= 3 and len(v) == len(p) >= 3):
        raise Refusal(
            f"its products have operands of {len(q)}, {len(k)} and {len(v)} axes; as many on both sides are needed.", label(scores)
        )
    if q[-1].value is None or v[-1].value is None:
        raise Refusal("its head size is not fixed in the graph.", label(scores))
    batch, heads = _batch_and_heads(sg, scores, q)
    grid = Grid(batch=batch, heads=heads, rows=q[-2], keys=k[-1], size=q[-1], value_size=v[-1])
    return Axes(grid, _lead(scores, grid, q[:-2]), _lead(output, grid, p[:-2]))


def carried(sg: SymbolicGraph, node: gs.Node, axes: Axes) -> Place:
    """Where the element (b, h, q, kv) stands in the result of a node on the way, from where it stands in what the node reads."""
    place = next((axes.places[id(n)] for t in node.inputs for n in t.inputs if id(n) in axes.places), None)
    if place is None:
        place = ((*axes.lead[0], axes.grid.q, axes.grid.kv), (*axes.lead[1], axes.grid.rows, axes.grid.keys))
    index, lengths = place
    shape = sg.known_shape(node.outputs[0], node)
    if node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        index, lengths = regrouped(node, shape, lengths, index), shape
    elif len(shape) != len(lengths):
        raise Refusal(f"{node.op} gives its scores {len(shape)} axes instead of {len(lengths)}.", label(node))
    if index[-2:] != (axes.grid.q, axes.grid.kv):
        raise Refusal("rows and keys are not the last two axes of its scores throughout.", label(node))
    return index, lengths


def _lead(node: gs.Node, grid: Grid, lengths: Shape) -> Place:
    """Index of (b, h) in axes of other lengths."""
    if len(lengths) == 2:
        return (grid.b, grid.h), lengths
    try:
        return regrouped(node, lengths, (grid.batch, grid.heads), (grid.b, grid.h)), lengths
    except Stuck as stuck:
        raise Refusal(f"batch and heads cannot be told in its products: {stuck.why}.", label(node)) from None


def _batch_and_heads(sg: SymbolicGraph, scores: gs.Node, q: Shape) -> tuple[Poly, Poly]:
    if len(q) == 3:
        return _split_axis(sg, scores, q)
    heads = product(q[1:-2])
    if heads.value is None:
        raise Refusal("its number of heads is not fixed in the graph.", label(scores))
    return q[0], heads


def _split_axis(sg: SymbolicGraph, scores: gs.Node, q: Shape) -> tuple[Poly, Poly]:
    """Batch and heads of an axis that holds both, from the tensor of four axes that the queries were reshaped from."""
    joined, rows, size = (poly(Index(f"split.{name}", n)) for name, n in zip("mqd", q, strict=True))
    for step in follow(sg, scores.inputs[0], (joined, rows, size)):
        shape = sg.shape(step.tensor)
        if shape is None or len(shape) != 4:
            continue
        for k, heads in enumerate(shape):
            if heads.value is None:
                continue
            for j, batch in enumerate(shape):
                if (
                    j != k
                    and step.index[k] == remainder(joined, heads)
                    and step.index[j] == floordiv(joined, heads)
                    and batch * heads == q[0]
                ):
                    return batch, heads
    raise Refusal(f"its scores hold batch and heads in one axis ({q[0]}), and no tensor of four axes tells them apart.", label(scores))
