"""`SampleAttention` in PyTorch, for whole models on a CPU or a GPU: it measures what a policy keeps and what that costs in quality.

It follows `docs/op.md`, as the float64 reference does, but works on tiles of rows so that long prompts fit in memory. It skips no work: speed comes
from the kernels, this module is for evaluation. `evaluate` puts it into a transformers model in place of the model's own attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graph_passes.op import DECODE_MAX_ROWS, Policy

if TYPE_CHECKING:
    import torch

__all__ = ["Record", "attend", "block_mask", "sample_attention", "use_policies"]

_ROWS_AT_ONCE = 1024


@dataclass
class Record:
    """What every call of every layer kept.

    Attributes:
        density: layer -> list over calls of [Hq] kept pairs / allowed pairs.
        cra_min, cra_mean: layer -> list over calls of [Hq], over the rows.
    """

    density: dict[int, list[Any]] = field(default_factory=dict)
    cra_min: dict[int, list[Any]] = field(default_factory=dict)
    cra_mean: dict[int, list[Any]] = field(default_factory=dict)


def block_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, policy: Policy, *, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Kept blocks, bool [B, Hq, nQ, nK].

    Args:
        q: [B, Hq, S, D]; k: [B, Hkv, T, D]; v: [B, Hkv, T, Dv]; key_mask: bool [B, T] or None.
        policy, scale, softcap: as in the operator contract.
    """
    import torch

    B, Hq, S, _ = q.shape
    T = k.shape[2]
    bq, bk = policy.block_q, policy.block_k
    nq, nk = -(-S // bq), -(-T // bk)
    dev = q.device
    tile_first = torch.arange(nq, device=dev) * bq + T - S
    tile_last = torch.clamp(tile_first + bq, max=T) - 1
    block_first = torch.arange(nk, device=dev) * bk
    causal = block_first[None] <= tile_last[:, None]  # [nq, nk]
    if policy.policy == "dense" or policy.min_length > T or S <= DECODE_MAX_ROWS:
        return causal.expand(B, Hq, nq, nk).clone()
    mask = torch.ones(B, T, dtype=torch.bool, device=dev) if key_mask is None else key_mask.bool()

    alpha = _per_head(policy.alpha, Hq, dev)
    full = alpha >= 1
    window = policy.window
    if policy.policy == "stripe_window":
        window = max(window, math.ceil(policy.window_ratio * T))
    forced = (block_first[None] + bk > tile_first[:, None] - window) & causal
    first_real = torch.argmax(mask.int(), 1)
    sink = (block_first[None] < first_real[:, None] + policy.sink) & (block_first[None] + bk > first_real[:, None])  # [B, nk]
    forced = forced[None] | (sink[:, None] & (policy.sink > 0))  # [B, nq, nk]
    forced = forced[:, None].expand(B, Hq, nq, nk)

    if policy.policy in ("residue", "tile"):
        weight = v.float().norm(dim=-1) if policy.value_weight else torch.ones(v.shape[:3], device=dev)
        weight = weight.repeat_interleave(Hq // k.shape[1], 1)  # [B, Hq, T]
        mass = (_residue_mass if policy.policy == "residue" else _tile_mass)(q, k, weight, mask, policy, scale, softcap)
        free = mass * ~forced
        room, max_density = None, torch.tensor(policy.max_density, dtype=torch.float32)
        if max_density < 1:
            budget = (max_density * causal.sum(-1, keepdim=True).float()).ceil().long()  # [nq, 1]
            room = budget - (forced & causal).sum(-1, keepdim=True)
        keep = _smallest_set(free / free.sum(-1, keepdim=True).clamp(min=1e-30), alpha, room) & (free > 0) | forced
        none = mass.sum(-1) == 0  # [B, Hq, nq]
    else:
        rows = _sampled_rows(S, policy).to(dev)
        p = _probabilities(q, k, mask, rows, scale, softcap)  # [B, Hq, R, T]
        columns = _block_sum(p.sum(2), bk)
        total = columns.sum(-1, keepdim=True)
        column_keep = _smallest_set(columns / total.clamp(min=1e-30), alpha)[:, :, None].expand(B, Hq, nq, nk)
        keep = column_keep | forced
        if policy.policy == "column_slash":
            alpha_slash = _per_head(policy.alpha_slash, Hq, dev)
            full = full | (alpha_slash >= 1)
            distance = (rows + T - S)[:, None] - torch.arange(T, device=dev)[None]  # [R, T]
            slash = torch.zeros(B, Hq, nk, device=dev)
            index = distance.clamp(min=0).div(bk, rounding_mode="floor").flatten().expand(B, Hq, -1)
            slash.scatter_add_(-1, index, (p * (distance >= 0)).flatten(2))
            slash_keep = _smallest_set(slash / total.clamp(min=1e-30), alpha_slash)
            low = (tile_first[:, None] - (block_first + bk - 1)[None]).clamp(min=0).div(bk, rounding_mode="floor")
            high = (tile_last[:, None] - block_first[None]).div(bk, rounding_mode="floor")
            count = torch.nn.functional.pad(slash_keep.int().cumsum(-1), (1, 0))
            some = count[..., (high + 1).clamp(0, nk)] - count[..., low.clamp(0, nk)] > 0
            keep = keep | (some & (high >= 0))
        none = (total[..., 0] == 0)[..., None].expand(B, Hq, nq)
    everything = none | full[None, :, None]
    if policy.dense_rows:
        last_real = T - torch.argmax(mask.flip(1).int(), 1)  # one past the last real key
        tail = (tile_last[None] >= last_real[:, None] - policy.dense_rows) & (tile_first[None] < last_real[:, None])
        everything = everything | tail[:, None]
    return (keep | everything[..., None]) & causal


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    blocks: torch.Tensor,
    policy: Policy,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the kept blocks.

    Returns:
        output [B, Hq, S, Dv] in q's type; CRA of every row [B, Hq, S] float32 (0 for a row without keys); density [B, Hq] over real rows.
    """
    import torch

    B, Hq, S, _ = q.shape
    T, G = k.shape[2], q.shape[1] // k.shape[1]
    mask = torch.ones(B, T, dtype=torch.bool, device=q.device) if key_mask is None else key_mask.bool()
    keys, values = k.repeat_interleave(G, 1).float(), v.repeat_interleave(G, 1).float()
    out = torch.empty(B, Hq, S, v.shape[3], dtype=q.dtype, device=q.device)
    cra = torch.empty(B, Hq, S, device=q.device)
    kept_pairs = torch.zeros(B, Hq, device=q.device, dtype=torch.float64)
    all_pairs = torch.zeros(B, Hq, device=q.device, dtype=torch.float64)
    j = torch.arange(T, device=q.device)
    for begin in range(0, S, _ROWS_AT_ONCE):
        i = torch.arange(begin, min(begin + _ROWS_AT_ONCE, S), device=q.device)
        allowed = ((j[None] <= (i + T - S)[:, None])[None] & mask[:, None])[:, None]  # [B, 1, R, T]
        kept = blocks[:, :, i // policy.block_q].repeat_interleave(policy.block_k, -1)[..., :T] & allowed
        scores = _scores(q[:, :, i].float(), keys, scale, softcap).masked_fill(~allowed, -math.inf)
        full = torch.logsumexp(scores, -1)
        scores = scores.masked_fill(~kept, -math.inf)
        sparse = torch.logsumexp(scores, -1)
        cra[:, :, i] = torch.exp(sparse - full).nan_to_num(0.0)
        out[:, :, i] = (torch.softmax(scores, -1).nan_to_num(0.0) @ values).to(q.dtype)
        real = mask[:, None, i + T - S]
        kept_pairs += (kept.sum(-1) * real).sum(-1)
        all_pairs += (allowed.sum(-1) * real).sum(-1).expand(B, Hq)
    return out, cra, (kept_pairs / all_pairs.clamp(min=1)).float()


def sample_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, policy: Policy, *, scale: float, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`block_mask` then `attend`: the whole operator."""
    blocks = block_mask(q, k, v, key_mask, policy, scale=scale, softcap=softcap)
    return attend(q, k, v, key_mask, blocks, policy, scale=scale, softcap=softcap)


@contextlib.contextmanager
def use_policies(model: Any, policies: Policy | Mapping[int, Policy]) -> Iterator[Record]:
    """Within the block, `model` (transformers, full causal layers) runs its attention through `sample_attention`.

    Args:
        model: a transformers causal LM whose attention goes through `AttentionInterface`.
        policies: one policy for all layers, or layer index -> policy (layers left out stay dense).

    Yields:
        the record of densities and CRA; it grows with every call of more than 16 rows.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function

    record = Record()

    def attention(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        layer = int(module.layer_idx)
        policy = policies if isinstance(policies, Policy) else policies.get(layer, Policy(policy="dense"))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out, cra, density = sample_attention(q, k, v, attention_mask, policy, scale=scale, softcap=kwargs.get("softcap") or 0.0)
        if q.shape[2] > DECODE_MAX_ROWS:
            record.density.setdefault(layer, []).append(density.mean(0).cpu())
            record.cra_min.setdefault(layer, []).append(cra.amin((0, 2)).cpu())
            record.cra_mean.setdefault(layer, []).append(cra.mean((0, 2)).cpu())
        return out.transpose(1, 2).contiguous(), None

    def mask(
        *args: Any, mask_function: Any = causal_mask_function, attention_mask: Any = None, local_size: Any = None, **kwargs: Any
    ) -> Any:
        if mask_function is not causal_mask_function or local_size is not None:
            raise NotImplementedError(
                "use_policies evaluates full causal attention only; this model has a windowed, chunked or packed mask."
            )
        return attention_mask

    name = "sample_attention_eval"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        with torch.no_grad():
            yield record
    finally:
        model.config._attn_implementation = before


def _per_head(values: tuple[float, ...], heads: int, device: Any) -> torch.Tensor:
    import torch

    return torch.tensor(values * heads if len(values) == 1 else values, dtype=torch.float32, device=device)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    import torch

    s = (q * scale) @ k.transpose(-1, -2)
    return softcap * torch.tanh(s / softcap) if softcap > 0 else s


def _block_sum(p: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of `block` neighbours of the last axis, zero-padded at its end."""
    import torch

    padded = torch.nn.functional.pad(p, (0, -p.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).sum(-1)


def _sampled_rows(S: int, policy: Policy) -> torch.Tensor:
    import torch

    back = torch.arange(S)  # 0 = the last row
    if policy.policy == "stripe_window":
        chosen = back % max(1, round(1 / policy.sample_ratio)) == 0
    else:
        chosen = back % policy.segment < policy.sample_rows
    return (S - 1 - back[chosen]).flip(0)


def _softmax_or_zero(scores: torch.Tensor, looked_at: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.softmax(scores.masked_fill(~looked_at, -math.inf), -1).nan_to_num(0.0)


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """Exact softmax of the rows over all allowed keys, [B, Hq, R, T]; zero for rows that are not real."""
    import torch

    S, T = q.shape[2], k.shape[2]
    position = rows + T - S
    allowed = (torch.arange(T, device=q.device)[None] <= position[:, None])[None] & mask[:, None] & mask[:, position][..., None]
    scores = _scores(q[:, :, rows].float(), k.repeat_interleave(q.shape[1] // k.shape[1], 1).float(), scale, softcap)
    return _softmax_or_zero(scores, allowed[:, None])


def _tile_mass(
    q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, policy: Policy, scale: float, softcap: float
) -> torch.Tensor:
    import torch

    B, Hq, S, _ = q.shape
    bq = policy.block_q
    nq = -(-S // bq)
    last = torch.clamp((torch.arange(nq) + 1) * bq, max=S) - 1
    rows = last[:, None] - torch.arange(policy.sample_rows)[None] * (bq // policy.sample_rows)
    valid = (rows >= torch.arange(nq)[:, None] * bq).to(q.device)
    flat = rows.clamp(min=0).flatten().to(q.device)
    out = torch.empty(B, Hq, nq, -(-k.shape[2] // policy.block_k), device=q.device)
    step = max(1, _ROWS_AT_ONCE // policy.sample_rows)
    for t in range(0, nq, step):
        part = flat[t * policy.sample_rows : (t + step) * policy.sample_rows]
        p = _probabilities(q, k, mask, part, scale, softcap).unflatten(2, (-1, policy.sample_rows))
        out[:, :, t : t + step] = _block_sum((p * valid[None, None, t : t + step, :, None]).sum(3) * weight[:, :, None], policy.block_k)
    return out


def _residue_mass(
    q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, policy: Policy, scale: float, softcap: float
) -> torch.Tensor:
    import torch

    B, Hq, S, _ = q.shape
    T, G, s = k.shape[2], q.shape[1] // k.shape[1], policy.stride
    bq, bk = policy.block_q, policy.block_k
    nq, nk = -(-S // bq), -(-T // bk)
    out = torch.zeros(B, Hq, nq, nk, device=q.device)
    for c in range(s):
        rows = torch.arange(-(c + T - S) % s, S, s, device=q.device)
        keys = torch.arange(c, T, s, device=q.device)
        position = rows + T - S
        looked = (keys[None] <= position[:, None])[None] & mask[:, None, keys] & mask[:, position][..., None]
        scores = _scores(q[:, :, rows].float(), k[:, :, keys].repeat_interleave(G, 1).float(), scale, softcap)
        p = _softmax_or_zero(scores, looked[:, None])
        per_row = torch.zeros(B, Hq, len(rows), nk, device=q.device).index_add_(3, keys // bk, p * weight[:, :, None, keys])
        out.index_add_(2, rows // bq, per_row)
    return out


def _smallest_set(mass: torch.Tensor, alpha: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """Smallest set of the last axis whose mass reaches alpha, largest first, ties to the lower index; `mass` sums to 1 or is all zero.

    room: broadcasts against `mass`; the set ends after so many at the latest.
    """
    import torch

    ordered, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    keep = before < alpha.view((1, -1) + (1,) * (mass.ndim - 2))
    if room is not None:
        keep = keep & (torch.arange(mass.shape[-1], device=mass.device) < room)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, keep)
