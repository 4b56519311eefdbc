"""Attention over the allowed pairs inside kept blocks, at a cost that follows the kept blocks.

Standard operators have no ragged product. So the tiles of all batch items and heads are sorted by how many blocks they keep and split
into a few groups; each group gathers its tiles' kept keys, padded to the largest count in the group, and is then a plain batched
attention. Time follows the density, and no temporary is larger than an eighth of the full score matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graph_passes.body.builder import Builder, Value
from graph_passes.body.geometry import NOWHERE, Geometry, masked

__all__ = ["attend", "retained"]

BOUNDS = (0, 7, 13, 18, 22, 26, 29, 31, 32)
"""Where the groups begin and end, in 32nds of the sorted tiles. The last ones are small, because their width is the largest: the few tiles
that keep everything (`dense_rows`) then widen few others. More groups pad less; fewer have fewer nodes. With counts spread evenly, these
compute 1/13 of the key blocks in vain."""

GROUPS = len(BOUNDS) - 1


@dataclass(frozen=True)
class _Sorted:
    """The tiles of all (batch, head), R of them, those that keep fewest blocks first. Each has a slot for every key, kept keys first.

    order: [R] the tile at each place; place: [R] the place of each tile.
    sizes: [GROUPS] tiles in each group, 0 for some when R is small.
    widths: [GROUPS] slots that the last (widest) tile of each group fills.
    query: [R, height, D] with `height` rows of a tile; position: [R, height, 1] float.
    slot_block: [R, blocks] block of each slot.
    slot_key: [R, Tp] index of flattened (batch, key/value head, key).
    slot_position: [R, Tp] float, `NOWHERE` in slots that are not filled.
    """

    order: Value
    place: Value
    sizes: Value
    widths: Value
    query: Value
    position: Value
    slot_block: Value
    slot_key: Value
    slot_position: Value


def attend(g: Builder, geo: Geometry, kept: Value) -> Value:
    """kept: [B, H, tiles, blocks] bool. Returns [B, H, S, Dv] float32; a row with no key left gives zeros."""
    tiles = _sorted(g, geo, kept)
    values = geo.value.reshape(-1, geo.dv)
    outputs = [
        g.matmul(weights, values.gather(_slots(g, tiles, tiles.slot_key, group), axis=0))
        for group, weights in enumerate(_weights(g, geo, tiles))
    ]
    output = _by_row(g, geo, tiles, outputs, geo.dv)
    return output * _has_key(g, geo, kept) if geo.has_mask else output


def retained(g: Builder, geo: Geometry, seen: Value, kept: Value) -> Value:
    """[B, H, S]: the probability of attention over the `seen` blocks that lies in `kept` ones; 0 for a row with no key.

    Exactly 1 where nothing is dropped, because what is summed is the probability that is dropped.
    """
    tiles = _sorted(g, geo, seen)
    count = g.dim(tiles.order, 0)
    dropped = (~kept).to_float().reshape(count, geo.blocks).gather(tiles.order, axis=0)
    dropped = g.node("GatherElements", dropped, tiles.slot_block, kind="f", axis=1)
    dropped = dropped.unsqueeze(2).expand(count, geo.blocks, geo.block_k).reshape(count, geo.tp)
    shares = [g.matmul(weights, _slots(g, tiles, dropped, group).unsqueeze(2)) for group, weights in enumerate(_weights(g, geo, tiles))]
    share = 1.0 - _by_row(g, geo, tiles, shares, g.ints(1))
    return (share * _has_key(g, geo, seen) if geo.has_mask else share).reshape(geo.b, geo.h, geo.s)


def _sorted(g: Builder, geo: Geometry, kept: Value) -> _Sorted:
    count = geo.b * geo.h * geo.tiles
    height = geo.block_q.minimum(geo.s)  # a call shorter than a tile (decode) is not padded up to one
    kept = kept.reshape(count, geo.blocks).to_int()
    # Ascending, because ONNX Runtime computes the last input of the final Concat first: memory of wide groups then serves narrow ones.
    filled, order = g.nodes_of("TopK", kept.sum(1), count, kinds=("i", "i"), axis=0, largest=0)
    _, place = g.nodes_of("TopK", order, count, kinds=("i", "i"), axis=0, largest=0)
    bounds = g.ints(*BOUNDS) * count // BOUNDS[-1]
    starts, ends = bounds.slice(0, 0, GROUPS), bounds.slice(0, 1, GROUPS + 1)

    query = geo.query.pad_end(2, geo.tiles * height - geo.s).reshape(count, height, geo.d).gather(order, axis=0)
    position = (order % geo.tiles * height).unsqueeze(1) + geo.arange(height) + geo.offset

    # Ranks fall along the blocks, and are 0 for those not kept: sorting them puts kept blocks first, in order.
    rank = kept.gather(order, axis=0) * (geo.blocks - geo.arange(geo.blocks))
    rank, slot_block = g.nodes_of("TopK", rank, geo.blocks, kinds=("i", "i"), axis=1)
    head = order // (geo.tiles * geo.g)
    slot_key = (head.unsqueeze(1) * geo.t + slot_block * geo.block_k).unsqueeze(2) + geo.arange(geo.block_k)
    slot_key = slot_key.minimum(((head + 1) * geo.t - 1).unsqueeze(1, 2))  # past T the last key stands in, at a position that hides it
    # Positions are one table for the whole call, or one for each batch item.
    batch = order // (geo.tiles * geo.h) % g.dim(geo.key_position, 0)
    slot_position = geo.key_position.reshape(-1, geo.block_k).gather(batch.unsqueeze(1) * geo.blocks + slot_block, axis=0)
    slot_position = slot_position.maximum((rank <= 0).to_float().unsqueeze(2) * NOWHERE)
    return _Sorted(
        order=order,
        place=place,
        sizes=ends - starts,
        widths=filled.gather((ends - 1).maximum(0), axis=0) * geo.block_k,
        query=query,
        position=position.to_float().unsqueeze(2),
        slot_block=slot_block,
        slot_key=slot_key.reshape(count, geo.tp),
        slot_position=slot_position.reshape(count, geo.tp),
    )


def _weights(g: Builder, geo: Geometry, tiles: _Sorted) -> Iterator[Value]:
    """Of each group [M, height, W]: the probability of the keys in the W slots that its widest tile fills."""
    keys = geo.key.reshape(-1, geo.d)
    queries, positions = (g.split(x, tiles.sizes, GROUPS) for x in (tiles.query, tiles.position))
    for group in range(GROUPS):
        key = keys.gather(_slots(g, tiles, tiles.slot_key, group), axis=0)
        key_position = _slots(g, tiles, tiles.slot_position, group).unsqueeze(1)
        products = g.matmul(queries[group], key.transpose(0, 2, 1))
        yield g.softmax(masked(g, geo, products, positions[group], key_position))


def _slots(g: Builder, tiles: _Sorted, table: Value, group: int) -> Value:
    """[M, W]: the part of a table [R, Tp] that belongs to a group."""
    width = g.split(tiles.widths, g.ints(*[1] * GROUPS), GROUPS)[group]
    return g.split(table, tiles.sizes, GROUPS)[group].slice(1, 0, width)


def _by_row(g: Builder, geo: Geometry, tiles: _Sorted, results: Sequence[Value], width: Value) -> Value:
    """Brings the results [M, height, width] of all groups back in order: [B, H, S, width]."""
    rows = g.concat(*results, axis=0).gather(tiles.place, axis=0)
    return rows.reshape(geo.b, geo.h, geo.tiles * g.dim(tiles.query, 1), width).slice(2, 0, geo.s)


def _has_key(g: Builder, geo: Geometry, kept: Value) -> Value:
    """[B, H, S, 1] 1.0, or 0.0 for a row with no key left: the softmax of such a row means nothing."""
    block_position = geo.key_position.reshape(-1, 1, 1, geo.blocks, geo.block_k).min(-1)
    earliest = g.where(kept, block_position, NOWHERE).min(-1)  # [B, H, tiles]
    rows = geo.arange(geo.s)
    return (earliest.gather(rows // geo.block_q, axis=2) <= (rows + geo.offset).to_float()).to_float().unsqueeze(-1)
