"""Real prompts of an exact length: source text of the Python standard library with recall questions ("needles") in it.

A needle is the line `secret KEY = DIGITS`; its question `what is KEY? DIGITS` comes later in the same prompt. A question is answered
exactly when the arg max at every position of the answer is the right token; that is the same event as greedy decoding giving the right digits.
Many needles share one prompt, so that one forward pass answers many questions.

Every piece is tokenised alone and the ids are joined: the spans of the answers are then exact for any tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sa_export.errors import UserError

__all__ = ["Prompt", "filler_text", "held_out", "make_prompts", "needle_text", "question_text", "standard_library_files"]

Encode = Callable[[str], Sequence[int]]

# Words that are one token in most vocabularies, so that a key costs few tokens.
WORDS = """
access action active address after album answer apple archive argument array assert async author base basic batch before begin binary
block board border bottom bound branch bridge bright broken buffer build button byte cache call camera candle carbon card case castle
cell center chain chair change channel char check child circle class clean clear client clock close cloud code coffee color column comma
command common compare complex config connect constant content context control copy core corner count cover create crystal current
custom cycle data date debug decimal default define degree delete depth design detail device digit direct display doctor domain door
double dragon dream drive dummy eagle early earth east edge editor element email empty enable encode engine entry error escape event
exact example except exit expect export extra factor false family fast father feature field figure file filter final find first fixed
flag flat float flower folder force forest format forward fragment frame free friend front full function future garden gate general
ghost giant glass global gold grand graph green grid group guard guide hammer handle harbor header heart heavy height hidden history
holder honey horse host house human icon image import index initial inner input insert inside
""".split()  # noqa: SIM905 - two hundred quoted lines read worse


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt and where its answers lie.

    Attributes:
        ids: [S] int64.
        answers: [n, 2] int64, the half-open spans of the answers' tokens (digits only).
        depths: [n] float64, where in the prompt the needle stands (0 = first token, 1 = last).
        text: [S] bool, true where the token is ordinary text (not needle, question or answer): the loss is taken there.
    """

    ids: np.ndarray
    answers: np.ndarray
    depths: np.ndarray
    text: np.ndarray


def held_out(name: str) -> bool:
    """Whether a file (by its path below the library folder) is kept out of the sample model's training: about one in sixteen."""
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


def standard_library_files(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """(name below the folder, path) of Python sources in a fixed order, by default the running Python's own; installed packages are left out."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if d not in ("site-packages", "dist-packages", "__pycache__"))
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path


def needle_text(key: str, digits: str) -> tuple[str, str]:
    """The needle's line in two pieces: up to the digits, and the digits with their leading space."""
    return f"\nsecret {key} =", f" {digits}"


def question_text(key: str, digits: str) -> tuple[str, str]:
    """The question in two pieces: up to the digits, and the digits with their leading space."""
    return f"\nwhat is {key}?", f" {digits}"


def make_prompts(
    encode: Encode,
    *,
    length: int,
    count: int,
    needles: int,
    seed: int = 0,
    digits: int = 6,
    first_ids: Sequence[int] = (),
    text: str | None = None,
) -> list[Prompt]:
    """Prompts of exactly `length` tokens: filler text with `needles` needles at random depths and all questions at the end.

    Args:
        encode: text -> ids without special tokens.
        length: tokens of a prompt.
        count: number of prompts.
        needles: needles of a prompt.
        seed: the same seed gives the same prompts (for the same text and tokenizer).
        digits: digits of an answer.
        first_ids: ids that every prompt starts with (a beginning-of-sequence token).
        text: filler; by default the held-out files of the running Python's standard library.

    Raises:
        UserError: the needles leave too little room for text.
    """
    rng = np.random.default_rng(seed)
    filler = np.asarray(encode(text if text is not None else filler_text(seed, 12 * length * min(count, 8))), np.int64)
    return [_prompt(encode, filler, rng, length, needles, digits, list(first_ids)) for _ in range(count)]


def filler_text(seed: int, characters: int, root: Path | None = None) -> str:
    """At least `characters` of held-out source text, files in an order that the seed decides (fewer when there is no more).

    Raises:
        UserError: no such sources were found.
    """
    files = [path for name, path in standard_library_files(root) if held_out(name)]
    np.random.default_rng(seed + 1).shuffle(files)
    parts: list[str] = []
    size = 0
    for path in files:
        part = path.read_text(encoding="utf-8", errors="replace")
        parts.append(part)
        size += len(part)
        if size >= characters:
            break
    if not parts:
        raise UserError("The standard library's sources were not found, so there is no text for prompts; give a text file with --text.")
    return "\n".join(parts)


def _prompt(
    encode: Encode, filler: np.ndarray, rng: np.random.Generator, length: int, needles: int, digits: int, first: list[int]
) -> Prompt:
    keys: list[str] = []
    while len(keys) < needles:
        key = "-".join(rng.choice(WORDS, 2, replace=False))
        if key not in keys:
            keys.append(key)
    values = ["".join(str(d) for d in rng.integers(0, 10, digits)) for _ in keys]
    statements = [[list(encode(part)) for part in needle_text(k, v)] for k, v in zip(keys, values, strict=True)]
    questions = [[list(encode(part)) for part in question_text(k, v)] for k, v in zip(keys, values, strict=True)]
    newline = list(encode("\n"))
    # Text of random length between the questions: a fixed distance would tie every question to the same row of a sampling pattern.
    gaps = rng.integers(0, 24, needles)
    used = len(first) + sum(len(a) + len(b) for a, b in statements + questions) + needles * len(newline) * 2
    room = length - used
    if room < max(length // 4, 16):
        raise UserError(
            f"{needles} needles take {used} of {length} tokens and leave {max(room, 0)} for text; at least a quarter must be text: "
            "ask for fewer needles or longer prompts."
        )
    start = int(rng.integers(0, max(1, len(filler) - room)))
    body = np.resize(filler[start:], room) if len(filler) - start < room else filler[start : start + room]
    gaps = np.minimum(gaps, room // (2 * max(needles, 1)))
    story = room - int(gaps.sum())  # text before the questions
    cuts = np.sort(rng.integers(0, story + 1, needles))

    ids: list[int] = list(first)
    text = [False] * len(first)
    depths = np.zeros(needles)
    previous = 0
    for n, cut in enumerate(cuts):
        ids += body[previous:cut].tolist()
        text += [True] * int(cut - previous)
        depths[n] = len(ids) / length
        piece = statements[n][0] + statements[n][1] + newline
        ids += piece
        text += [False] * len(piece)
        previous = int(cut)
    ids += body[previous:story].tolist()
    text += [True] * (story - previous)
    spans = np.zeros((needles, 2), np.int64)
    order = rng.permutation(needles)
    previous = story
    for n, gap in zip(order, gaps, strict=True):
        ids += body[previous : previous + gap].tolist()
        text += [True] * int(gap)
        previous += int(gap)
        ids += questions[n][0]
        lead = len(ids)
        ids += questions[n][1]
        # The leading space may be a token of its own; scoring it would count a token that is no digit.
        spans[n] = lead + _leading_spaces(encode, questions[n][1]), len(ids)
        ids += newline
        text += [False] * (len(ids) - len(text))
    return Prompt(np.asarray(ids, np.int64), spans, depths, np.asarray(text))


def _leading_spaces(encode: Encode, answer: list[int]) -> int:
    space = list(encode(" "))
    return len(space) if len(answer) > len(space) and answer[: len(space)] == space else 0
