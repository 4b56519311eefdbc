"""At alpha = 1 the rewritten graph must be the same function as the original: prefill, chunked prefill, decode, padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.check.decoder import DecoderInputs, feed, open_session, split_outputs
from sa_export.check.result import ExactCase

__all__ = ["TOLERANCE", "exact_cases", "with_alpha_one"]

# Relative to the largest logit of the original, by the type of the weights. float32: the issue of rounding order only.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}


def with_alpha_one(path: Path) -> bytes:
    """The rewritten model with every site at alpha 1 and no minimum length; external data stays where it is."""
    import onnx

    from graph_passes.op import DOMAIN

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            for attribute in node.attribute:
                if attribute.name in ("alpha", "alpha_slash"):
                    attribute.floats[:] = [1.0] * len(attribute.floats)
                elif attribute.name == "min_length":
                    attribute.i = 0
    return model.SerializeToString()


def exact_cases(full: Path, rewritten: Path, *, dtype: str, length: int, vocabulary: int, seed: int) -> list[ExactCase]:
    """Runs both models on random tokens and compares the logits of attended positions.

    Args:
        full, rewritten: ONNX files.
        dtype: float32, float16 or bfloat16, for the tolerance.
        length: tokens of the prefill (a few hundred is enough: the selection is off at alpha 1 whatever the length).
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator

    inputs = DecoderInputs.from_model(full)
    runners = [
        OnnxrtRunner(lambda: open_session(full), name="full attention"),
        OnnxrtRunner(lambda: open_session(with_alpha_one(rewritten), rewritten.parent), name="rewritten, alpha 1"),
    ]
    names: list[str] = []
    attended: list[np.ndarray] = []

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for name, values, real in _feeds(full, inputs, length, vocabulary, seed):
            names.append(name)
            attended.append(real)
            yield values

    cases: list[ExactCase] = []

    def compare(first: Any, second: Any) -> dict[str, bool]:
        a, b = split_outputs(first)[0], split_outputs(second)[0]
        real = attended[len(cases)]
        if real.shape[1] != a.shape[1]:  # logits of the last attended position only
            real = np.ones(a.shape[:2], bool)
        difference = float(np.abs(a - b)[real].max())
        scale = float(np.abs(a)[real].max())
        case = ExactCase(names[len(cases)], difference, difference / scale if scale else np.inf, TOLERANCE[dtype])
        cases.append(case)
        return {"logits": case.ok}

    Comparator.compare_accuracy(Comparator.run(runners, feeds(), streaming=True), compare_func=compare)
    return cases


def _feeds(
    full: Path, inputs: DecoderInputs, length: int, vocabulary: int, seed: int
) -> Iterator[tuple[str, dict[str, np.ndarray], np.ndarray]]:
    """(name, feed, attended [B, S]); the caches come from the original, so that each case is judged alone."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocabulary, (3, length))
    yield "prefill", feed(inputs, ids[:1]), np.ones((1, length), bool)
    if inputs.past:
        session = open_session(full)
        names = [o.name for o in session.get_outputs()]
        cut = length // 3
        _, past = split_outputs(dict(zip(names, session.run(None, feed(inputs, ids[:2, :cut])), strict=True)))
        yield "chunked prefill", feed(inputs, ids[:2, cut:], past=past), np.ones((2, length - cut), bool)
        _, past = split_outputs(dict(zip(names, session.run(None, feed(inputs, ids[:2, :-1])), strict=True)))
        yield "decode", feed(inputs, ids[:2, -1:], past=past), np.ones((2, 1), bool)
    if "attention_mask" in inputs.names:
        for side in ("left", "right"):
            mask = np.ones((3, length), np.int64)
            for row, pad in ((1, length // 5), (2, length // 2)):
                mask[row, :pad] = 0
            if side == "right":
                mask = mask[:, ::-1].copy()
            yield f"{side} padding", feed(inputs, ids, mask), mask.astype(bool)
