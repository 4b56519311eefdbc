"""The ONNX `Attention` operator (opset 23 and later), as exporters emit it for scaled dot product attention.

Keys and values come in whole, with the past joined outside, and the mask is a tensor. What is declined, and why:

1. `is_causal=1` without a past input masks from the top left (row i sees the keys 0 .. i): the same as full causal attention
   only when T = S.
2. A past inside the operator, `nonpad_kv_seqlen`, windows, a soft-cap and the product output have meanings that one node does
   not carry over.
"""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.layout import operands
from graph_passes.patterns.masks import MaskTerm, decide
from graph_passes.site import AttentionSite, Refusal, label
from graph_passes.symbolic.graph import SymbolicGraph, inputs_of, is_standard, op_names
from graph_passes.symbolic.poly import const, floordiv

__all__ = ["PATTERN", "is_attention", "matches", "site"]

PATTERN = "onnx Attention"

_KNOWN = op_names(
    "is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap softmax_precision left_window_size right_window_size"
)


def matches(node: gs.Node) -> bool:
    return node.op == "Attention" and is_standard(node)


def is_attention(sg: SymbolicGraph, node: gs.Node) -> bool:
    return True


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    """The site that an Attention node is.

    Raises:
        Refusal: it is not full causal attention, or that is not proved.
    """
    query, key, value, mask_tensor, *extra = [*inputs_of(node), None, None, None, None][:7]
    if query is None or key is None or value is None:
        raise Refusal("it lacks queries, keys or values.", label(node))
    _refuse_what_is_not_carried_over(sg, node, extra)
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
    terms: list[MaskTerm] = []
    if mask_tensor is not None:
        terms.append(MaskTerm("bool" if sg.dtype(mask_tensor) == onnx.TensorProto.BOOL else "add", mask_tensor, node))
    if int(node.attrs.get("is_causal", 0)):
        terms.append(MaskTerm("top_left", None, node))
    mask, evidence = decide(sg, terms, grid)
    stated = float(node.attrs.get("scale", 1.0 / math.sqrt(grid.size.value or 1)))
    scale = stated * q.factor * k.factor
    if not scale > 0:
        raise Refusal(f"its scores are multiplied by {scale:g}; a factor > 0 is needed.", label(node))
    return AttentionSite(
        id=name,
        node=node.name or node.outputs[0].name,
        pattern=PATTERN,
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
        softcap=0.0,
        opset=sg.opset,
        consumed=tuple(dict.fromkeys(label(n) for n in (node, *q.through, *k.through, *v.through))),
        between=tuple(dict.fromkeys(t.name for n in (*q.through, *k.through, *v.through) for t in n.outputs)),
        evidence=(*evidence, f"scale {scale:.9g} is that of the operator times the factors on queries and keys."),
    )


def _refuse_what_is_not_carried_over(sg: SymbolicGraph, node: gs.Node, extra: list[gs.Tensor | None]) -> None:
    unknown = sorted(set(node.attrs) - _KNOWN)
    if unknown:
        raise Refusal(f"its attribute {unknown[0]} is not known to this program.", label(node))
    for what, tensor in zip(("past keys", "past values", "a length for each batch item (nonpad_kv_seqlen)"), extra, strict=True):
        if tensor is not None:
            raise Refusal(f"it takes {what} inside of the operator ({tensor.name}), which is not carried over.", label(node))
    for what, tensor in zip(("present keys", "present values", "the product of queries and keys"), node.outputs[1:], strict=False):
        if tensor.name and (tensor.outputs or tensor.name in sg.outputs):
            raise Refusal(f"{what} of the operator are used ({tensor.name}), which the new node does not make.", label(node))
    if float(node.attrs.get("softcap", 0.0)) != 0:
        raise Refusal(
            f"it caps its scores (softcap {float(node.attrs['softcap']):g}); whether before or after the mask depends on the opset.",
            label(node),
        )
    for side in ("left", "right"):
        window = int(node.attrs.get(f"{side}_window_size", -1))
        if window != -1:
            raise Refusal(f"it has a sliding window ({side}_window_size {window}), which full attention does not have.", label(node))


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
