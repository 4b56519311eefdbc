"""`com.microsoft.GroupQueryAttention` of ONNX Runtime, as its model builder and its generate() loop use it.

Taken out of it: packed queries, keys and values, the RMS norm of queries and keys, rotary embedding, and the cache. With S rows,
`total` = total_sequence_length and n_b = seqlens_k[b] + 1 real keys, item b has past_b = n_b - S keys from earlier calls (0 when
S = total: a first prompt). Its new keys are written at past_b, past_b + 1, ... of a buffer that holds max(past length, total)
keys; this serves a cache that grows and one that past and present share. Row i sees the keys up to past_b + i.

The new node reads the first total - S keys of the past and the new keys behind them: row i stands at total - S + i, sees the new
keys up to its own, and of the past those before past_b, which the key mask says. Left padding is not known to the operator, and
not to what is made of it. Left whole, with the reason: windows and ring buffers, sinks, a quantised cache, scores as an output,
attention that is not causal.
"""

from __future__ import annotations

import re

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.passes.expand.multi_head_attention import scale_of
from graph_passes.passes.expand.norms import rms_normalised
from graph_passes.passes.expand.rotary import turned
from graph_passes.symbolic.graph import op_names
from graph_passes.symbolic.logic import number
from graph_passes.symbolic.poly import Dim, Load, Poly, const, poly

__all__ = ["PATTERN", "expand"]

PATTERN = "com.microsoft.GroupQueryAttention"

_KNOWN = op_names(
    "num_heads kv_num_heads scale softcap do_rotary rotary_interleaved local_window_size smooth_softmax sliding_window_cache "
    "kv_cache_bit_width causal qk_output qk_norm_epsilon k_quant_type v_quant_type"
)


def expand(m: Maker) -> None:
    given = m.inputs(16)
    m.refuse_unknown_attributes(_KNOWN)
    _refuse_what_is_not_carried_over(m, given)
    query, key, value, past_key, past_value, seqlens, total, cos, sin, position_ids, bias, _, _, _, q_norm, k_norm = given
    query, seqlens, total = m.needed(query, seqlens, total)
    query, key, value = _four_axes(m, query, key, value)
    if q_norm is not None and k_norm is not None:
        epsilon = float(m.node.attrs.get("qk_norm_epsilon", 1e-6))
        query, key = rms_normalised(m, query, q_norm, epsilon), rms_normalised(m, key, k_norm, epsilon)
    cache = _Cache(m, query, seqlens, total)
    if m.flag("do_rotary"):
        cos, sin = m.needed(cos, sin)
        index = cache.rows if position_ids is None else cache.stated_rows(position_ids)
        interleaved = m.flag("rotary_interleaved")
        query, key = (turned(m, t, index, cos, sin, interleaved, share=True) for t in (query, key))
    key = cache.joined(past_key, key, m.output(1))
    value = cache.joined(past_value, value, m.output(2))
    masks = [cache.real_keys(key), *([] if bias is None else [m.same_lengths(bias, query, key)])]
    offset = m.shape(key)[2] - m.shape(query)[2]
    softcap = float(m.node.attrs.get("softcap", 0.0))
    result = m.core(query, key, value, masks, pattern=PATTERN, scale=scale_of(m, query), softcap=softcap, offset=offset)
    m.rows_first(result, m.output(0))


