"""Softmax spelled out as Exp, ReduceSum and Div, or Mul by a Reciprocal, in a form that is not one Softmax
(`passes.expand.softmax_in_parts`): it is listed with the reason, so that none is passed over in silence. So is one whose sum has
something added."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.site import AttentionSite, Refusal, label
from graph_passes.symbolic.graph import SymbolicGraph, is_standard, producer

__all__ = ["is_attention", "matches", "pattern", "site"]


def is_attention(sg: SymbolicGraph, node: gs.Node) -> bool:
    return True


def pattern(node: gs.Node) -> str:
    return "softmax in parts"


def matches(node: gs.Node) -> bool:
    return _division(node) is not None


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    if not _division(node):
        raise Refusal("its exponentials are divided by more than their sum (an attention sink, or one added to it).", label(node))
    raise Refusal(
        "its softmax is spelled out as Exp, ReduceSum and a division over axes that are not followed; export it as Softmax.", label(node)
    )


def _division(node: gs.Node) -> bool | None:
    """Whether it is the sum of the exponentials alone that a node divides them by, and not one with something added or bounded from
    below; None when the node divides no exponentials by their sum."""
    if node.op not in ("Div", "Mul") or not is_standard(node) or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    for divided, by in ((left, right), (right, left)) if node.op == "Mul" else ((left, right),):
        bottom = producer(by)
        if node.op == "Mul":
            bottom = producer(bottom.inputs[0]) if bottom is not None and bottom.op == "Reciprocal" else None
        if bottom is not None and (exponentials := _exponentials(divided)) is not None:
            parts = [bottom, *(producer(t) for t in bottom.inputs if bottom.op in ("Add", "Max", "Clip"))]
            total = next((n for n in parts if n is not None and n.op == "ReduceSum" and n.inputs and n.inputs[0] is exponentials), None)
            if total is not None:
                return total is bottom
    return None


def _exponentials(divided: gs.Tensor) -> gs.Tensor | None:
    """`Exp(x)`, which is divided itself or in a product with the values."""
    node = producer(divided)
    if node is not None and node.op == "MatMul":
        divided = node.inputs[0]
        node = producer(divided)
    return divided if node is not None and node.op == "Exp" else None
