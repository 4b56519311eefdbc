"""Samplers: what each policy looks at, reduced to block masses (steps 1 and 2 of the specification).

A body has no branches, so a call that is full attention anyway (decode, short prompts) samples too, but sees the first key block only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graph_passes.body.builder import Builder, Value
from graph_passes.body.geometry import Geometry, masked
from graph_passes.op import DECODE_MAX_ROWS

__all__ = ["Sample", "is_full_call", "sample"]

PARTS = 4
"""`residue` and `tile` sample so many runs of tiles one after the other: early ones see few keys, and temporaries are smaller."""


@dataclass(frozen=True)
class Sample:
    """Sampled probability of one call.

    rows: [R] index of each sampled row (below S).
    ok: [B or 1, 1, R] bool: the row is sampled, real, and has a key to look at; other rows have no probability.
    by_block: gives [B, H, R, blocks] (only the certificate needs it).
    mass: [B, H, tiles, blocks], weighted by the values, or [B, H, 1, blocks] of sum 1; all 0 without evidence.
    slash_mass: [B, H, 1, blocks] by distance, for `column_slash`.
    """

    rows: Value
    ok: Value
    by_block: Callable[[], Value]
    mass: Value
    slash_mass: Value | None = None


def is_full_call(g: Builder, geo: Geometry) -> Value:
    """[1] bool: whether every head is full attention, for the sizes of the call."""
    return (g.attribute("min_length", "INT") > geo.t) | (geo.s <= DECODE_MAX_ROWS)


def sample(g: Builder, geo: Geometry, policy: str) -> Sample:
    limit = g.where(is_full_call(g, geo), g.ints(1), geo.blocks)
    if policy == "residue":
        return _in_parts(g, geo, limit, _residue, geo.block_q)
    if policy == "tile":
        return _in_parts(g, geo, limit, _tile, g.attribute("sample_rows", "INT"))
    call = geo.part(0, geo.tiles, limit)
    got = (_column_slash if policy == "column_slash" else _stripe_window)(g, call)
    unseen = geo.blocks - call.blocks
    slash_mass = None if got.slash_mass is None else got.slash_mass.pad_end(3, unseen)
    return Sample(got.rows, got.ok, lambda: got.by_block().pad_end(3, unseen), got.mass.pad_end(3, unseen), slash_mass)


def _in_parts(g: Builder, geo: Geometry, limit: Value, sampler: Callable[[Builder, Geometry], Sample], tile_rows: Value) -> Sample:
    """A policy whose tiles do not depend on each other, over runs of tiles. tile_rows: sampled rows of a tile."""
    run = geo.tiles.ceil_div(g.ints(PARTS))
    # Surplus parts repeat the last tile: ONNX Runtime reduces empty tensors wrongly.
    starts = [(run * i).minimum(geo.tiles - 1) for i in range(PARTS)]
    calls = [geo.part(start, (run * (i + 1)).minimum(geo.tiles), limit) for i, start in enumerate(starts)]
    parts = [sampler(g, call) for call in calls]
    count = geo.tiles * tile_rows

    def by_block() -> Value:
        sums = [part.by_block().pad_end(3, geo.blocks - call.blocks) for part, call in zip(parts, calls, strict=True)]
        return g.concat(*sums, axis=2).slice(2, 0, count)

    mass = [part.mass.pad_end(3, geo.blocks - call.blocks) for part, call in zip(parts, calls, strict=True)]
    return Sample(
        rows=g.concat(*(part.rows + geo.block_q * start for part, start in zip(parts, starts, strict=True)), axis=0).slice(0, 0, count),
        ok=g.concat(*(part.ok for part in parts), axis=2).slice(2, 0, count),
        by_block=by_block,
        mass=g.concat(*mass, axis=2).slice(2, 0, geo.tiles),
    )


def _residue(g: Builder, geo: Geometry) -> Sample:
    """Row i looks at the keys j with (p_i + j) mod stride = 0: a batched product over the stride classes of rows, 1/stride of QK^T."""
    stride = g.attribute("stride", "INT")
    sp = geo.tiles * geo.block_q
    row_steps, key_steps, tile_steps = sp // stride, geo.tp // stride, geo.block_q // stride
    row_class = geo.arange(stride)
    key_class = (row_class + geo.offset) * -1 % stride
    rows = geo.arange(row_steps) * stride + row_class.unsqueeze(1)  # [stride, row_steps]
    keys = geo.arange(key_steps) * stride + key_class.unsqueeze(1)  # [stride, key_steps]

    query = geo.query.pad_end(2, sp - geo.s).reshape(geo.b, geo.n, geo.g, row_steps, stride, geo.d)
    query = query.transpose(0, 1, 4, 2, 3, 5).reshape(geo.b, geo.n, stride, geo.g * row_steps, geo.d)
    key = geo.key.reshape(geo.b, geo.n, key_steps, stride, geo.d).gather(key_class, axis=3).transpose(0, 1, 3, 4, 2)
    products = g.matmul(query, key).reshape(geo.b, geo.n, stride, geo.g, row_steps, key_steps)

    position = (rows + geo.offset).to_float()
    key_position = geo.key_position.gather(keys, axis=1)  # [B or 1, stride, key_steps]
    p = g.softmax(masked(g, geo, products, position.unsqueeze(0, 1, 3, 5), key_position.unsqueeze(1, 3, 4)))
    # Rows past S are padding; an early row may have no key of its class before it.
    has_key = key_position.min(-1, keepdims=True) <= position
    inside = rows.minimum(geo.s - 1)
    ok = (rows < geo.s) & geo.row_real.gather(inside, axis=1) & has_key  # [B or 1, stride, row_steps]

    by_tile = p.reshape(geo.b, geo.n, stride, geo.g, geo.tiles, tile_steps, key_steps)
    by_tile = _sum_of_rows(g, by_tile, ok.reshape(-1, 1, stride, 1, geo.tiles, tile_steps))
    weight = _weights(g, geo).reshape(geo.b, geo.n, key_steps, stride).gather(key_class, axis=3).transpose(0, 1, 3, 2)
    mass = (by_tile * weight.unsqueeze(3, 4, 5)).reshape(geo.b, geo.n, stride, geo.g, geo.tiles, geo.blocks, -1).sum(2, 6)

    def by_block() -> Value:
        sums = p.reshape(geo.b, geo.n, stride, geo.g, row_steps, geo.blocks, -1).sum(-1) * ok.to_float().unsqueeze(1, 3, 5)
        return sums.transpose(0, 1, 3, 2, 4, 5).reshape(geo.b, geo.h, sp, geo.blocks)

    return Sample(inside.reshape(-1), ok.reshape(-1, 1, sp), by_block, mass.reshape(geo.b, geo.h, geo.tiles, geo.blocks))


def _tile(g: Builder, geo: Geometry) -> Sample:
    """`sample_rows` rows at equal stride in each tile, counted back from its last row."""
    count = g.attribute("sample_rows", "INT")
    back = geo.arange(count) * (geo.block_q // count)
    rows = (geo.last - geo.offset).unsqueeze(1) - back  # [tiles, count]
    inside = rows >= (geo.first - geo.offset).unsqueeze(1)
    exact = _all_keys(g, geo, rows.reshape(-1), inside.reshape(-1))
    by_tile = exact.p.reshape(geo.b, geo.h, geo.tiles, count, geo.tp)
    by_tile = _sum_of_rows(g, by_tile, exact.ok.reshape(-1, 1, geo.tiles, count))
    weighted = by_tile.reshape(geo.b, geo.n, geo.g * geo.tiles, geo.tp) * _weights(g, geo).unsqueeze(2)
    return exact.sample(geo, _by_block(geo, weighted))


def _column_slash(g: Builder, geo: Geometry) -> Sample:
    """The last `sample_rows` rows of every segment; masses by key block and by distance."""
    segment = g.attribute("segment", "INT")
    segment_last = geo.s - 1 - geo.arange(geo.s.ceil_div(segment)) * segment
    rows = (segment_last.unsqueeze(1) - geo.arange(g.attribute("sample_rows", "INT").minimum(geo.s))).reshape(-1)
    exact = _all_keys(g, geo, rows, rows >= 0)
    # Column u of `skewed` is distance u. A distance beyond the row's position wraps round to a later key, whose probability is 0.
    count = g.dim(rows, 0)
    key = ((exact.rows + geo.offset).unsqueeze(1) - geo.arange(geo.tp)) % geo.tp
    flat = (key + (g.arange(count) * geo.tp).unsqueeze(1)).reshape(-1)
    skewed = exact.p.reshape(geo.b, geo.h, count * geo.tp).gather(flat, axis=2).reshape(geo.b, geo.h, count, geo.tp)
    return exact.sample(geo, _head_mass(g, geo, exact.p, exact.ok), _head_mass(g, geo, skewed, exact.ok))


def _stripe_window(g: Builder, geo: Geometry) -> Sample:
    """Every round(1 / sample_ratio)-th row of the call, counted back from the last."""
    reciprocal = g.constant(1.0, "f") / g.attribute("sample_ratio", "FLOAT")
    step = g.node("Round", reciprocal, kind="f").minimum(2.0**30).to_int()
    rows = geo.s - 1 - geo.arange(geo.s.ceil_div(step)) * step
    exact = _all_keys(g, geo, rows, rows >= 0)
    return exact.sample(geo, _head_mass(g, geo, exact.p, exact.ok))


@dataclass(frozen=True)
class _ExactRows:
    """Some rows with their softmax over all their allowed keys.

    rows: [R] brought inside the call; ok: [B or 1, 1, R]; p: [B, H, R, Tp], of no meaning where not ok.
    """

    rows: Value
    ok: Value
    p: Value

    def sample(self, geo: Geometry, mass: Value, slash_mass: Value | None = None) -> Sample:
        return Sample(self.rows, self.ok, lambda: _by_block(geo, self.p) * self.ok.to_float().unsqueeze(-1), mass, slash_mass)


def _all_keys(g: Builder, geo: Geometry, rows: Value, inside: Value) -> _ExactRows:
    rows = rows.maximum(0)
    position = (rows + geo.offset).to_float()
    count = g.dim(rows, 0)
    query = geo.query.gather(rows, axis=2).reshape(geo.b, geo.n, geo.g * count, geo.d)
    products = g.matmul(query, geo.key.transpose(0, 1, 3, 2)).reshape(geo.b, geo.h, count, geo.tp)
    p = g.softmax(masked(g, geo, products, position.unsqueeze(1), geo.key_position.unsqueeze(1, 2)))
    ok = inside & geo.row_real.gather(rows, axis=1)  # a real row sees itself
    return _ExactRows(rows, ok.unsqueeze(1), p)


def _sum_of_rows(g: Builder, p: Value, ok: Value) -> Value:
    """[..., 1, keys] from p [..., rows, keys] and ok [..., rows]: the sum over the rows that are ok, in one pass over p."""
    return g.matmul(ok.to_float().unsqueeze(-2), p)


def _weights(g: Builder, geo: Geometry) -> Value:
    """[B, N, Tp]: the norm of each value row, or 1 where `value_weight` is 0."""
    norm = g.node("Sqrt", (geo.value * geo.value).sum(-1), kind="f")
    return (norm - 1.0) * g.attribute("value_weight", "INT").to_float() + 1.0


def _head_mass(g: Builder, geo: Geometry, p: Value, ok: Value) -> Value:
    """[B, H, 1, blocks] of sum 1, or 0 without evidence, from the sum over all sampled rows."""
    mass = _by_block(geo, _sum_of_rows(g, p, ok))
    return mass / mass.sum(-1, keepdims=True).maximum(1e-30)


def _by_block(geo: Geometry, p: Value) -> Value:
    """[B, H, ..., blocks]"""
    return p.reshape(geo.b, geo.h, -1, geo.blocks, geo.block_k).sum(-1)
