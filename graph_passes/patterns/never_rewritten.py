"""Softmax spelled out as Exp / ReduceSum / Div in a form that is not one Softmax (`passes.expand.softmax_in_parts`): it is listed
with the reason, so that none is passed over in silence."""

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
    if node.op != "Div" or not is_standard(node) or len(node.inputs) != 2:
        return False
    top, bottom = (producer(t) for t in node.inputs)
    return (
        top is not None
        and bottom is not None
        and top.op == "Exp"
        and bottom.op == "ReduceSum"
        and bool(bottom.inputs)
        and bottom.inputs[0] is node.inputs[0]
    )


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    raise Refusal(
        "its softmax is spelled out as Exp, ReduceSum and Div over axes that are not followed; export it as Softmax.", label(node)
    )
