"""Figures of a prompt on logits whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes import reference
from sa_export.check.metrics import compare_logits, recalled, text_loss
from sa_export.check.probe import pair_density
from sa_export.check.prompts import Prompt
from sa_export.check.quality import Thresholds
from sa_export.check.result import Gate


def prompt(length: int = 40) -> Prompt:
    ids = np.arange(length) % 11
    return Prompt(ids, np.array([[10, 13], [30, 33]]), np.zeros(2), np.arange(length) < 25)


def perfect(p: Prompt) -> np.ndarray:
    logits = np.zeros((len(p.ids), 11), np.float32)
    logits[np.arange(len(p.ids) - 1), p.ids[1:]] = 9
    return logits


def test_recall_needs_every_token() -> None:
    p = prompt()
    logits = perfect(p)
    assert recalled(logits, p) == 2
    logits[31, (p.ids[32] + 1) % 11] = 20  # the last digit of the second answer
    assert recalled(logits, p) == 1
    logits[33, 0] = 99  # after the answer: no matter
    assert recalled(logits, p) == 1


def test_loss_is_that_of_text_in_the_last_half() -> None:
    p = prompt()
    logits = perfect(p)
    want = -np.log(np.exp(9) / (np.exp(9) + 10))
    assert text_loss(logits, p) == pytest.approx(want, rel=1e-6)
    logits[:19] = 0  # predictions of tokens 1..19: the first half
    assert text_loss(logits, p) == pytest.approx(want, rel=1e-6)
    logits[19] = 0  # predicts token 20, the first that counts; tokens 20..24 are text
    assert text_loss(logits, p) == pytest.approx((4 * want + np.log(11)) / 5, rel=1e-6)


def test_differences_of_logits() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(600, 7))
    same = compare_logits(a, a)
    assert (same.max_abs, same.relative, same.top1) == (0, 0, 1)
    assert same.kl_max == 0
    b = a.copy()
    b[:300] += 5 * rng.normal(size=(300, 7))  # the first half does not count
    assert compare_logits(a, b).max_abs == 0
    b = a + 3  # a shift changes no probability
    shifted = compare_logits(a, b)
    assert shifted.kl_max < 1e-12
    assert shifted.max_abs == pytest.approx(3)
    b = a.copy()
    b[450] = 0
    b[450, 2] = np.log(6)
    p = np.exp(a[450]) / np.exp(a[450]).sum()
    q = np.exp(b[450]) / np.exp(b[450]).sum()
    assert compare_logits(a, b).kl_max == pytest.approx((p * np.log(p / q)).sum())
    b[500, 1] = np.nan
    broken = compare_logits(a, b)
    assert np.isnan(broken.kl_mean)
    assert np.isnan(broken.max_abs)
    assert not Gate("kl", broken.kl_mean, "<=", Thresholds().kl).ok


@pytest.mark.parametrize(("s", "t"), [(130, 130), (77, 200), (1, 65), (64, 64)])
def test_density_counts_pairs_as_the_reference_does(s: int, t: int) -> None:
    blocks = np.random.default_rng(1).random((3, -(-s // 32), -(-t // 16))) < 0.4
    np.testing.assert_allclose(pair_density(blocks, s, t, 32, 16), reference.density(blocks[None], s, t, None, 32, 16)[0], rtol=1e-12)
