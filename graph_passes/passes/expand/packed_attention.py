"""`com.microsoft.Attention` of ONNX Runtime: the projection to queries, keys and values is inside.

Taken out of it: the projection, heads, the joined past of keys and values, and the masks. Left whole, with the reason: rotary
embedding inside, a shared buffer, and masks of four axes or of packed sequences.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.passes.expand.multi_head_attention import padding_mask, scale_of
from graph_passes.symbolic.graph import op_names
from graph_passes.symbolic.poly import Poly, const

__all__ = ["PATTERN", "expand"]

PATTERN = "com.microsoft.Attention"

_KNOWN = op_names(
    "num_heads unidirectional scale mask_filter_value qkv_hidden_sizes do_rotary rotary_embedding_dim past_present_share_buffer"
)


def expand(m: Maker) -> None:
    source, weights, bias, mask, past, attention_bias, shared = m.inputs(7)
    m.refuse_unknown_attributes(_KNOWN)
    if m.attribute("do_rotary", 0):
        raise m.refusal("it turns queries and keys by rotary embedding inside, in a form that is not carried over.")
    if shared is not None or m.attribute("past_present_share_buffer", 0):
        raise m.refusal("its past and present share a buffer, which is not carried over.")
    source, weights = m.needed(source, weights)
    heads = m.attribute("num_heads", 0)
    width = m.number(m.shape(weights, 2)[1], "width")
    sizes = [int(n) for n in m.node.attrs.get("qkv_hidden_sizes") or [width // 3] * 3]
    if sum(sizes) != width or len(sizes) != 3:
        raise m.refusal(f"the widths {sizes} of its queries, keys and values do not fill the width {width} of its weights.")
    projected = m.op("MatMul", source, weights)
    projected = m.op("Add", projected, bias) if bias is not None else projected
    m.op("Split", projected, m.ints(sizes), axis=2, outputs=3)
    query, key, value = (m.heads_first(t, heads) for t in m.results())
    past_length = const(0)
    if past is not None or m.output(1) is not None:
        key, value, past_length = _join_past(m, key, value, past)
    masks: list[gs.Tensor] = [padding_mask(m, mask, key)] if mask is not None else []
    masks += [m.same_lengths(attention_bias, query, key)] if attention_bias is not None else []
    offset = past_length if m.attribute("unidirectional", 0) else None
    result = m.core(query, key, value, masks, pattern=PATTERN, scale=scale_of(m, query), offset=offset)
    m.rows_first(result, m.output(0))


def _join_past(m: Maker, key: gs.Tensor, value: gs.Tensor, past: gs.Tensor | None) -> tuple[gs.Tensor, gs.Tensor, Poly]:
    """Keys and values with the past in front, which together are the output `present` [2, B, heads, length, size]."""
    length = const(0)
    if past is not None:
        length = m.shape(past, 5)[3]
        m.op("Split", past, m.ints([1, 1]), axis=0, outputs=2)
        joined = []
        for old, new in zip(m.results(), (key, value), strict=True):
            b, heads, rows, size = m.shape(new, 4)
            joined.append(m.op("Concat", m.op("Squeeze", old, m.ints([0])), new, axis=2, shape=(b, heads, length + rows, size)))
        key, value = joined
    present = m.output(1)
    if present is not None:
        m.op("Concat", *(m.op("Unsqueeze", t, m.ints([0])) for t in (key, value)), axis=0, into=present)
    return key, value, length
