"""Softmax spelled out as Exp / ReduceSum / Div in a form that is not one Softmax (`passes.expand.softmax_in_parts`): it is listed
with the reason, so that none is passed over in silence. So is one whose sum has something added."""

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
    return _sum(node) is not None


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    if node.inputs[1].inputs[0] is not _sum(node):
        raise Refusal("its exponentials are divided by more than their sum (an attention sink, or one added to it).", label(node))
    raise Refusal(
        "its softmax is spelled out as Exp, ReduceSum and Div over axes that are not followed; export it as Softmax.", label(node)
    )


def _sum(node: gs.Node) -> gs.Node | None:
    """The ReduceSum of the exponentials that a Div divides, perhaps with something added or bounded from below."""
    if node.op != "Div" or not is_standard(node) or len(node.inputs) != 2:
        return None
    exponentials = node.inputs[0]
    top, bottom = (producer(t) for t in node.inputs)
    if top is not None and top.op == "MatMul":  # the product with the values is divided instead
        exponentials = top.inputs[0]
        top = producer(exponentials)
    if top is None or bottom is None or top.op != "Exp":
        return None
    parts = [bottom, *(producer(t) for t in bottom.inputs if bottom.op in ("Add", "Max", "Clip"))]
    return next((n for n in parts if n is not None and n.op == "ReduceSum" and n.inputs and n.inputs[0] is exponentials), None)
