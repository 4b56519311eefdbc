"""Attention in forms that are recognised and left alone: they are listed with the reason, so that none is passed over in silence.

1. Fused attention operators of ONNX Runtime (`com.microsoft`).
2. Softmax spelled out as Exp / ReduceSum / Div.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.site import AttentionSite, Refusal, label
from graph_passes.symbolic.graph import SymbolicGraph, is_standard, op_names, producer

__all__ = ["CONTRIB", "DECOMPOSED", "contrib", "decomposed", "is_attention", "is_contrib", "is_decomposed"]

CONTRIB = "com.microsoft"
DECOMPOSED = "softmax in parts"

_CONTRIB_OPS = op_names(
    "Attention MultiHeadAttention GroupQueryAttention PagedAttention SparseAttention DecoderMaskedSelfAttention "
    "DecoderMaskedMultiHeadAttention DecoderAttention PackedAttention PackedMultiHeadAttention "
    "LongformerAttention QAttention QOrderedAttention TorchScaledDotProductAttention LinearAttention BiasSoftmax"
)


def is_attention(sg: SymbolicGraph, node: gs.Node) -> bool:
    return True


def is_contrib(node: gs.Node) -> bool:
    return node.domain == CONTRIB and node.op in _CONTRIB_OPS


def contrib(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    raise Refusal(
        f"com.microsoft.{node.op} is a fused operator that is not taken apart; rewrite the model before ONNX Runtime's optimiser fuses it.",
        label(node),
    )


def is_decomposed(node: gs.Node) -> bool:
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


def decomposed(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    raise Refusal("its softmax is spelled out as Exp, ReduceSum and Div, which is not followed; export it as Softmax.", label(node))
