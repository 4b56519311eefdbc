"""Float64 answers of docs/op.md in torch, on any device, and what a plain implementation of the same dtype would have answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch

from graph_passes.op import Policy


@dataclass(frozen=True)
class Case:
    """One seeded problem.

    bounds: (first real key, one past the last) of each batch item, or None. holes: share of the keys that a mask with holes leaves out
    (of the first batch item, inside its bounds).
    """

    s: int
    t: int
    d: int = 128
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    bounds: tuple[tuple[int, int], ...] | None = None
    spread: float = 1.0
    """Standard deviation of the queries: larger ones make sharper attention."""
    seed: int = 0
    scale: float = field(default=0.0)
    device: str = "cuda"
    value_dim: int = 0
    """Head size of the values; 0: d."""
    holes: float = 0.0

    @property
    def multiplier(self) -> float:
        return self.scale or self.d**-0.5

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device=self.device).manual_seed(self.seed * 1009 + self.s * 31 + self.t)

        def draw(heads: int, rows: int, width: int, std: float) -> torch.Tensor:
            return (torch.randn(self.batch, heads, rows, width, generator=generator, device=self.device) * std).to(self.dtype)

        query, key = draw(self.heads, self.s, self.d, self.spread), draw(self.kv_heads, self.t, self.d, 1.0)
        return query, key, draw(self.kv_heads, self.t, self.value_dim or self.d, 1.0)

    def bounds_tensor(self) -> torch.Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    def key_mask(self) -> torch.Tensor | None:
        """Bool [B, T] of the bounds and the holes, or None where there are neither."""
        return None if self.bounds is None and not self.holes else _key_mask(self)

    def span(self, batch: int) -> tuple[int, int]:
        """First real key and one past the last; (T, 0) without one."""
        if not self.holes:
            first, end = self.bounds[batch] if self.bounds else (0, self.t)
            return (first, end) if first < end else (self.t, 0)
        real = _key_mask(self)[batch].nonzero().flatten().tolist()
        return (real[0], real[-1] + 1) if real else (self.t, 0)


@cache
def _key_mask(case: Case) -> torch.Tensor:
    index = torch.arange(case.t, device=case.device)
    bounds = case.bounds or ((0, case.t),) * case.batch
    mask = torch.stack([(index >= first) & (index < end) for first, end in bounds])
    if case.holes:
        generator = torch.Generator(device=case.device).manual_seed(case.seed + 77)
        mask[0] &= torch.rand(case.t, generator=generator, device=case.device) >= case.holes
    return mask


def real(case: Case, batch: int) -> torch.Tensor:
    """Bool [T]."""
    mask = case.key_mask()
    return torch.ones(case.t, dtype=torch.bool, device=case.device) if mask is None else mask[batch]


def allowed(case: Case, batch: int) -> torch.Tensor:
    """Bool [S, T]."""
    position = torch.arange(case.s, device=case.device)[:, None] + case.t - case.s
    return (torch.arange(case.t, device=case.device)[None] <= position) & real(case, batch)


def logits(case: Case, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * case.multiplier
    return case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores


def softmax(scores: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Zeros in a row that has no true entry."""
    return torch.softmax(scores.masked_fill(~where, -torch.inf), -1).masked_fill(~where.any(-1, keepdim=True), 0.0)


