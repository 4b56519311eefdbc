"""What every policy shares: sizes, positions and operands of a call, or of a part of it.

Letters: B batch, H query heads, N key/value heads, G = H / N, S query rows, T keys, D and Dv head sizes; Tp is T padded to whole blocks.

Masks are comparisons of positions: a pair is allowed when the key's position is at most the query's, and a padding key stands
beyond every query. Positions are float32 where they meet scores; they are exact below 2**23 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graph_passes.body.builder import Builder, Value

__all__ = ["NOWHERE", "Geometry", "geometry", "masked"]

NOWHERE = 2.0**24
"""Position of a key that no query may look at."""

_STEEP = 2.0**64


@dataclass(frozen=True)
class Geometry:
    b: Value
    h: Value
    n: Value
    g: Value
    s: Value
    t: Value
    d: Value
    dv: Value
    block_q: Value
    block_k: Value
    tiles: Value
    blocks: Value
    tp: Value
    offset: Value  # position of query row 0
    first: Value  # [tiles] position of a tile's first row
    last: Value  # [tiles] position of a tile's last row
    block_first: Value  # [blocks] first key of a block
    query: Value  # [B, H, S, D] float32, scaled (and divided by the soft-cap)
    key: Value  # [B, N, T, D] float32; in a part [B, N, Tp, D]
    value: Value  # [B, N, T, Dv] float32; in a part [B, N, Tp, Dv]
    key_position: Value  # [B or 1, Tp] float32
    row_real: Value  # [B or 1, S] bool
    counting: Value  # 0, 1, ... beyond every index of a row, key, tile or block
    has_mask: bool
    softcap: bool

    def arange(self, count: Value) -> Value:
        """[count] 0, 1, ...; count is at most T plus a tile."""
        return self.counting.slice(0, 0, count)

    def part(self, start: Value | int, end: Value, limit: Value) -> Geometry:
        """The call that consists of tiles `start` .. `end` - 1 alone, and sees at most `limit` key blocks."""
        row_start, row_end = self.block_q * start, (self.block_q * end).minimum(self.s)
        t = self.offset + row_end
        blocks = t.ceil_div(self.block_k).minimum(limit)
        tp = blocks * self.block_k
        padding = (tp - self.t).maximum(0)
        return replace(
            self,
            s=row_end - row_start,
            t=t,
            tiles=end - start,
            blocks=blocks,
            tp=tp,
            offset=self.offset + row_start,
            first=self.first.slice(0, start, end),
            last=self.last.slice(0, start, end),
            block_first=self.block_first.slice(0, 0, blocks),
            query=self.query.slice(2, row_start, row_end),
            key=self.key.slice(2, 0, tp).pad_end(2, padding),
            value=self.value.slice(2, 0, tp).pad_end(2, padding),
            key_position=self.key_position.slice(1, 0, tp),
            row_real=self.row_real.slice(1, row_start, row_end),
        )


def geometry(g: Builder, *, has_mask: bool, softcap: bool) -> Geometry:
    formals = [g.formal(name, "t") for name in ("query", "key", "value")]
    block_q, block_k = g.attribute("block_q", "INT"), g.attribute("block_k", "INT")
    (b, h, s, d), (_, n, t, _), (*_, dv) = g.dims(*formals)
    tiles, blocks = s.ceil_div(block_q), t.ceil_div(block_k)
    tp = blocks * block_k
    offset = t - s
    counting = g.arange(tp + block_q)
    starts = counting.slice(0, 0, tiles) * block_q
    keys = counting.slice(0, 0, tp)
    scale = g.attribute("scale", "FLOAT")
    if has_mask:
        key_mask = g.formal("key_mask", "b").to_int().pad_end(1, tp - t) > 0
        key_position = g.where(key_mask, keys.to_float(), NOWHERE)
    else:
        key_position = keys.to_float().unsqueeze(0)
    query, key, value = (g.of_hidden_rank(formal.to_float()) for formal in formals)
    query_scale = scale / g.attribute("softcap", "FLOAT") if softcap else scale
    return Geometry(
        b=b,
        h=h,
        n=n,
        g=h // n,
        s=s,
        t=t,
        d=d,
        dv=dv,
        block_q=block_q,
        block_k=block_k,
        tiles=tiles,
        blocks=blocks,
        tp=tp,
        offset=offset,
        first=starts + offset,
        last=(starts + block_q).minimum(s) + offset - 1,
        block_first=counting.slice(0, 0, blocks) * block_k,
        query=query * query_scale,
        key=key,
        value=value,
        key_position=key_position,
        row_real=key_position.slice(1, offset, t) < NOWHERE,
        counting=counting,
        has_mask=has_mask,
        softcap=softcap,
    )


def masked(g: Builder, geo: Geometry, products: Value, query_position: Value, key_position: Value) -> Value:
    """Scores from the products of `geo.query` and keys: soft-capped, and immensely negative where the key stands after the query.

    The positions are float32 and broadcast against the products. A minimum with a ramp that crosses zero between the query's position
    and the next is cheaper than a comparison and a choice: one temporary of the size of the scores, and none of bool or int64.
    """
    scores = g.node("Tanh", products, kind="f") * g.attribute("softcap", "FLOAT") if geo.softcap else products
    ramp = (query_position + 0.5) * _STEEP - key_position * _STEEP
    return scores.minimum(ramp)
