"""Times the attention op against dense attention, side by side, search included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graph_passes.op import Policy
from sa_export.bench.baselines import BASELINES, dense
from sa_export.bench.inputs import Inputs
from sa_export.bench.timing import median_ms, medians_ms

if TYPE_CHECKING:
    import torch

    from sa_export.kernels import Call

__all__ = ["Row", "measure_length"]

_DENSE_BUDGET_MS = 20_000.0
"""A dense call that would take longer is extrapolated from a quarter of the length, and marked so."""


@dataclass(frozen=True)
class Row:
    """One policy at one length. Times are medians in milliseconds; NaN: not measured."""

    length: int
    policy: str
    density: float
    """Kept over all causal blocks (1: full attention)."""
    sample_ms: float
    filter_ms: float
    attend_ms: float
    total_ms: float
    """The whole op as one call, search included. The stages are timed apart and need not add up to it."""
    cudnn_ms: float
    flash_ms: float
    extrapolated: bool
    """Whether the dense times are 16 times those of a quarter of the length."""
    difference: float
    """|ours - dense| / |dense| of the outputs (L2), dense being cuDNN or FlashAttention-2; NaN where dense did not run."""
    workspace_mib: float
    source: str

    @property
    def speedup(self) -> float:
        """Time of the faster dense baseline over ours."""
        baselines = [ms for ms in (self.cudnn_ms, self.flash_ms) if math.isfinite(ms)]
        return min(baselines) / self.total_ms if baselines else math.nan

    @property
    def search_share(self) -> float:
        """Sampling and filtering over the faster dense baseline."""
        baselines = [ms for ms in (self.cudnn_ms, self.flash_ms) if math.isfinite(ms)]
        return (self.sample_ms + self.filter_ms) / min(baselines) if baselines else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "search_share": self.search_share}


def measure_length(
    inputs: Inputs, policies: dict[str, Policy], *, progress: Callable[[str, float | None], None], max_dense_ms: float = _DENSE_BUDGET_MS
) -> list[Row]:
    """Every policy on the same inputs, beside the dense baselines measured on them in the same process."""
    from sa_export.kernels import Call

    length = inputs.query.shape[2]
    progress(f"{length} tokens: dense baselines", None)
    runs, times = _dense_runs(inputs, max_dense_ms)
    extrapolated = bool(times)
    # Ours and the strongest baseline, the first, take turns.
    first = next(iter(runs), "")
    beside: list[Callable[[], object]] = [runs[first]] if first else []
    times |= {name: median_ms(run) for name, run in runs.items() if name != first}
    reference = runs[first]() if first else None
    rows = []
    for number, (name, policy) in enumerate(policies.items()):
        progress(f"{length} tokens: {name}", number / len(policies))
        call = Call(inputs.query, inputs.key, inputs.value, policy)
        total, *dense_ms = medians_ms([call.prefill, *beside])
        times |= dict(zip(runs, dense_ms, strict=False))
        output = call.prefill()
        stages = _stages(call, policy, beside)
        rows.append(
            Row(
                length=length,
                policy=name,
                density=stages[0],
                sample_ms=stages[1],
                filter_ms=stages[2],
                attend_ms=stages[3],
                total_ms=total,
                cudnn_ms=times.get("cudnn", math.nan),
                flash_ms=times.get("flash", math.nan),
                extrapolated=extrapolated,
                difference=_difference(output, reference),
                workspace_mib=call.workspace.numel() / 2**20,
                source=inputs.source,
            )
        )
    return rows


def _dense_runs(inputs: Inputs, limit_ms: float) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, float]]:
    """The baselines that exist, by name; or, where they would take longer than the limit, none and their extrapolated times."""
    length = inputs.query.shape[2]

    def runs(rows: int) -> dict[str, Callable[[], torch.Tensor]]:
        query, key, value = (x[:, :, :rows] for x in (inputs.query, inputs.key, inputs.value))
        found = {name: dense(name, query, key, value) for name in BASELINES}
        return {name: run for name, run in found.items() if run}

    short = {name: median_ms(run, budget_ms=100) for name, run in runs(length // 4).items()}
    if short and 16 * max(short.values()) > limit_ms:
        return {}, {name: 16 * ms for name, ms in short.items()}
    return runs(length), {}


def _stages(call: Call, policy: Policy, beside: list[Callable[[], object]]) -> tuple[float, float, float, float]:
    """(density, sample, filter, attend ms), summed over the chunks of query tiles in which the op works, each timed in turn with `beside`."""
    import torch

    from sa_export.kernels import is_full

    if is_full(call.problem):
        return 1.0, math.nan, math.nan, medians_ms([call.attend, *beside])[0]
    sums, kept = [0.0, 0.0, 0.0], 0
    for first in range(0, call.tiles, call.chunk_tiles):
        tiles = min(call.chunk_tiles, call.tiles - first)
        mass = call.sample(first, tiles)
        lists = call.filter(mass, first)
        kept += int(lists.counts.sum(dtype=torch.int64))
        steps: list[Callable[[], object]] = [
            partial(call.sample, first, tiles, mass),
            partial(call.filter, mass, first, lists),
            partial(call.attend, lists),
            *beside,
        ]
        sums = [a + b for a, b in zip(sums, medians_ms(steps), strict=False)]
    return kept / _causal_blocks(call, policy), sums[0], sums[1], sums[2]


def _causal_blocks(call: Call, policy: Policy) -> int:
    """Blocks that meet the causal triangle, over all heads and items."""
    problem = call.problem
    last = [problem.keys - problem.queries + min((t + 1) * policy.block_q, problem.queries) - 1 for t in range(call.tiles)]
    return problem.batch * problem.heads * sum(p // policy.block_k + 1 for p in last)


def _difference(ours: torch.Tensor, reference: torch.Tensor | None) -> float:
    if reference is None:
        return math.nan
    # A head at a time: a float32 copy of long outputs need not fit beside them.
    error = norm = 0.0
    for h in range(ours.shape[1]):
        theirs = reference[:, h].float()
        error += float((ours[:, h].float() - theirs).square().sum(dtype=None))
        norm += float(theirs.square().sum())
    return math.sqrt(error / norm) if norm else math.nan