def attention(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact output [B, Hq, S, Dv] float64, exact log-sum-exp [B, Hq, S], and the output of a plain implementation in the inputs' dtype."""
    shape = (*q.shape[:3], v.shape[3])
    exact = torch.zeros(shape, dtype=torch.float64, device=case.device)
    plain = torch.zeros(shape, dtype=q.dtype, device=case.device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64, device=case.device)
    for b in range(case.batch):
        base = allowed(case, b)
        for h in range(case.heads):
            kv = h * case.kv_heads // case.heads
            where = base
            if block_mask is not None:
                grid = block_mask[b, h].repeat_interleave(block_q, 0)[: case.s].repeat_interleave(block_k, 1)[:, : case.t]
                where = base & grid
            scores = logits(case, q[b, h].double(), k[b, kv].double())
            exact[b, h] = softmax(scores, where) @ v[b, kv].double()
            lse[b, h] = torch.logsumexp(scores.masked_fill(~where, -torch.inf), -1)
            plain[b, h] = softmax(logits(case, q[b, h], k[b, kv]).float(), where).to(case.dtype) @ v[b, kv]
    return exact, lse, plain


def is_whole(policy: Policy) -> bool:
    """Whether the policy selects for whole heads instead of query tiles."""
    return policy.policy in ("column_slash", "stripe_window")


def looked_at(case: Case, policy: Policy) -> torch.Tensor:
    """Step 1: bool [S, T], before causality and padding."""
    row = torch.arange(case.s, device=case.device)
    if policy.policy == "residue":
        return (row[:, None] + case.t - case.s + torch.arange(case.t, device=case.device)) % policy.stride == 0
    if policy.policy == "tile":
        last = torch.clamp((row // policy.block_q + 1) * policy.block_q, max=case.s) - 1
        rows = (last - row) % (policy.block_q // policy.sample_rows) == 0
    elif policy.policy == "column_slash":
        rows = (case.s - 1 - row) % policy.segment < policy.sample_rows
    else:
        rows = (case.s - 1 - row) % int((1.0 / torch.tensor(policy.sample_ratio, dtype=torch.float32)).round()) == 0
    return rows[:, None].expand(case.s, case.t)


def sampled(case: Case, q: torch.Tensor, k: torch.Tensor, policy: Policy, batch: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 1: the pairs looked at, bool [S, T], and their probabilities, float64 [S, T]."""
    position = torch.arange(case.s, device=case.device) + case.t - case.s
    where = looked_at(case, policy) & allowed(case, batch) & real(case, batch)[position][:, None]
    scores = logits(case, q[batch, head].double(), k[batch, head * case.kv_heads // case.heads].double())
    return where, softmax(scores, where)


def sampled_mass(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Steps 1 and 2 of the selection: float64 [B, Hq, nQ, nK]; whole heads: [B, Hq, 1 or 2, nK], columns and slashes, not normalised."""
    block_q, block_k = policy.block_q, policy.block_k
    tiles, blocks = -(-case.s // block_q), -(-case.t // block_k)
    rows = tiles if not is_whole(policy) else 2 if policy.policy == "column_slash" else 1
    out = torch.zeros(case.batch, case.heads, rows, blocks, dtype=torch.float64, device=case.device)
    position = torch.arange(case.s, device=case.device)[:, None] + case.t - case.s
    distance = (position - torch.arange(case.t, device=case.device)).clamp(min=0) // block_k
    for b in range(case.batch):
        for h in range(case.heads):
            _, probability = sampled(case, q, k, policy, b, h)
            if policy.value_weight and not is_whole(policy):
                probability = probability * v[b, h * case.kv_heads // case.heads].double().norm(dim=-1)
            padded = torch.nn.functional.pad(probability, (0, blocks * block_k - case.t, 0, tiles * block_q - case.s))
            cells = padded.view(tiles, block_q, blocks, block_k).sum((1, 3))
            out[b, h, : 1 if is_whole(policy) else tiles] = cells.sum(0, keepdim=True) if is_whole(policy) else cells
            if rows == 2 and is_whole(policy):
                out[b, h, 1].scatter_add_(0, distance.flatten(), probability.flatten())
    return out


def grid_positions(case: Case, policy: Policy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and last position of each tile [nQ, 1], first key of each block [nK]."""
    tiles, blocks = -(-case.s // policy.block_q), -(-case.t // policy.block_k)
    first = torch.arange(tiles, device=case.device)[:, None] * policy.block_q + case.t - case.s
    return first, torch.clamp(first + policy.block_q, max=case.t) - 1, torch.arange(blocks, device=case.device) * policy.block_k


def forced(case: Case, policy: Policy, batch: int) -> torch.Tensor:
    """Step 3, bool [nQ, nK]."""
    first, last, block = grid_positions(case, policy)
    window = policy.window
    if policy.policy == "stripe_window":
        window = max(window, int(torch.ceil(torch.tensor(policy.window_ratio) * torch.tensor(float(case.t)))))
    near = (block + policy.block_k > first - window) & (block <= last)
    sink = case.span(batch)[0]
    return near | ((block + policy.block_k > sink) & (block < sink + policy.sink) & (policy.sink > 0))


def dense_tiles(case: Case, policy: Policy, batch: int) -> torch.Tensor:
    """Step 5, bool [nQ, 1]."""
    first, last, _ = grid_positions(case, policy)
    end = case.span(batch)[1]
    return (last >= end - policy.dense_rows) & (first < end) & (policy.dense_rows > 0)


def _threshold(values: tuple[float, ...], head: int) -> float:
    return float(torch.tensor(values[head % len(values)], dtype=torch.float32))


def room(case: Case, policy: Policy, batch: int) -> torch.Tensor:
    """Step 4: how many blocks the budget leaves beside the forced ones, int64 [nQ, 1]."""
    _, last, block = grid_positions(case, policy)
    begun = block <= last
    budget = (torch.tensor(policy.max_density, dtype=torch.float32) * begun.sum(-1, keepdim=True).float()).ceil().long()
    return (budget - (forced(case, policy, batch) & begun).sum(-1, keepdim=True)).clamp(min=0)


def _smallest(mass: torch.Tensor, need: torch.Tensor | float, most: torch.Tensor | None = None) -> torch.Tensor:
    """Largest first until their sum reaches need, at most `most` of them."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    wanted = (ordered.cumsum(-1) - ordered < need) & (ordered > 0)
    if most is not None:
        wanted &= torch.arange(mass.shape[-1], device=mass.device) < most
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, wanted)


def _on_slashes(case: Case, policy: Policy, slashes: torch.Tensor) -> torch.Tensor:
    """Step 4: bool [nQ, nK], the cells of which some pair lies on a kept distance class. slashes: bool [nK]."""
    first, last, block = grid_positions(case, policy)
    before = torch.nn.functional.pad(slashes.cumsum(0), (1, 0))
    nearest = (first - torch.clamp(block + policy.block_k, max=case.t) + 1).clamp(min=0) // policy.block_k
    farthest = ((last - block) // policy.block_k).clamp(min=-1)
    return (before[farthest + 1] - before[nearest.clamp(max=len(slashes))]) > 0


def select(case: Case, policy: Policy, mass: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
    """Steps 3 to 6 on float64 masses: bool [B, Hq, nQ, nK]. slack (whole heads only): a share by which thresholds and masses are moved down when
    positive (blocks that may be kept), up when negative (blocks that must be kept)."""
    first, last, block = grid_positions(case, policy)
    kept = torch.zeros((*mass.shape[:2], len(first), mass.shape[3]), dtype=torch.bool, device=case.device)

    def picked(row: torch.Tensor, alpha: float) -> torch.Tensor:
        chosen = _smallest(row, alpha * (1 + slack) * row.sum())
        if not slack or not chosen.any():
            return chosen
        least = row[chosen].min()
        return row >= least * (1 - slack) if slack > 0 else row > least * (1 - slack)

    for b in range(case.batch):
        keep_always = forced(case, policy, b)
        for h in range(case.heads):
            alpha = _threshold(policy.alpha, h)
            evidence = mass[b, h].sum(-1, keepdim=True) > 0
            if is_whole(policy):
                chosen = picked(mass[b, h, 0], alpha).expand(kept.shape[2:])
                full = alpha >= 1
                if policy.policy == "column_slash":
                    slash = _threshold(policy.alpha_slash, h)
                    chosen = chosen | _on_slashes(case, policy, picked(mass[b, h, 1], slash))
                    full = full or slash >= 1
                evidence = evidence[:1]
            else:
                free = mass[b, h].masked_fill(keep_always, 0.0)
                chosen, full = _smallest(free, alpha * free.sum(-1, keepdim=True), room(case, policy, b)), alpha >= 1
            everything = dense_tiles(case, policy, b) | ~evidence | full
            kept[b, h] = (chosen | keep_always | everything) & (block <= last)
    return kept


def exact_masses(case: Case, policy: Policy, ties: bool) -> torch.Tensor:
    """Random block masses [B, Hq, nQ, nK], float32, whose sums are exact: a selection by them does not depend on rounding. ties: only 0 to 3 of them."""
    _, last, block = grid_positions(case, policy)
    generator = torch.Generator(device=case.device).manual_seed(case.seed)
    shape = (case.batch, case.heads, len(last), len(block))
    drawn = torch.rand(shape, generator=generator, device=case.device)
    return (drawn * 4 if ties else 1000 * drawn**2).floor() * (block <= last)


def certificate(case: Case, q: torch.Tensor, k: torch.Tensor, policy: Policy, kept: torch.Tensor) -> torch.Tensor:
    """Min and mean retained sampled probability given the lists, float64 [B, Hq, 2]; 1 for a head that is full attention."""
    out = torch.ones(case.batch, case.heads, 2, dtype=torch.float64, device=case.device)
    for b in range(case.batch):
        for h in range(case.heads):
            slash = _threshold(policy.alpha_slash, h) if policy.policy == "column_slash" else 0.0
            where, probability = sampled(case, q, k, policy, b, h)
            rows = where.any(-1)
            if max(_threshold(policy.alpha, h), slash) < 1 and rows.any():
                grid = kept[b, h].repeat_interleave(policy.block_q, 0)[: case.s].repeat_interleave(policy.block_k, 1)[:, : case.t]
                retained = (probability * grid).sum(-1)[rows]
                out[b, h] = torch.stack([retained.min(), retained.mean()])
    return out


def mass_rounding(policy: Policy) -> float:
    """Bound on the relative error of the sm90 masses. An entry of their table is rounded to binary16 (2^-11), that of four slice keys a block once before and once
    after its two halves are added; the rest is float32 scores, whose size moves a term by |score| 2^-23 of itself."""
    twice = policy.policy == "residue" and policy.block_k == 4 * policy.stride
    return 1.1e-3 if twice else 6e-4


def assert_selection(case: Case, policy: Policy, kept: torch.Tensor, mass: torch.Tensor, most: float = 0.05, rounding: float = 5e-6) -> int:
    """kept equals select(mass) but for at most one block a tile whose mass lies within rounding of the threshold; whole heads: but for
    blocks whose mass does. At most a share `most` of the tiles may differ so; returns how many do.
    rounding: bound on the relative error of the masses that kept was chosen by."""
    want = select(case, policy, mass)
    if is_whole(policy):
        if not torch.equal(kept, want):
            assert not (select(case, policy, mass, slack=-1e-4) & ~kept).any(), f"{case} {policy}: a block is missing"
            assert not (kept & ~select(case, policy, mass, slack=1e-4)).any(), f"{case} {policy}: a block too many"
        return int((kept != want).any(-1).sum())
    differing = (kept != want).any(-1)
    assert differing.double().mean() <= most, f"{case} {policy}: lists differ beyond rounding"
    for b, h, t in differing.nonzero().tolist():
        alpha = policy.alpha[h % len(policy.alpha)]
        free = mass[b, h, t].masked_fill(forced(case, policy, b)[t], 0.0)
        taken, most = int((kept[b, h, t] & ~forced(case, policy, b)[t]).sum()), int(room(case, policy, b)[t])
        assert taken <= most, (case, policy, b, h, t)
        if taken < most:
            assert free[kept[b, h, t]].sum() >= alpha * (1 - 2 * rounding) * free.sum(), (case, policy, b, h, t)
        chosen = want[b, h, t] & (free > 0)
        if chosen.any():  # blocks in one set alone weigh what the threshold does, but for rounding
            exchanged = free[kept[b, h, t] != want[b, h, t]]
            assert ((exchanged - free[chosen].min()).abs() <= 0.02 * free[chosen].min()).all(), (case, policy, b, h, t)
        assert abs(int(kept[b, h, t].sum()) - int(want[b, h, t].sum())) <= 1, (case, policy, b, h, t)
        assert not (forced(case, policy, b)[t] & want[b, h, t] & ~kept[b, h, t]).any()
    return int(differing.sum())


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    return ((out.double() - exact).norm() / (norm or 1.0)).item()


def assert_as_good_as_plain(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: object) -> None:
    """Error at most twice that of the plain implementation, as a norm and at the worst element; NaN never passes.

    The floor of four float32 roundings is for float32 outputs of a few elements, where the plain implementation may be exact by luck.
    """
    floor = 4 * torch.finfo(torch.float32).eps
    ours, theirs = relative(out, exact), relative(plain, exact)
    assert ours <= max(2 * theirs, floor), f"{what}: error {ours:.2e}, plain {theirs:.2e}"
    worst, allowed_worst = (out.double() - exact).abs().max().item(), (plain.double() - exact).abs().max().item()
    floor *= exact.abs().max().item()
    assert worst <= max(2 * allowed_worst, floor), f"{what}: worst {worst:.2e}, plain {allowed_worst:.2e}"
