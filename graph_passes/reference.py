"""SampleAttention in float64 NumPy: `docs/op.md` as code, written for reading. Every other implementation is checked against it.

Letters: B batch, Hq query heads, Hkv key/value heads, S query rows, T keys, D and Dv head sizes, nQ tiles of `block_q` rows,
nK blocks of `block_k` keys. Cost: O(S * T) memory for one head at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graph_passes.op import DECODE_MAX_ROWS, Policy

__all__ = [
    "Selection",
    "attend",
    "density",
    "full_heads",
    "pair_counts",
    "sample_attention",
    "select",
    "smallest_set",
]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """What selection decided and saw.

    block_mask: bool [B, Hq, nQ, nK], the key blocks that each tile reads.
    forced: bool [B, nQ, nK], the blocks of step 3.
    mass: [B, Hq, nQ, nK], block masses weighted by the values, or [B, Hq, 1, nK] of sum 1 (one selection a head); 0 without evidence.
    slash_mass: [B, Hq, nK] masses by distance class (`column_slash`), else None.
    retained: [B, Hq, S], sampled probability inside kept blocks; NaN for rows without a sample.
    certificate: [B, Hq, 2], min and mean of `retained`; 1 where the head is full attention or nothing was sampled.
    """

    block_mask: Bools
    forced: Bools
    mass: Floats
    slash_mass: Floats | None
    retained: Floats
    certificate: Floats


@dataclass(frozen=True)
class _Grid:
    """Sizes and positions of one call."""

    s: int
    t: int
    block_q: int
    block_k: int

    @property
    def tiles(self) -> int:
        return -(-self.s // self.block_q)

    @property
    def blocks(self) -> int:
        return -(-self.t // self.block_k)

    @property
    def positions(self) -> Ints:
        return self.t - self.s + np.arange(self.s)

    @property
    def tile_of_row(self) -> Ints:
        return np.arange(self.s) // self.block_q

    @property
    def first(self) -> Ints:
        """[nQ] position of each tile's first row."""
        return self.t - self.s + np.arange(self.tiles) * self.block_q

    @property
    def last(self) -> Ints:
        """[nQ] position of each tile's last row."""
        return np.minimum(self.first + self.block_q, self.t) - 1

    @property
    def block_first(self) -> Ints:
        return np.arange(self.blocks) * self.block_k

    @property
    def block_last(self) -> Ints:
        return np.minimum(self.block_first + self.block_k, self.t) - 1

    def causal(self) -> Bools:
        """[S, T]."""
        return np.arange(self.t) <= self.positions[:, None]

    def by_block(self, x: NDArray) -> NDArray:
        """[..., T] -> [..., nK] sums."""
        return np.add.reduceat(x, self.block_first, axis=-1)

    def by_tile(self, x: NDArray) -> NDArray:
        """[S, ...] -> [nQ, ...] sums."""
        return np.add.reduceat(x, np.arange(self.tiles) * self.block_q, axis=0)


