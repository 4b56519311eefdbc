"""Prompts have the asked length, answers lie where the spans say, and the seed decides everything."""

from __future__ import annotations

import numpy as np
import pytest

from sa_export.check.prompts import held_out, make_prompts, standard_library_files
from sa_export.errors import UserError


def encode(text: str) -> list[int]:
    return list(text.encode())


TEXT = "def f(x):\n    return x + 1\n" * 400


def test_answers_lie_where_the_spans_say() -> None:
    for prompt in make_prompts(encode, length=3000, count=3, needles=6, seed=3, first_ids=[7], text=TEXT):
        assert len(prompt.ids) == len(prompt.text) == 3000
        assert prompt.ids[0] == 7
        whole = bytes(prompt.ids[1:].astype(np.uint8)).decode()
        for begin, end in prompt.answers:
            digits = bytes(prompt.ids[begin:end].astype(np.uint8)).decode()
            assert len(digits) == 6
            assert digits.isdigit()
            question = whole[: begin - 1].rsplit("what is ", 1)[1].removesuffix("? ")
            assert f"secret {question} = {digits}\n" in whole
            assert whole.index(f"secret {question}") < whole.index(f"what is {question}")
            assert not prompt.text[begin:end].any()
        assert 0.25 < prompt.text.mean() < 0.95
        assert ((prompt.depths >= 0) & (prompt.depths < 1)).all()


def test_the_seed_decides() -> None:
    a, b, c = (make_prompts(encode, length=2000, count=2, needles=4, seed=s, text=TEXT) for s in (1, 1, 2))
    assert all((x.ids == y.ids).all() for x, y in zip(a, b, strict=True))
    assert (a[0].ids != c[0].ids).any()
    assert (a[0].ids != a[1].ids).any()


def test_distances_between_questions_vary() -> None:
    """Equal distances would tie every question to the same row of a sampling pattern."""
    prompt = make_prompts(encode, length=6000, count=1, needles=20, text=TEXT)[0]
    assert len(set(np.diff(np.sort(prompt.answers[:, 0])) % 16)) > 4


def test_too_many_needles_are_refused() -> None:
    with pytest.raises(UserError, match=r"leave \d+ for text"):
        make_prompts(encode, length=200, count=1, needles=20, text=TEXT)


def test_default_text_is_held_out_source() -> None:
    names = [name for name, _ in standard_library_files()]
    assert len(names) > 300
    share = np.mean([held_out(n) for n in names])
    assert 0.03 < share < 0.1
    assert make_prompts(encode, length=1000, count=1, needles=0)[0].text[1:].all()
