"""Medians of CUDA events on the current stream."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

__all__ = ["median_ms", "medians_ms"]

_SLEEP_CYCLES = 2_000_000  # about a millisecond: many launches


def medians_ms(steps: Sequence[Callable[[], object]], *, budget_ms: float = 400.0) -> list[float]:
    """Median time of each step when the steps run one after another, in milliseconds.

    One round warms up, a second is looked at to choose the number of rounds: as many as fit `budget_ms`, 5 to 30. The device first sleeps, so that the host
    is done launching before a round begins, then runs the last step once, untimed: each step is measured behind another one, as between the layers of a
    model, and never waits for Python. Steps that are compared belong in one call, because under a power limit the clock follows what ran before.
    """
    import torch

    def round_ms() -> list[float]:
        torch.cuda._sleep(_SLEEP_CYCLES)
        steps[-1]()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        marks[0].record()
        for step, mark in zip(steps, marks[1:], strict=True):
            step()
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    round_ms()
    count = int(min(30, max(5, budget_ms / max(sum(round_ms()), 1e-3))))
    return [statistics.median(times) for times in zip(*(round_ms() for _ in range(count)), strict=True)]


def median_ms(step: Callable[[], object], *, budget_ms: float = 400.0) -> float:
    """Median time of one step; see `medians_ms`."""
    return medians_ms([step], budget_ms=budget_ms)[0]