def select(q: NDArray, k: NDArray, v: NDArray, key_mask: Bools | None, policy: Policy, scale: float, softcap: float = 0.0) -> Selection:
    """Which key blocks each tile of queries reads.

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv]; any float type, computed in float64.
        key_mask: bool [B, T], true = real token, or None.
        policy: how blocks are selected; its numbers are taken as the node stores them, in float32.
        scale, softcap: as the node's attributes.
    """
    (batch, heads, s, _), t = q.shape, k.shape[2]
    grid = _Grid(s, t, policy.block_q, policy.block_k)
    real = np.ones((batch, t), bool) if key_mask is None else key_mask.astype(bool)
    looked = _looked_at(grid, policy)
    full = full_heads(policy, heads, s, t)
    alpha, alpha_slash = _per_head(policy.alpha, heads), _per_head(policy.alpha_slash, heads)
    causal_blocks = grid.block_first <= grid.last[:, None]
    per_tile = policy.policy in ("residue", "tile")

    masks = np.zeros((batch, heads, grid.tiles, grid.blocks), bool)
    forced = np.zeros((batch, grid.tiles, grid.blocks), bool)
    mass = np.zeros((batch, heads, grid.tiles if per_tile else 1, grid.blocks))
    slash_mass = np.zeros((batch, heads, grid.blocks)) if policy.policy == "column_slash" else None
    retained = np.full((batch, heads, s), np.nan)
    for b in range(batch):
        forced[b] = _forced(grid, policy, real[b])
        dense_tiles = _dense_tiles(grid, policy, real[b])
        sampled = looked & grid.causal() & real[b] & real[b][grid.positions][:, None]
        for h in range(heads):
            scores = _scores(q[b, h], k[b, h * k.shape[1] // heads], scale, softcap)
            p = _softmax(scores, sampled)
            by_block = grid.by_block(p)  # [S, nK]

            if per_tile:
                mass[b, h] = grid.by_tile(grid.by_block(p * _weights(v[b, h * v.shape[1] // heads], policy)))
                free = np.where(forced[b], 0.0, mass[b, h])
                # Where all of the mass is forced no other block is wanted.
                room = _room(forced[b] & causal_blocks, causal_blocks, policy)
                kept = (smallest_set(_normalised(free), alpha[h], room) & (free > 0)) | forced[b]
            else:
                mass[b, h] = _normalised(by_block.sum(0, keepdims=True))
                kept = smallest_set(mass[b, h], alpha[h]) | forced[b]
            evidence = mass[b, h].sum(-1, keepdims=True) > 0
            if slash_mass is not None:
                slash_mass[b, h] = _normalised(_by_distance(grid, p, sampled))
                slashes = smallest_set(slash_mass[b, h], alpha_slash[h])
                kept = kept | _on_slashes(grid, slashes)
            kept = kept | ~evidence | dense_tiles[:, None] | full[h]
            kept = kept & causal_blocks

            masks[b, h] = kept
            rows = sampled.any(-1)
            retained[b, h, rows] = (by_block * kept[grid.tile_of_row]).sum(-1)[rows]
    return Selection(masks, forced, mass, slash_mass, retained, _certificate(retained, full))


def attend(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    key_mask: Bools | None,
    block_mask: Bools,
    block_q: int,
    block_k: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Floats, Floats]:
    """Attention over the allowed pairs inside kept blocks.

    Args:
        v: [B, Hkv, T, Dv]; block_mask: bool [B, Hq, nQ, nK]; the others as `select`.

    Returns:
        output [B, Hq, S, Dv], zeros for a row with no key left; row_cra [B, Hq, S], the probability that each row retains of full
        attention (0 for a row with no allowed key).
    """
    (batch, heads, s, _), t = q.shape, k.shape[2]
    grid = _Grid(s, t, block_q, block_k)
    output = np.zeros((batch, heads, s, v.shape[3]))
    row_cra = np.zeros((batch, heads, s))
    for b in range(batch):
        allowed = grid.causal() if key_mask is None else grid.causal() & key_mask[b].astype(bool)
        for h in range(heads):
            kv = h * k.shape[1] // heads
            scores = _scores(q[b, h], k[b, kv], scale, softcap)
            kept = np.repeat(block_mask[b, h][grid.tile_of_row], block_k, axis=1)[:, :t]
            output[b, h] = _softmax(scores, allowed & kept) @ v[b, kv].astype(np.float64)
            row_cra[b, h] = (_softmax(scores, allowed) * kept).sum(-1)
    return output, row_cra


def sample_attention(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    key_mask: Bools | None,
    policy: Policy,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Floats, Selection, Floats]:
    """The operator: output [B, Hq, S, Dv], the selection, and row_cra [B, Hq, S] (see `select`, `attend`)."""
    selection = select(q, k, v, key_mask, policy, scale, softcap)
    output, row_cra = attend(q, k, v, key_mask, selection.block_mask, policy.block_q, policy.block_k, scale, softcap)
    return output, selection, row_cra


def pair_counts(s: int, t: int, key_mask: Bools | None, block_q: int, block_k: int) -> Ints:
    """int64 [B or 1, nQ, nK]: allowed (real row, key) pairs in each cell of the block grid."""
    grid = _Grid(s, t, block_q, block_k)
    real = np.ones((1, t), bool) if key_mask is None else key_mask.astype(bool)
    # Real keys of block k that row i may see: those among the first p_i + 1 keys, less those before the block.
    before = np.concatenate([np.zeros((len(real), 1), np.int64), np.cumsum(real, axis=1, dtype=np.int64)], axis=1)
    start = np.minimum(grid.block_first, grid.positions[:, None] + 1)
    end = np.minimum(grid.block_last + 1, grid.positions[:, None] + 1)
    counts = (before[:, end] - before[:, start]) * real[:, grid.positions][:, :, None]
    return np.add.reduceat(counts, np.arange(grid.tiles) * block_q, axis=1)


def density(block_mask: Bools, s: int, t: int, key_mask: Bools | None, block_q: int, block_k: int) -> Floats:
    """[B, Hq]: allowed pairs inside kept blocks / allowed pairs, over real rows; 1 where no pair is allowed."""
    counts = np.broadcast_to(pair_counts(s, t, key_mask, block_q, block_k), (len(block_mask), *block_mask.shape[2:]))
    kept = (block_mask * counts[:, None]).sum((2, 3))
    allowed = np.broadcast_to(counts.sum((1, 2))[:, None], kept.shape)
    return np.divide(kept, allowed, out=np.ones(kept.shape), where=allowed > 0)


def full_heads(policy: Policy, heads: int, s: int, t: int) -> Bools:
    """[Hq]: the heads that are full attention, exactly."""
    full = _per_head(policy.alpha, heads) == 1
    if policy.policy == "column_slash":
        full = full | (_per_head(policy.alpha_slash, heads) == 1)
    return full | (policy.policy == "dense" or t < policy.min_length or s <= DECODE_MAX_ROWS)


def smallest_set(mass: Floats, alpha: float, room: Ints | None = None) -> Bools:
    """[..., nK]: the smallest set that reaches cumulative mass >= alpha, largest mass first, ties to the lower index.

    room: [..., 1], the set ends there at the latest.
    """
    order = np.argsort(-mass, axis=-1, kind="stable")
    ordered = np.take_along_axis(mass, order, -1)
    kept = np.cumsum(ordered, axis=-1) - ordered < alpha
    if room is not None:
        kept &= np.arange(mass.shape[-1]) < room
    out = np.empty_like(kept)
    np.put_along_axis(out, order, kept, -1)
    return out


def _looked_at(grid: _Grid, policy: Policy) -> Bools:
    """[S, T] step 1: the keys that each row's sample looks at, before causality and padding."""
    if policy.policy == "residue":
        return (grid.positions[:, None] + np.arange(grid.t)) % policy.stride == 0
    rows = np.zeros(grid.s, bool)
    if policy.policy == "tile":
        step = policy.block_q // policy.sample_rows
        for first, last in zip(grid.first, grid.last, strict=True):
            rows[np.arange(last, first - 1, -step) - (grid.t - grid.s)] = True
    elif policy.policy == "column_slash":
        for end in range(grid.s, 0, -policy.segment):
            rows[max(end - policy.sample_rows, 0) : end] = True
    elif policy.policy == "stripe_window":
        step = np.rint(np.float32(1) / np.float32(policy.sample_ratio))  # half to even
        rows[:: -int(min(step, 2**30))] = True
    return np.broadcast_to(rows[:, None], (grid.s, grid.t))


def _weights(v: NDArray, policy: Policy) -> Floats:
    """[T] step 2: what dropping a key costs at most, by unit of its probability. v: [T, Dv]."""
    return np.linalg.norm(v.astype(np.float64), axis=-1) if policy.value_weight else np.ones(len(v))


def _by_distance(grid: _Grid, p: Floats, sampled: Bools) -> Floats:
    """[nK] step 2: sampled probability by distance class (p_i - j) div block_k."""
    row, key = np.nonzero(sampled)
    distance = (grid.positions[row] - key) // grid.block_k
    return np.bincount(distance, weights=p[row, key], minlength=grid.blocks).astype(np.float64)


def _forced(grid: _Grid, policy: Policy, real: Bools) -> Bools:
    """[nQ, nK] step 3."""
    window = policy.window
    if policy.policy == "stripe_window":
        window = max(window, int(np.ceil(np.float32(policy.window_ratio) * np.float32(grid.t))))
    near = (grid.block_last >= grid.first[:, None] - window) & (grid.block_first <= grid.last[:, None])
    first_real, _ = _real_span(real)
    sink = (grid.block_last >= first_real) & (grid.block_first < first_real + policy.sink) & (policy.sink > 0)
    return near | sink


def _room(forced: Bools, causal: Bools, policy: Policy) -> Ints | None:
    """[nQ, 1] step 4: how many blocks the budget leaves beside the forced ones; None without a budget. forced, causal: [nQ, nK]."""
    if np.float32(policy.max_density) == 1:
        return None
    budget = np.ceil(np.float32(policy.max_density) * causal.sum(-1, keepdims=True).astype(np.float32))
    return budget.astype(np.int64) - forced.sum(-1, keepdims=True)


def _dense_tiles(grid: _Grid, policy: Policy, real: Bools) -> Bools:
    """[nQ] step 5: tiles that meet the last `dense_rows` real positions."""
    _, end = _real_span(real)
    return (grid.last >= end - policy.dense_rows) & (grid.first < end) & (policy.dense_rows > 0)


def _on_slashes(grid: _Grid, slashes: Bools) -> Bools:
    """[nQ, nK] step 4: cells of which some causal pair lies on a kept distance class. slashes: [nK]."""
    # The distances between a tile and a block are all the integers from nearest to farthest.
    nearest = np.maximum(grid.first[:, None] - grid.block_last, 0) // grid.block_k
    farthest = (grid.last[:, None] - grid.block_first) // grid.block_k
    out = np.zeros(nearest.shape, bool)
    for u in np.flatnonzero(slashes):
        out |= (nearest <= u) & (u <= farthest)
    return out


def _certificate(retained: Floats, full: Bools) -> Floats:
    sampled = ~np.isnan(retained)
    low = np.where(sampled, retained, 1.0).min(-1)
    mean = np.where(sampled, retained, 0.0).sum(-1) / np.maximum(sampled.sum(-1), 1)
    exact = full | ~sampled.any(-1)
    return np.where(exact[..., None], 1.0, np.stack([low, mean], -1))


def _real_span(real: Bools) -> tuple[int, int]:
    """First real key, and one past the last; without any, (T, 0)."""
    index = np.flatnonzero(real)
    return (int(index[0]), int(index[-1]) + 1) if len(index) else (len(real), 0)


def _per_head(values: tuple[float, ...], heads: int) -> Floats:
    return np.broadcast_to(np.array(values, np.float32).astype(np.float64), (heads,))


def _scores(q: NDArray, k: NDArray, scale: float, softcap: float) -> Floats:
    scores = float(np.float32(scale)) * (q.astype(np.float64) @ k.astype(np.float64).T)
    cap = float(np.float32(softcap))
    return cap * np.tanh(scores / cap) if cap > 0 else scores


def _softmax(scores: Floats, where: Bools) -> Floats:
    """Over the last axis and the true entries; zeros in a row that has none."""
    top = np.max(scores, axis=-1, where=where, initial=-np.inf, keepdims=True)
    weights = np.exp(np.subtract(scores, np.where(np.isfinite(top), top, 0.0)), where=where, out=np.zeros_like(scores))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=weights, where=total > 0)


def _normalised(mass: Floats) -> Floats:
    total = mass.sum(-1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
