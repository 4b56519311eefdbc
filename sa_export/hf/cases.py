"""The inputs on which an exported step is compared with the torch model: every way in which generation calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_LENGTH = 48
"""Tokens of the longest case; enough for three chunks of unequal size, short enough for a model of billions of parameters."""


@dataclass(frozen=True, eq=False)
class Case:
    """One batch of sequences and how it is fed to the graph.

    ids, mask, positions are [B, T] int64; mask is 1 for a real token; a real token's position counts the real tokens before it.
    The graph is called once for each pair of neighbours in `cuts` (0, ..., T) with the presents of the call before as its past.
    """

    name: str
    ids: np.ndarray
    mask: np.ndarray
    cuts: tuple[int, ...]

    @property
    def positions(self) -> np.ndarray:
        return np.maximum(self.mask.cumsum(-1) - 1, 0)


def cases(vocabulary: np.ndarray, longest: int | None, seed: int) -> tuple[Case, ...]:
    """Prefill, a batch of 3 with left and with right padding, chunked prefill, and decode steps after either padding.

    Args:
        vocabulary: the token ids to draw from.
        longest: positions that the model has, None when it has no limit.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    total = min(_LENGTH, longest or _LENGTH)
    prompt, steps = max(total - 4, 1), min(3, total - 1)

    def batch(name: str, items: int, length: int, left: bool, cuts: tuple[int, ...]) -> Case:
        ids = rng.choice(vocabulary, (items, length))
        mask = np.ones((items, length), np.int64)
        for item in range(1, items):
            # Item 1 is nearly full, item 2 nearly empty.
            real = max(cuts[1] * (2 - item) * 3 // 4, 2) if cuts[1] > 2 else cuts[1]
            padding = slice(0, cuts[1] - real) if left else slice(real, cuts[1])
            mask[item, padding] = 0
        return Case(name, ids.astype(np.int64), mask, tuple(sorted(set(cuts))))

    decode = (0, prompt, *range(prompt + 1, prompt + 1 + steps))
    return (
        batch("prefill", 1, total, True, (0, total)),
        batch("prefill, batch of 3, left padding", 3, total, True, (0, total)),
        batch("prefill, batch of 3, right padding", 3, total, False, (0, total)),
        batch("chunked prefill", 1, total, True, (0, total * 2 // 5, total * 3 // 5, total)),
        batch("decode, batch of 3, left padding", 3, decode[-1], True, decode),
        batch("decode, batch of 3, right padding", 3, decode[-1], False, decode),
    )


def drawable_ids(checkpoint: Any) -> np.ndarray:
    """Ids of ordinary tokens: all that the model embeds and the tokenizer knows, without the special ones."""
    size = checkpoint.model.get_input_embeddings().weight.shape[0]
    special: set[int] = set()
    if checkpoint.tokenizer is not None:
        size = min(size, len(checkpoint.tokenizer))
        special = set(checkpoint.tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(size) if i not in special], np.int64)
    return ordinary if ordinary.size else np.arange(size, dtype=np.int64)
