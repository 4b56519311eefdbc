"""Samplers: what each policy looks at, reduced to block masses (steps 1 and 2 of the specification).

A sampler gives the sampled probability by (row, key block), from which masses and the certificate follow. A body has no branches, so a call
that is full attention anyway (decode, short prompts) samples too, but sees the first key block only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graph_passes.body.builder import Builder, Value
from graph_passes.body.geometry import Geometry, masked
from graph_passes.op import DECODE_MAX_ROWS

__all__ = ["Sample", "is_full_call", "sample"]


@dataclass(frozen=True)
class Sample:
    """Sampled probability of one call.

    rows: [R] index of each sampled row (below S).
    ok: [B or 1, 1, R] bool: the row is sampled, real, and has a key to look at; other rows have no probability.
    by_block: gives [B, H, R, sampled blocks] (only the certificate needs it).
    mass: [B, H, tiles, blocks], weighted by the values, or [B, H, 1, blocks] of sum 1; all 0 without evidence.
    slash_mass: [B, H, 1, blocks] by distance, for `column_slash`.
    """

    rows: Value
    ok: Value
    by_block: Callable[[], Value]
    mass: Value
    slash_mass: Value | None = None


@dataclass(frozen=True)
class _Keys:
    """The keys that a sampler sees: `tp` of them in `blocks` blocks; key [B, N, tp, D], value [B, N, tp, Dv], position [B or 1, tp]."""

    blocks: Value
    tp: Value
    key: Value
    value: Value
    position: Value


def is_full_call(g: Builder, geo: Geometry) -> Value:
    """[1] bool: whether every head is full attention, for the sizes of the call."""
    return (g.attribute("min_length", "INT") > geo.t) | (geo.s <= DECODE_MAX_ROWS)


def sample(g: Builder, geo: Geometry, policy: str) -> Sample:
    blocks = g.where(is_full_call(g, geo), g.ints(1), geo.blocks)
    tp = blocks * geo.block_k
    keys = _Keys(blocks, tp, geo.key.slice(2, 0, tp), geo.value.slice(2, 0, tp), geo.key_position.slice(1, 0, tp))
    samplers = {"residue": _residue, "tile": _tile, "column_slash": _column_slash, "stripe_window": _stripe_window}
    return samplers[policy](g, geo, keys)


def _residue(g: Builder, geo: Geometry, keys: _Keys) -> Sample:
    """Row i looks at the keys j with (p_i + j) mod stride = 0: a batched product over the stride classes of rows, 1/stride of QK^T."""
    stride = g.attribute("stride", "INT")
    sp = geo.tiles * geo.block_q
    row_steps, key_steps = sp // stride, keys.tp // stride
    row_class = geo.arange(stride)
    key_class = (row_class + geo.offset) * -1 % stride
    rows = geo.arange(row_steps) * stride + row_class.unsqueeze(1)  # [stride, row_steps]
    key_index = geo.arange(key_steps) * stride + key_class.unsqueeze(1)  # [stride, key_steps]

    query = geo.query.pad_end(2, sp - geo.s).reshape(geo.b, geo.n, geo.g, row_steps, stride, geo.d)
    query = query.transpose(0, 1, 4, 2, 3, 5).reshape(geo.b, geo.n, stride, geo.g * row_steps, geo.d)
    key = keys.key.reshape(geo.b, geo.n, key_steps, stride, geo.d).gather(key_class, axis=3).transpose(0, 1, 3, 4, 2)
    products = g.matmul(query, key).reshape(geo.b, geo.n, stride, geo.g, row_steps, key_steps)

    position = rows + geo.offset
    key_position = keys.position.gather(key_index, axis=1)  # [B or 1, stride, key_steps]
    scores = masked(g, geo, products, position.to_float().unsqueeze(0, 1, 3, 5), key_position.unsqueeze(1, 3, 4))
    # Rows past S are padding; an early row may have no key of its class before it.
    has_key = key_position.min(-1, keepdims=True) <= position.to_float()
    ok = (rows < geo.s) & geo.is_real(position.minimum(geo.t - 1)) & has_key  # [B or 1, stride, row_steps]
    p = g.softmax(scores)
    present = ok.to_float().unsqueeze(1, 3, 5)
    weight = _weights(g, keys).reshape(geo.b, geo.n, key_steps, stride).gather(key_class, axis=3).transpose(0, 1, 3, 2).unsqueeze(3, 4)

    def by_block(x: Value) -> Value:
        return x.reshape(geo.b, geo.n, stride, geo.g, row_steps, keys.blocks, -1).sum(-1) * present

    per_tile = by_block(p * weight).reshape(geo.b, geo.n, stride, geo.g, geo.tiles, -1, keys.blocks).sum(2, 5)
    count = stride * row_steps
    return Sample(
        rows=rows.reshape(-1).minimum(geo.s - 1),
        ok=ok.reshape(-1, 1, count),
        by_block=lambda: by_block(p).transpose(0, 1, 3, 2, 4, 5).reshape(geo.b, geo.h, count, keys.blocks),
        mass=per_tile.reshape(geo.b, geo.h, geo.tiles, keys.blocks).pad_end(3, geo.blocks - keys.blocks),
    )


def _tile(g: Builder, geo: Geometry, keys: _Keys) -> Sample:
    """`sample_rows` rows at equal stride in each tile, counted back from its last row."""
    count = g.attribute("sample_rows", "INT")
    back = geo.arange(count) * (geo.block_q // count)
    rows = (geo.last - geo.offset).unsqueeze(1) - back  # [tiles, count]
    inside = rows >= (geo.first - geo.offset).unsqueeze(1)
    rows, ok, p = _all_keys(g, geo, keys, rows.reshape(-1), inside.reshape(-1))
    by_key = p.reshape(geo.b, geo.n, geo.g * geo.tiles, count, keys.tp).sum(3) * _weights(g, keys).unsqueeze(2)
    mass = by_key.reshape(geo.b, geo.h, geo.tiles, keys.blocks, geo.block_k).sum(-1).pad_end(3, geo.blocks - keys.blocks)
    return Sample(rows, ok, lambda: _by_block(geo, keys, p), mass)


def _column_slash(g: Builder, geo: Geometry, keys: _Keys) -> Sample:
    """The last `sample_rows` rows of every segment; masses by key block and by distance."""
    segment = g.attribute("segment", "INT")
    segment_last = geo.s - 1 - geo.arange(geo.s.ceil_div(segment)) * segment
    rows = segment_last.unsqueeze(1) - geo.arange(g.attribute("sample_rows", "INT").minimum(geo.s))
    rows = rows.reshape(-1)
    rows, ok, p = _all_keys(g, geo, keys, rows, rows >= 0)
    by_block = _by_block(geo, keys, p)
    mass = _normalised(geo, keys, by_block.sum(2, keepdims=True))
    # Column u of `skewed` is distance u. A distance beyond the row's position wraps round to a later key, whose probability is 0.
    count = g.dim(rows, 0)
    key = ((rows + geo.offset).unsqueeze(1) - geo.arange(keys.tp)) % keys.tp
    flat = (key + (g.arange(count) * keys.tp).unsqueeze(1)).reshape(-1)
    skewed = p.reshape(geo.b, geo.h, count * keys.tp).gather(flat, axis=2)
    by_distance = skewed.reshape(geo.b, geo.h, count, keys.blocks, geo.block_k).sum(2, 4).unsqueeze(2)
    return Sample(rows, ok, lambda: by_block, mass, _normalised(geo, keys, by_distance))


def _stripe_window(g: Builder, geo: Geometry, keys: _Keys) -> Sample:
    """Every round(1 / sample_ratio)-th row of the call, counted back from the last."""
    reciprocal = g.constant(1.0, "f") / g.attribute("sample_ratio", "FLOAT")
    step = g.node("Round", reciprocal, kind="f").minimum(2.0**30).to_int()
    rows = geo.s - 1 - geo.arange(geo.s.ceil_div(step)) * step
    rows, ok, p = _all_keys(g, geo, keys, rows, rows >= 0)
    by_block = _by_block(geo, keys, p)
    mass = _normalised(geo, keys, by_block.sum(2, keepdims=True))
    return Sample(rows, ok, lambda: by_block, mass)


def _all_keys(g: Builder, geo: Geometry, keys: _Keys, rows: Value, inside: Value) -> tuple[Value, Value, Value]:
    """Exact softmax of some rows over all their allowed keys.

    Returns: rows [R] brought inside the call, ok [B or 1, 1, R], probability [B, H, R, tp] (zero where not ok).
    """
    rows = rows.maximum(0)
    position = rows + geo.offset
    count = g.dim(rows, 0)
    query = geo.query.gather(rows, axis=2).reshape(geo.b, geo.n, geo.g * count, geo.d)
    products = g.matmul(query, keys.key.transpose(0, 1, 3, 2)).reshape(geo.b, geo.h, count, keys.tp)
    scores = masked(g, geo, products, position.to_float().unsqueeze(1), keys.position.unsqueeze(1, 2))
    ok = (inside & geo.is_real(position)).unsqueeze(1)  # a real row sees itself
    return rows, ok, g.softmax(scores) * ok.to_float().unsqueeze(-1)


def _weights(g: Builder, keys: _Keys) -> Value:
    """[B, N, tp]: the norm of each value row, or 1 where `value_weight` is 0."""
    norm = g.node("Sqrt", (keys.value * keys.value).sum(-1), kind="f")
    return (norm - 1.0) * g.attribute("value_weight", "INT").to_float() + 1.0


def _by_block(geo: Geometry, keys: _Keys, p: Value) -> Value:
    return p.reshape(geo.b, geo.h, -1, keys.blocks, geo.block_k).sum(-1)


def _normalised(geo: Geometry, keys: _Keys, mass: Value) -> Value:
    """[..., blocks] of sum 1, or 0 without evidence."""
    return (mass / mass.sum(-1, keepdims=True).maximum(1e-30)).pad_end(3, geo.blocks - keys.blocks)
