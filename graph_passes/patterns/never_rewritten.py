"""Softmax spelled out as Exp, ReduceSum and Div, or Mul by a Reciprocal, in a form that is not one Softmax
(`passes.expand.softmax_in_parts`): it is listed with the reason, so that none is passed over in silence."""

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
    if node.op not in ("Div", "Mul") or not is_standard(node) or len(node.inputs) != 2:
        return False
    left, right = node.inputs
    return _is_share(left, right, node.op) or (node.op == "Mul" and _is_share(right, left, node.op))


def _is_share(top: gs.Tensor, other: gs.Tensor, op: str) -> bool:
    """`Exp(x)` and the sum of it, or, for Mul, one over the sum."""
    exp, bottom = producer(top), producer(other)
    if op == "Mul":
        bottom = producer(bottom.inputs[0]) if bottom is not None and bottom.op == "Reciprocal" else None
    return exp is not None and exp.op == "Exp" and bottom is not None and bottom.op == "ReduceSum" and bottom.inputs[0] is top


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    raise Refusal(
        "its softmax is spelled out as Exp, ReduceSum and a division over axes that are not followed; export it as Softmax.", label(node)
    )
