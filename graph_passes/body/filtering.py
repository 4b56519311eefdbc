"""From block masses to the block mask (steps 3 to 6 of the specification), and the certificate."""

from __future__ import annotations

from graph_passes.body.builder import Builder, Value
from graph_passes.body.geometry import NOWHERE, Geometry
from graph_passes.body.policies import Sample, is_full_call

__all__ = ["block_mask", "certificate", "full_heads"]


def full_heads(g: Builder, geo: Geometry, policy: str) -> Value:
    """[1, H or 1, 1, 1] bool: heads that are full attention, exactly."""
    full = is_full_call(g, geo) | (_alpha(g, "alpha") >= 1.0)
    return full | (_alpha(g, "alpha_slash") >= 1.0) if policy == "column_slash" else full


def block_mask(g: Builder, geo: Geometry, policy: str, sampled: Sample, full: Value) -> Value:
    """[B, H, tiles, blocks] bool: the key blocks that each tile of queries reads."""
    forced = _forced(g, geo, policy)
    alpha = _alpha(g, "alpha")
    if policy in ("residue", "tile"):
        free = sampled.mass * (~forced).to_float()
        share = free / free.sum(-1, keepdims=True).maximum(1e-37)
        nothing_seen = ~(sampled.mass.sum(-1, keepdims=True) > 0.0)
        # All of the mass may be forced: then no other block is wanted, although none of them reaches alpha.
        kept = (_smallest_set(g, geo, share, alpha, _room(g, geo, forced)) & (free > 0.0)) | forced | nothing_seen
    else:
        kept = _smallest_set(g, geo, sampled.mass, alpha) | forced
    if sampled.slash_mass is not None:
        kept = kept | _on_slashes(g, geo, _smallest_set(g, geo, sampled.slash_mass, _alpha(g, "alpha_slash")))
    # Where a head has no evidence all masses are 0 and never reach alpha: everything is kept, as the specification wants.
    return (kept | full | _dense_tiles(g, geo)) & _causal_blocks(geo)


def dense_block_mask(geo: Geometry) -> Value:
    """[B, H, tiles, blocks] bool: every block that the tile may see."""
    return _causal_blocks(geo).expand(geo.b, geo.h, geo.tiles, geo.blocks)


def certificate(g: Builder, geo: Geometry, sampled: Sample, kept: Value, full: Value) -> Value:
    """[B, H, 2]: min and mean over the sampled rows of the sampled probability inside kept blocks."""
    by_block = sampled.by_block()
    dropped = (~kept).gather(sampled.rows // geo.block_q, axis=2).to_float()
    lost = (by_block * dropped).sum(-1)  # 0 for rows without a sample
    count = sampled.ok.to_float().sum(-1, keepdims=True).maximum(1.0)
    pair = 1.0 - g.concat(lost.max(-1, keepdims=True), lost.sum(-1, keepdims=True) / count, axis=-1)
    return g.where(full.reshape(1, -1, 1), 1.0, pair)


def _alpha(g: Builder, name: str) -> Value:
    return g.attribute(name, "FLOATS").reshape(1, -1, 1, 1)


def _causal_blocks(geo: Geometry) -> Value:
    return geo.block_first <= geo.last.unsqueeze(1)


def _real_span(g: Builder, geo: Geometry) -> tuple[Value, Value]:
    """[B or 1, 1, 1, 1] float: the first real key, and one past the last."""
    real = geo.key_position < NOWHERE
    last = g.where(real, geo.key_position, -1.0).max(-1).minimum((geo.t - 1).to_float())
    return geo.key_position.min(-1).reshape(-1, 1, 1, 1), last.reshape(-1, 1, 1, 1) + 1.0


def _forced(g: Builder, geo: Geometry, policy: str) -> Value:
    """[B or 1, 1, tiles, blocks]: own blocks and window, and the blocks of the sink."""
    window, sink = g.attribute("window", "INT"), g.attribute("sink", "INT")
    if policy == "stripe_window":
        share = g.node("Ceil", g.attribute("window_ratio", "FLOAT") * geo.t.to_float(), kind="f").to_int()
        window = window.maximum(share)
    end = geo.block_first + geo.block_k
    near = (end > (geo.first - window).unsqueeze(1)) & (geo.block_first <= geo.last.unsqueeze(1))
    first, _ = _real_span(g, geo)
    return near | ((end.to_float() > first) & (geo.block_first.to_float() < first + sink.to_float()) & (sink > 0))


def _dense_tiles(g: Builder, geo: Geometry) -> Value:
    """[B or 1, 1, tiles, 1]: tiles that meet the last `dense_rows` positions."""
    _, end = _real_span(g, geo)
    dense_rows = g.attribute("dense_rows", "INT")
    first, last = (x.to_float().unsqueeze(1) for x in (geo.first, geo.last))
    return (last >= end - dense_rows.to_float()) & (first < end) & (dense_rows > 0)


def _room(g: Builder, geo: Geometry, forced: Value) -> Value:
    """[B or 1, 1, tiles, 1]: how many blocks the budget leaves beside the forced ones (without a budget, all of them)."""
    causal = _causal_blocks(geo)
    budget = g.node("Ceil", g.attribute("max_density", "FLOAT") * causal.to_int().sum(-1, keepdims=True).to_float(), kind="f").to_int()
    return budget - (forced & causal).to_int().sum(-1, keepdims=True)


def _smallest_set(g: Builder, geo: Geometry, mass: Value, alpha: Value, room: Value | None = None) -> Value:
    """The smallest set with cumulative mass >= alpha, by mass, ties to the lower index; it ends after `room` blocks at the latest."""
    ordered, index = g.nodes_of("TopK", mass, geo.blocks, kinds=("f", "i"), axis=-1)
    kept = g.cumulative(ordered, exclusive=True) < alpha
    if room is not None:
        kept = kept & (geo.arange(geo.blocks) < room)
    nothing = g.node("Expand", g.constant(0, "i"), g.node("Shape", index, kind="i"), kind="i")
    return g.node("ScatterElements", nothing, index, kept.to_int(), kind="i", axis=-1).to_bool()


def _on_slashes(g: Builder, geo: Geometry, slashes: Value) -> Value:
    """[B, H, tiles, blocks]: whether a causal pair of the tile and the block lies on a kept distance. slashes: [B, H, 1, blocks].

    The distances between a tile and a block are all integers from nearest to farthest, hence all their classes: count the kept ones.
    """
    block_end = geo.block_first + geo.block_k - 1
    low = (geo.first.unsqueeze(1) - block_end).maximum(0) // geo.block_k
    high = (geo.last.unsqueeze(1) - geo.block_first).maximum(0) // geo.block_k
    upto = g.cumulative(slashes.to_int()).reshape(geo.b, geo.h, -1)
    below = g.cumulative(slashes.to_int(), exclusive=True).reshape(geo.b, geo.h, -1)
    return upto.gather(high, axis=2) > below.gather(low, axis=2)