class _Cache:
    """Where the rows of a call stand, and the keys and values of all calls so far."""

    def __init__(self, m: Maker, query: gs.Tensor, seqlens: gs.Tensor, total: gs.Tensor) -> None:
        self.m = m
        self.batch, _, self.count, _ = m.shape(query, 4)
        self.keys = _total(m, total)
        self._call = (seqlens.name, total.name, self.batch, self.count)
        self.total = m.shared(("total", total.name), lambda: m.op("Reshape", m.cast(total, onnx.TensorProto.INT64), m.ints([1])))
        """[1]: the number of keys."""
        self.real = m.shared(
            ("real", seqlens.name),
            lambda: m.op("Add", m.op("Reshape", m.cast(seqlens, onnx.TensorProto.INT64), m.ints([-1])), m.ints([1])),
        )
        """[B]: the number of real keys of each batch item."""
        self._length = m.shared(("rows", *self._call), lambda: m.length(query, 2))
        self._numbers = m.shared(("numbers", *self._call), lambda: m.positions(self._length))
        self._is_prompt = m.shared(("is prompt", *self._call), lambda: m.op("Equal", self.total, self._length))
        self._past = m.shared(("past", *self._call), self._keys_of_earlier_calls)
        """[B, 1]: the keys of earlier calls."""
        self._kept = m.shared(("kept", *self._call), lambda: m.op("Sub", self.total, self._length))
        """[1]: the number of keys in front of the new ones."""
        self.rows = m.shared(("positions", *self._call), lambda: m.op("Add", self._past, self._numbers, shape=(self.batch, self.count)))
        """[B, S]: where each row stands."""

    def _keys_of_earlier_calls(self) -> gs.Tensor:
        m = self.m
        past = m.op("Where", self._is_prompt, m.ints([0]), m.op("Sub", self.real, self._length))
        return m.op("Unsqueeze", past, m.ints([1]))

    def stated_rows(self, position_ids: gs.Tensor) -> gs.Tensor:
        """Positions for the rotary embedding when they are an input; of a first prompt only the first number is used."""
        m = self.m

        def make() -> gs.Tensor:
            stated = m.cast(position_ids, onnx.TensorProto.INT64)
            first = m.op("Slice", m.op("Reshape", stated, m.ints([-1])), m.ints([0]), m.ints([1]))
            prompt = m.op("Add", m.op("Unsqueeze", first, m.ints([0])), self._numbers)
            return m.op("Where", self._is_prompt, prompt, stated, shape=(self.batch, self.count))

        return m.shared(("stated positions", position_ids.name, *self._call), make)

    def joined(self, past: gs.Tensor | None, new: gs.Tensor, present: gs.Tensor | None) -> gs.Tensor:
        """[B, Hkv, total, size]: what the new node reads; and the buffer as the output `present`."""
        m = self.m
        _, heads, count, size = m.shape(new, 4)
        if past is None:
            # Without a past every call is a first prompt, and total = S.
            return m.op("Identity", new, into=present) if present is not None else new
        length = m.shape(past, 4)[2]
        both = m.op("Concat", past, new, axis=2, shape=(self.batch, heads, length + count, size))
        if present is not None:
            at = m.op("Expand", m.op("Unsqueeze", self.rows, m.ints([1, 3])), m.op("Shape", new))
            held = m.op("Max", m.length(past, 2), self.total)
            m.op("Slice", m.op("ScatterElements", both, at, new, axis=2), m.ints([0]), held, m.ints([2]), into=present)
        if length + count == self.keys:
            return both
        kept = m.op("Slice", past, m.ints([0]), self._kept, m.ints([2]), shape=(self.batch, heads, self.keys - count, size))
        return m.op("Concat", kept, new, axis=2, shape=(self.batch, heads, self.keys, size))

    def real_keys(self, key: gs.Tensor) -> gs.Tensor:
        """[B, 1, 1, T]: true where a key is real."""
        keys = self.m.shape(key)[2]
        return self.m.shared(("real keys", keys, *self._call), lambda: self._real_keys(key))

    def _real_keys(self, key: gs.Tensor) -> gs.Tensor:
        m = self.m
        columns = m.op("Unsqueeze", m.positions(m.length(key, 2)), m.ints([0]))
        if m.shape(key)[2] == self.count:
            kept: gs.Tensor = m.ints([0])
        else:
            kept = self._kept
        behind = m.op("GreaterOrEqual", columns, kept)
        position = m.op("Add", m.op("Sub", columns, kept), self._past)
        written = m.op("Less", position, m.op("Unsqueeze", self.real, m.ints([1])))
        real = m.op("Or", m.op("Less", columns, self._past), m.op("And", behind, written), shape=(self.batch, m.shape(key)[2]))
        m.sg.opaque.add(real.name)
        return m.op("Unsqueeze", real, m.ints([1, 2]))


def _total(m: Maker, total: gs.Tensor) -> Poly:
    """total_sequence_length as a length: what its value is known to be, or else a length of that name, the same for all layers."""
    known = number(m.sg.value(total, (const(0),) * len(m.shape(total))))
    if isinstance(known, Poly) and not any(isinstance(s, Load) for s in known.symbols):
        return known
    return poly(Dim(re.sub(r"\W", "_", total.name)))


def _four_axes(m: Maker, query: gs.Tensor, key: gs.Tensor | None, value: gs.Tensor | None) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    heads, kv_heads = m.attribute("num_heads", 0), m.attribute("kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise m.refusal(f"its {heads} query heads are not a multiple of its {kv_heads} key/value heads.")
    if key is None and value is None:
        width = m.number(m.shape(query, 3)[2], "width")
        size = width // (heads + 2 * kv_heads)
        m.op("Split", query, m.ints([heads * size, kv_heads * size, kv_heads * size]), axis=2, outputs=3)
        query, key, value = m.results()
    key, value = m.needed(key, value)
    if len(m.shape(key)) != 3:
        raise m.refusal("its keys come from another layer's cache, which is not carried over.")
    return m.heads_first(query, heads), m.heads_first(key, kv_heads), m.heads_first(value, kv_heads)


def _refuse_what_is_not_carried_over(m: Maker, given: list[gs.Tensor | None]) -> None:
    window = m.attribute("local_window_size", -1)
    if m.attribute("sliding_window_cache", 0):
        raise m.refusal("its cache is a ring that holds a window only (sliding_window_cache), which full attention cannot read.")
    if window > 0:
        raise m.refusal(f"it has a sliding window (local_window_size {window}), which full attention does not have.")
    if given[11] is not None or m.attribute("smooth_softmax", 0):
        raise m.refusal(
            "a sink is added to the sum of its probabilities (head_sink or smooth_softmax), which full attention does not have."
        )
    if given[12] is not None or given[13] is not None or m.attribute("kv_cache_bit_width", 0) in (4, 8):
        raise m.refusal("its cache is quantised, which is not carried over.")
    if not m.attribute("causal", 1):
        raise m.refusal("it is not causal (causal 0): every row sees every key.")
    if m.attribute("qk_output", 0) or m.is_read(3):
        raise m.refusal("its scores are an output, which the new node does not make.")
    if (given[14] is None) != (given[15] is None):
        raise m.refusal("it has a norm for queries or for keys, but not for both.")
