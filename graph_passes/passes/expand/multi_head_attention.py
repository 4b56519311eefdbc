"""`com.microsoft.MultiHeadAttention` of ONNX Runtime.

Taken out of it: packed queries, keys and values, the bias of their projections, heads, the past, and the masks. Left whole, with
the reason: a shared buffer for past and present, beam search, packed padding masks, a mask that only lowers scores, and the
product of queries and keys as an output.
"""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.passes.expand.onnx_attention import join_past, shorter_than
from graph_passes.patterns.masks.prove import MASKED
from graph_passes.symbolic.graph import op_names

__all__ = ["PATTERN", "expand", "padding_mask", "scale_of"]

PATTERN = "com.microsoft.MultiHeadAttention"

_KNOWN = op_names("num_heads mask_filter_value scale unidirectional")


def expand(m: Maker) -> None:
    query, key, value, bias, keys_mask, attention_bias, past_key, past_value, shared, beams = m.inputs(10)
    m.refuse_unknown_attributes(_KNOWN)
    if shared is not None or beams is not None:
        raise m.refusal("its past and present share a buffer, or a beam search reorders it, which is not carried over.")
    if m.is_read(3):
        raise m.refusal(f"its product of queries and keys is used ({m.outputs[3].name}), which the new node does not make.")
    (query,) = m.needed(query)
    heads = m.attribute("num_heads", 0)
    query, key, value = _four_axes(m, heads, query, key, value, bias)
    key, value, past = join_past(m, key, value, past_key, past_value, (1, 2))
    masks: list[gs.Tensor] = []
    if keys_mask is not None:
        masks.append(padding_mask(m, keys_mask, key))
    if attention_bias is not None:
        masks.append(m.same_lengths(attention_bias, query, key))
    result = m.core(
        query,
        key,
        value,
        masks,
        pattern=PATTERN,
        scale=scale_of(m, query),
        offset=past if m.attribute("unidirectional", 0) else None,
    )
    m.rows_first(result, m.output(0))


def scale_of(m: Maker, query: gs.Tensor) -> float:
    """The factor of the scores: the attribute, or 1 / sqrt(head size) when it is absent or 0."""
    stated = float(m.node.attrs.get("scale", 0.0))
    return stated or 1.0 / math.sqrt(m.number(m.shape(query, 4)[3], "head size"))


def padding_mask(m: Maker, mask: gs.Tensor, key: gs.Tensor) -> gs.Tensor:
    """Which keys are real, from a mask of integers: [B, T], [B, S, T], or a count for each batch item."""
    lowers = float(m.node.attrs.get("mask_filter_value", -10000.0))
    if lowers > MASKED:
        raise m.refusal(f"its mask lowers scores by {-lowers:g}, which does not remove them (needed: {-MASKED:g} or more).")
    shape = m.shape(mask)
    batch = m.shape(key)[0]
    if len(shape) == 1:
        if shape[0] != batch:
            raise m.refusal(f"its mask {mask.name} has {shape[0]} entries; one for each of {batch} batch items is carried over.")
        return shorter_than(m, key, mask)
    if len(shape) not in (2, 3):
        raise m.refusal(f"its mask {mask.name} has {len(shape)} axes; [batch, keys] or [batch, rows, keys] is carried over.")
    return m.op("Unsqueeze", m.op("Cast", mask, to=onnx.TensorProto.BOOL), m.ints([1, 2] if len(shape) == 2 else [1]))


def _four_axes(
    m: Maker, heads: int, query: gs.Tensor, key: gs.Tensor | None, value: gs.Tensor | None, bias: gs.Tensor | None
) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """Queries, keys and values as [B, heads, length, size], from any of the forms that the operator takes."""
    if len(m.shape(query)) == 5 or (key is not None and len(m.shape(key)) == 5):
        if bias is not None:
            raise m.refusal("it adds a bias to packed queries, keys and values, which is not carried over.")
        if key is None:
            return _unpacked(m, query, 3)
        return (m.heads_first(query, heads), *_unpacked(m, key, 2))
    key, value = m.needed(key, value)
    if bias is not None:
        parts = [m.number(m.shape(t, 3)[2], "width") for t in (query, key, value)]
        m.op("Split", bias, m.ints(parts), axis=0, outputs=3)
        query, key, value = (m.op("Add", t, b) for t, b in zip((query, key, value), m.results(), strict=True))
    whole = [t if len(m.shape(t)) == 4 else m.heads_first(t, heads) for t in (key, value)]
    return m.heads_first(query, heads), whole[0], whole[1]


def _unpacked(m: Maker, packed: gs.Tensor, parts: int) -> tuple[gs.Tensor, ...]:
    """[B, length, heads, parts, size] as parts of [B, heads, length, size]."""
    m.op("Split", packed, m.ints([1] * parts), axis=3, outputs=parts)
    return tuple(m.op("Transpose", m.op("Squeeze", t, m.ints([3])), perm=[0, 2, 1, 3]) for t in m.results())
