"""The ONNX `Attention` operator (opsets 23 to 25; specification of ONNX 1.23).

Taken out of it: the heads of 3-D inputs, the joining of the past, the numbers of real keys. What `is_causal` means depends on where
the past is; row i of S sees the keys up to

1. `past + i` with a past inside, which is the lower-right rule when as many keys are new as rows;
2. i without one ("top left"): with T >= S keys this is the lower-right rule over the first S keys, so the others are cut off;
3. `n_b - S + i` with n_b real keys (nonpad_kv_seqlen), which is the lower-right rule once the real keys of item b are moved to the end.

Whether what remains is full causal attention is decided elsewhere. Left whole, with the reason: windows (opset 25) other than one
that says no more than `is_causal` does, and the product of queries and keys as an output.
"""

from __future__ import annotations

import math

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import op_names
from graph_passes.symbolic.poly import Poly, const, is_nonnegative

__all__ = ["PATTERN", "expand"]

PATTERN = "onnx Attention"

_KNOWN = op_names(
    "is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap softmax_precision left_window_size right_window_size"
)


def expand(m: Maker) -> None:
    query, key, value, mask, past_key, past_value, real_keys = m.inputs(7)
    m.refuse_unknown_attributes(_KNOWN)
    query, key, value = m.needed(query, key, value)
    if m.is_read(3):
        raise m.refusal(f"the product of queries and keys of the operator is used ({m.outputs[3].name}), which the new node does not make.")
    is_causal = _is_causal(m)
    flat = len(m.shape(query)) == 3
    if flat:
        heads, kv_heads = m.attribute("q_num_heads", 0), m.attribute("kv_num_heads", 0)
        query, key, value = m.heads_first(query, heads), m.heads_first(key, kv_heads), m.heads_first(value, kv_heads)
    q = m.shape(query, 4)
    key, value, past = join_past(m, key, value, past_key, past_value, (1, 2))
    masks: list[gs.Tensor] = [] if mask is None else [mask]
    offset = past if is_causal else None
    if real_keys is not None:
        if past_key is not None:
            raise m.refusal("it has both a past and a length for each batch item (nonpad_kv_seqlen), which its specification forbids.")
        if is_causal and q[2].value != 1:
            if masks:
                raise m.refusal(
                    "its is_causal counts the rows of each batch item from its own length (nonpad_kv_seqlen), and a mask does not."
                )
            key, value, real = _moved_to_the_end(m, key, value, real_keys)
            masks, offset = [real], m.shape(key)[2] - q[2]
        else:
            masks.append(shorter_than(m, key, real_keys))
            offset = None
    elif is_causal and past_key is None and not masks and q[2] != m.shape(key)[2] and is_nonnegative(m.shape(key)[2] - q[2]):
        rows = m.length(query, 2)
        key, value = (m.op("Slice", t, m.ints([0]), rows, m.ints([2]), shape=(*m.shape(t)[:2], q[2], m.shape(t)[3])) for t in (key, value))
    size = m.number(q[3], "head size")
    result = m.core(
        query,
        key,
        value,
        masks,
        pattern=PATTERN,
        scale=float(m.node.attrs.get("scale", 1.0 / math.sqrt(size))),
        softcap=float(m.node.attrs.get("softcap", 0.0)),
        offset=offset,
        into=None if flat else m.output(0),
    )
    if flat:
        m.rows_first(result, m.output(0))


def _is_causal(m: Maker) -> bool:
    """Whether no row sees a key after its own; windows that say more are refused."""
    left, right = m.attribute("left_window_size", -1), m.attribute("right_window_size", -1)
    is_causal = bool(m.attribute("is_causal", 0)) or right == 0
    if left >= 0:
        raise m.refusal(f"it has a sliding window (left_window_size {left}), which full attention does not have.")
    if right > 0 and not is_causal:
        raise m.refusal(f"it looks ahead (right_window_size {right}), which causal attention does not.")
    return is_causal


def join_past(
    m: Maker,
    key: gs.Tensor,
    value: gs.Tensor,
    past_key: gs.Tensor | None,
    past_value: gs.Tensor | None,
    present: tuple[int, int],
) -> tuple[gs.Tensor, gs.Tensor, Poly]:
    """Keys and values with the past in front, which are also the outputs numbered `present`; and the length of the past."""
    if (past_key is None) != (past_value is None):
        raise m.refusal("it has a past of keys or of values, but not of both.")
    past = const(0)
    out = []
    for new, old, k in ((key, past_key, present[0]), (value, past_value, present[1])):
        into = m.output(k)
        if old is not None:
            b, heads, length, size = m.shape(new, 4)
            past = m.shape(old, 4)[2]
            out.append(m.op("Concat", old, new, axis=2, into=into, shape=(b, heads, past + length, size)))
            continue
        if into is not None:
            m.op("Identity", new, into=into)
        out.append(new)
    return out[0], out[1], past


def _moved_to_the_end(m: Maker, key: gs.Tensor, value: gs.Tensor, lengths: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """Keys and values such that the last of the `lengths[b]` real ones of item b is the last of all, and [B, 1, 1, T]: which are real."""
    length = m.length(key, 2)
    columns = m.op("Unsqueeze", m.positions(length), m.ints([0]))
    missing = m.op("Unsqueeze", m.op("Sub", length, m.cast(lengths, onnx.TensorProto.INT64)), m.ints([1]))
    source = m.op("Max", m.op("Sub", columns, missing), m.ints(0))
    index = m.op("Unsqueeze", source, m.ints([1, 3]))
    key, value = (m.op("GatherElements", t, m.op("Expand", index, m.op("Shape", t)), axis=2, shape=m.shape(t)) for t in (key, value))
    return key, value, m.op("Unsqueeze", m.op("GreaterOrEqual", columns, missing), m.ints([1, 2]))


def shorter_than(m: Maker, key: gs.Tensor, lengths: gs.Tensor) -> gs.Tensor:
    """[B, 1, 1, T]: key j of batch item b is real when j < lengths[b]."""
    columns = m.op("Unsqueeze", m.positions(m.length(key, 2)), m.ints([0]))
    counts = m.op("Unsqueeze", m.cast(lengths, onnx.TensorProto.INT64), m.ints([1]))
    return m.op("Unsqueeze", m.op("Less", columns, counts), m.ints([1, 2]))
