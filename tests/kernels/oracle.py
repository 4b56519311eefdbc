"""Float64 answers of docs/op.md in torch, on any device, and what a plain implementation of the same dtype would have answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graph_passes.op import Policy


@dataclass(frozen=True)
class Case:
    """One seeded problem. bounds: (first real key, one past the last) of each batch item, or None."""

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

    @property
    def multiplier(self) -> float:
        return self.scale or self.d**-0.5

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device=self.device).manual_seed(self.seed * 1009 + self.s * 31 + self.t)

        def draw(heads: int, rows: int, std: float) -> torch.Tensor:
            return (torch.randn(self.batch, heads, rows, self.d, generator=generator, device=self.device) * std).to(self.dtype)

        return draw(self.heads, self.s, self.spread), draw(self.kv_heads, self.t, 1.0), draw(self.kv_heads, self.t, 1.0)

    def bounds_tensor(self) -> torch.Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=self.device)


def allowed(case: Case, batch: int) -> torch.Tensor:
    """Bool [S, T]."""
    position = torch.arange(case.s, device=case.device)[:, None] + case.t - case.s
    key = torch.arange(case.t, device=case.device)[None]
    first, last = case.bounds[batch] if case.bounds else (0, case.t)
    return (key <= position) & (key >= first) & (key < last)


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
    """Exact output [B, Hq, S, D] float64, exact log-sum-exp [B, Hq, S], and the output of a plain implementation in the inputs' dtype."""
    exact, plain = torch.zeros(q.shape, dtype=torch.float64, device=case.device), torch.zeros_like(q)
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


def sampled_mass(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Steps 1 and 2 of the selection: float64 [B, Hq, nQ, nK]."""
    block_q, block_k = policy.block_q, policy.block_k
    tiles, blocks = -(-case.s // block_q), -(-case.t // block_k)
    row = torch.arange(case.s, device=case.device)
    position = row[:, None] + case.t - case.s
    if policy.policy == "residue":
        looked = (position + torch.arange(case.t, device=case.device)) % policy.stride == 0
    else:
        last = torch.clamp((row // block_q + 1) * block_q, max=case.s) - 1
        looked = ((last - row) % (block_q // policy.sample_rows) == 0)[:, None].expand(case.s, case.t)
    out = torch.zeros(case.batch, case.heads, tiles, blocks, dtype=torch.float64, device=case.device)
    for b in range(case.batch):
        first, end = case.bounds[b] if case.bounds else (0, case.t)
        where = looked & allowed(case, b) & (position >= first) & (position < end)
        for h in range(case.heads):
            kv = h * case.kv_heads // case.heads
            probability = softmax(logits(case, q[b, h].double(), k[b, kv].double()), where)
            if policy.value_weight:
                probability = probability * v[b, kv].double().norm(dim=-1)
            padded = torch.nn.functional.pad(probability, (0, blocks * block_k - case.t, 0, tiles * block_q - case.s))
            out[b, h] = padded.view(tiles, block_q, blocks, block_k).sum((1, 3))
    return out


def grid_positions(case: Case, policy: Policy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and last position of each tile [nQ, 1], first key of each block [nK]."""
    tiles, blocks = -(-case.s // policy.block_q), -(-case.t // policy.block_k)
    first = torch.arange(tiles, device=case.device)[:, None] * policy.block_q + case.t - case.s
    return first, torch.clamp(first + policy.block_q, max=case.t) - 1, torch.arange(blocks, device=case.device) * policy.block_k


def forced(case: Case, policy: Policy, batch: int) -> torch.Tensor:
    """Step 3, bool [nQ, nK]."""
    first, last, block = grid_positions(case, policy)
    near = (block + policy.block_k > first - policy.window) & (block <= last)
    sink = case.bounds[batch][0] if case.bounds else 0
    return near | ((block + policy.block_k > sink) & (block < sink + policy.sink) & (policy.sink > 0))


def select(case: Case, policy: Policy, mass: torch.Tensor) -> torch.Tensor:
    """Steps 3 to 6 on float64 masses: bool [B, Hq, nQ, nK]."""
    first, last, block = grid_positions(case, policy)
    kept = torch.zeros(mass.shape, dtype=torch.bool, device=case.device)
    for b in range(case.batch):
        keep_always, end = forced(case, policy, b), case.bounds[b][1] if case.bounds else case.t
        dense = (last >= end - policy.dense_rows) & (first < end) & (policy.dense_rows > 0)
        for h in range(case.heads):
            alpha = float(torch.tensor(policy.alpha[h % len(policy.alpha)], dtype=torch.float32))
            free = mass[b, h].masked_fill(keep_always, 0.0)
            ordered, order = free.sort(dim=-1, descending=True, stable=True)
            wanted = (ordered.cumsum(-1) - ordered < alpha * free.sum(-1, keepdim=True)) & (ordered > 0)
            chosen = torch.zeros_like(keep_always).scatter(-1, order, wanted)
            everything = dense | ~(mass[b, h].sum(-1, keepdim=True) > 0) | (alpha >= 1)
            kept[b, h] = (chosen | keep_always | everything) & (block <= last)
    return kept


def assert_selection(case: Case, policy: Policy, kept: torch.Tensor, mass: torch.Tensor) -> None:
    """kept equals select(mass) but for at most one block a tile whose mass lies within rounding of the threshold."""
    want = select(case, policy, mass)
    differing = (kept != want).any(-1)
    assert differing.double().mean() < 0.05, f"{case} {policy}: lists differ beyond rounding"
    for b, h, t in differing.nonzero().tolist():
        alpha = policy.alpha[h % len(policy.alpha)]
        free = mass[b, h, t].masked_fill(forced(case, policy, b)[t], 0.0)
        assert free[kept[b, h, t]].sum() >= (alpha - 1e-5) * free.sum(), (case, policy, b, h, t)
        assert abs(int(kept[b, h, t].sum()) - int(want[b, h, t].sum())) <= 1, (case, policy, b, h, t)
        assert not (forced(case, policy, b)[t] & want[b, h, t] & ~kept[b, h, t]).any()


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    return ((out.double() - exact).norm() / (norm or 1.0)).item()


def assert_as_good_as_plain(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: object) -> None:
    """Error at most twice that of the plain implementation, as a norm and at the worst element; NaN never passes."""
    ours, theirs = relative(out, exact), relative(plain, exact)
    assert ours <= 2 * theirs, f"{what}: error {ours:.2e}, plain {theirs:.2e}"
    worst, allowed_worst = (out.double() - exact).abs().max().item(), (plain.double() - exact).abs().max().item()
    assert worst <= 2 * allowed_worst, f"{what}: worst {worst:.2e}, plain {allowed_worst:.2e}"
