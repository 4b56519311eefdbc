"""Fused attention operators: ONNX `Attention`, and those of ONNX Runtime (`com.microsoft`).

An operator that could be taken apart (`passes.expand`) stands in the graph as one core of queries, keys, values and masks, which
is judged here like any other attention; one that could not is declined with the reason.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.layout import operands
from graph_passes.patterns.masks import MaskTerm, decide
from graph_passes.site import AttentionSite, Refusal, label
from graph_passes.symbolic.graph import CORE_DOMAIN, SymbolicGraph, is_standard, op_names
from graph_passes.symbolic.poly import const, floordiv

__all__ = ["is_attention", "matches", "pattern", "site"]

_MICROSOFT = "com.microsoft"

_MICROSOFT_OPS = op_names(
    "Attention MultiHeadAttention GroupQueryAttention PagedAttention SparseAttention DecoderMaskedSelfAttention "
    "DecoderMaskedMultiHeadAttention DecoderAttention PackedAttention PackedMultiHeadAttention "
    "LongformerAttention QAttention QOrderedAttention TorchScaledDotProductAttention LinearAttention BiasSoftmax"
)
_REASONS = {
    "PagedAttention": "its keys and values lie in pages that a table names; one node reads them as one tensor.",
    "SparseAttention": "its attention is sparse already, by a fixed pattern of blocks.",
    "LinearAttention": "it is linear attention, without a softmax over keys.",
    "LongformerAttention": "it attends within a window and to global tokens, which full causal attention does not.",
}


def matches(node: gs.Node) -> bool:
    if node.domain in (CORE_DOMAIN, _MICROSOFT):
        return node.domain == CORE_DOMAIN or node.op in _MICROSOFT_OPS
    return node.op == "Attention" and is_standard(node)


def pattern(node: gs.Node) -> str:
    if node.domain == CORE_DOMAIN:
        return node.attrs["pattern"]
    return "onnx Attention" if is_standard(node) else f"{_MICROSOFT}.{node.op}"


def is_attention(sg: SymbolicGraph, node: gs.Node) -> bool:
    return True


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    """The site that a core is.

    Raises:
        Refusal: the operator could not be taken apart, or it is not full causal attention, or that is not proved.
    """
    if node.domain != CORE_DOMAIN:
        why = sg.left_whole.get(id(node))
        reason = _REASONS.get(node.op, f"{pattern(node)} is a fused operator that is not taken apart; export the model without it.")
        raise why or Refusal(reason, label(node))
    query, key, value, *masks = node.inputs
    grid = _grid(sg, node, query, key, value)
    group = (grid.heads.value or 0) // (sg.known_shape(key)[1].value or 1)
    h = floordiv(grid.h, const(group))
    q, k, v = operands(
        sg,
        grid,
        (query, (grid.b, grid.h, grid.q, grid.d)),
        (key, (grid.b, h, grid.kv, grid.d)),
        (value, (grid.b, h, grid.kv, grid.w)),
        node.outputs[0],
        node,
    )
    mask, evidence = decide(sg, _terms(sg, node, masks, grid), grid)
    scale = node.attrs["scale"] * q.factor * k.factor
    if not scale > 0:
        raise Refusal(f"its scores are multiplied by {scale:g}; a factor > 0 is needed.", label(node))
    facts = [f"scale {scale:.9g} is that of the operator times the factors on queries and keys."]
    if node.attrs["softcap"] > 0:
        facts.append(f"soft-cap {node.attrs['softcap']:.9g} is applied before the mask, by the operator's definition.")
    return AttentionSite(
        id=name,
        node=node.name or node.outputs[0].name,
        pattern=pattern(node),
        query=q.operand,
        key=k.operand,
        value=v.operand,
        output=node.outputs[0].name,
        mask=mask,
        heads=grid.heads.value or 0,
        kv_heads=k.operand.heads,
        head_size=grid.size.value or 0,
        value_size=grid.value_size.value or 0,
        scale=scale,
        softcap=max(node.attrs["softcap"], 0.0),
        opset=sg.opset,
        consumed=tuple(dict.fromkeys(label(n) for n in (node, *q.through, *k.through, *v.through))),
        between=tuple(dict.fromkeys(t.name for n in (*q.through, *k.through, *v.through) for t in n.outputs)),
        evidence=(*evidence, *facts),
    )


def _terms(sg: SymbolicGraph, node: gs.Node, masks: list[gs.Tensor], grid: Grid) -> list[MaskTerm]:
    terms: list[MaskTerm] = []
    for mask in masks:
        shape = sg.known_shape(mask, node)
        if shape and shape[-1] != grid.keys:  # one column too: ONNX fills it up with masked keys, and does not repeat it
            raise Refusal(f"its mask {mask.name} has the length {shape[-1]} where the scores have {grid.keys}.", label(node))
        terms.append(MaskTerm("bool" if sg.dtype(mask) == onnx.TensorProto.BOOL else "add", mask, node))
    if node.attrs["offset"] is not None:
        terms.append(MaskTerm("causal", None, node, offset=node.attrs["offset"]))
    return terms


def _grid(sg: SymbolicGraph, node: gs.Node, query: gs.Tensor, key: gs.Tensor, value: gs.Tensor) -> Grid:
    q, k, v = (sg.known_shape(t, node) for t in (query, key, value))
    if not len(q) == len(k) == len(v) == 4:
        raise Refusal(f"its queries have {len(q)} axes; [batch, heads, rows, head size] is needed.", label(node))
    heads, kv_heads = q[1].value, k[1].value
    if not heads or not kv_heads or q[3].value is None or v[3].value is None:
        raise Refusal("its number of heads or its head size is not fixed in the graph.", label(node))
    if heads % kv_heads:
        raise Refusal(f"its {heads} query heads are not a multiple of its {kv_heads} key/value heads.", label(node))
    return Grid(batch=q[0], heads=q[1], rows=q[2], keys=k[2], size=q[3], value_size=v[3])
