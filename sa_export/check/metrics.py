"""Figures of one prompt: how far a candidate's logits are from full attention's, and what it recalls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sa_export.check.prompts import Prompt

__all__ = ["LogitFigures", "PromptScore", "compare_logits", "recalled", "score", "text_loss"]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class LogitFigures:
    """Differences over the last half of one prompt.

    `max_abs` in logits; `relative` = |b - a| / |a| (Frobenius); `kl` = KL(full || candidate) a token in nats (mean and largest); `top1` the share of
    positions with the same arg max.
    """

    max_abs: float
    relative: float
    kl_mean: float
    kl_max: float
    top1: float


@dataclass(frozen=True)
class PromptScore:
    """What one model made of one prompt."""

    recalled: int
    loss: float


def compare_logits(full: np.ndarray, candidate: np.ndarray) -> LogitFigures:
    """`full` and `candidate` are [S, V]; NaN or infinity in the candidate gives NaN figures, which fail every gate."""
    half = full.shape[0] // 2
    a, b = full[half:], candidate[half:]
    top1 = float((a.argmax(-1) == b.argmax(-1)).mean())
    max_abs, square, norm, kl = 0.0, 0.0, 0.0, []
    for begin in range(0, len(a), _ROWS_AT_ONCE):
        x = a[begin : begin + _ROWS_AT_ONCE].astype(np.float64)
        y = b[begin : begin + _ROWS_AT_ONCE].astype(np.float64)
        difference = y - x
        max_abs = np.maximum(max_abs, np.abs(difference).max())  # unlike max(), keeps NaN
        square += (difference**2).sum()
        norm += (x**2).sum()
        p, q = _log_softmax(x), _log_softmax(y)
        kl.append((np.exp(p) * (p - q)).sum(-1))
    each = np.concatenate(kl)
    return LogitFigures(float(max_abs), float(np.sqrt(square / norm)), float(each.mean()), float(each.max()), top1)


def score(logits: np.ndarray, prompt: Prompt) -> PromptScore:
    """Recall and text loss of `logits` [S, V]."""
    return PromptScore(recalled(logits, prompt), text_loss(logits, prompt))


def recalled(logits: np.ndarray, prompt: Prompt) -> int:
    """Questions whose every answer token is the arg max."""
    return sum(bool((logits[a - 1 : b - 1].argmax(-1) == prompt.ids[a:b]).all()) for a, b in prompt.answers)


def text_loss(logits: np.ndarray, prompt: Prompt) -> float:
    """Mean cross-entropy (nats a token) of ordinary text in the last half of the prompt."""
    length = len(prompt.ids)
    places = np.flatnonzero(prompt.text[1:] & (np.arange(1, length) >= length // 2))
    total = 0.0
    for begin in range(0, len(places), _ROWS_AT_ONCE):
        rows = places[begin : begin + _ROWS_AT_ONCE]
        total -= _log_softmax(logits[rows].astype(np.float64))[np.arange(len(rows)), prompt.ids[rows + 1]].sum()
    return float(total / len(places))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
