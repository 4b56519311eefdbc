"""Frozen graphs in other spellings: what means the same is rewritten as before, and equal; what only looks the same is not.

`SA_VARIANTS` is the number of graphs of each kind, `SA_VARIANTS_SEED` where they start.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_passes.pipeline import inspect, rewrite
from tests.data.frozen import Frozen, frozen, thaw
from tests.data.judge import EXACT, feeds, tolerance
from tests.graph_passes.graph_editor import Editor
from tests.graph_passes.other_meaning import CONDITIONS, OTHER, NoPlace, masked_operator
from tests.graph_passes.same_meaning import SAME
from tests.graph_passes.test_frozen_mutants import Bare

VARIANTS = int(os.environ.get("SA_VARIANTS", "0"))
SEED = int(os.environ.get("SA_VARIANTS_SEED", "0"))
LARGEST = 330_000
CALLS = ((2, 20, 3, "left"), (1, 18, 0, "none"), (1, 7, 12, "none"))
LEFT_OUT = ("fp16", "int4", "paged", "static", "11", "14", "17", "cuda", "webgpu", "gpt-oss", "encoder", "alibi")
"""Routes and families that are not float32 on a CPU, are of an opset whose operators are spelled otherwise, or have nothing to rewrite."""


@cache
def bases() -> tuple[Frozen, ...]:
    return tuple(g for g in frozen() if not any(x in g.id for x in LEFT_OUT) and len(thaw(g.path)) < LARGEST)


@cache
def content(graph: Frozen) -> bytes:
    return thaw(graph.path)


def numbers(path: Path, *, padding: bool = True, turned: bool = False) -> list[dict[str, np.ndarray] | None]:
    """Logits and presents of real tokens in each call; None for a call that the graph does not take.

    Args:
        padding: also of calls with padding, where numbers of padded tokens are nobody's business.
        turned: the graph takes masks that are 0 for real tokens.
    """
    session = Bare(path)
    out: list[dict[str, np.ndarray] | None] = []
    for batch, rows, past, pad in CALLS:
        data = feeds(session, batch, rows, past, pad if padding else "none")
        if isinstance(data, str):
            out.append(None)
            continue
        if turned:
            data["attention_mask"] = 1 - data["attention_mask"]
        try:
            results = session(data)
        except Exception:  # ONNX Runtime's GroupQueryAttention takes no batch with a past
            out.append(None)
            continue
        mask = data.get("attention_mask", np.full((batch, past + rows), not turned)).astype(bool) != turned
        got = {}
        for name, value in results.items():
            if value.ndim == 3 and value.shape[:2] == (batch, rows):
                got[name] = value[mask[:, -rows:]]
            elif value.ndim == 4 and value.shape[2] == mask.shape[1]:
                got[name] = value.swapaxes(1, 2)[mask]
        out.append(got)
    return out


def difference(a: list[dict[str, np.ndarray] | None], b: list[dict[str, np.ndarray] | None]) -> float:
    """The largest one, as a share of the largest number of its tensor."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x is None:
            continue
        assert y is not None, "a call that the graph takes is refused"
        assert set(x) == set(y)
        assert x
        for name, value in x.items():
            other = y[name].astype(np.float64)
            assert np.isfinite(value).all()
            worst = max(worst, float(np.abs(value - other).max(initial=0)) / max(float(np.abs(value).max(initial=0)), 1e-6))
            worst = worst if np.isfinite(other).all() else float("inf")
    return worst


class Base:
    """A frozen graph, how many sites it has and what it computes."""

    def __init__(self, graph: Frozen, folder: Path) -> None:
        path = folder / "base.onnx"
        path.write_bytes(content(graph))
        self.sites = [s.id for s in inspect(path).sites]
        self.numbers = numbers(path)


def test_other_spellings(tmp_path: Path) -> None:
    generator = random.Random(SEED)
    known: dict[str, Base] = {}
    fates: Counter[str] = Counter()
    used: Counter[str] = Counter()
    wrong: list[str] = []
    path, out = tmp_path / "variant.onnx", tmp_path / "out.onnx"
    wanted = VARIANTS or 20
    while fates.total() < wanted:
        graph = generator.choice(bases())
        if graph.id not in known:
            known[graph.id] = Base(graph, tmp_path)
        base = known[graph.id]
        if not any(base.numbers):  # ONNX Runtime has no kernel for it on a CPU
            continue
        model = onnx.load_model_from_string(content(graph))
        names = []
        for name in generator.choices(sorted(SAME), k=generator.randint(1, 5)):
            editor = Editor(model, generator)
            if SAME[name](editor):
                names.append(f"{name} {editor.chosen}" if editor.chosen else name)
                used[name] += 1
        what = f"{graph.id}: {', '.join(names)}"
        path.write_bytes(model.SerializeToString())
        try:
            assert difference(base.numbers, numbers(path)) < tolerance(False), "the variant itself computes something else"
            report = inspect(path)
            reasons = " ".join(f"{d.id} {d.reason} ({d.stopped_by})" for d in report.declined)
            assert [s.id for s in report.sites] == base.sites, reasons
            if base.sites:
                rewrite(path, out, EXACT, force=True)
                assert difference(base.numbers, numbers(out)) < tolerance(False), "the rewritten variant computes something else"
            fates["as before"] += 1
        except Exception as error:
            fates["wrong"] += 1
            wrong.append(f"{what}: {type(error).__name__} {str(error)[:600]}")
    print(dict(fates), dict(used))
    assert not wrong, "\n".join(wrong)
    assert fates["as before"] == wanted


UNSEEN = ("window longer than any call", "window of all heads but one", "lowered by 5", "chunks", "nine tenths of the probabilities")
"""Changes that do not show in the calls of the test, or not behind a norm."""
TURNED = "padding turned"


def finite(results: list[dict[str, np.ndarray] | None]) -> bool:
    return all(np.isfinite(v).all() for r in results if r is not None for v in r.values())


def test_other_meanings(tmp_path: Path) -> None:
    """The changed attention is declined for the true reason, or the rewrite is equal to the change; the others stay sites."""
    generator = random.Random(SEED)
    fates: Counter[str] = Counter()
    made: Counter[str] = Counter()
    wrong: list[str] = []
    path, out = tmp_path / "variant.onnx", tmp_path / "out.onnx"
    wanted = VARIANTS or len(OTHER)
    for turn in range(20 * wanted):
        if fates.total() >= wanted:
            break
        graph = generator.choice(bases())
        model = onnx.load_model_from_string(content(graph))
        path.write_bytes(model.SerializeToString())
        before = {s.node for s in inspect(path).sites}
        editor = Editor(model, generator)
        cores = [c for c in editor.cores() if c.softmax.name in before]
        if not cores:
            continue
        core = generator.choice(cores)
        node = core.softmax.name
        name = list(OTHER)[turn % len(OTHER)]
        change, reason = OTHER[name]
        original = numbers(path, padding=False)
        try:
            if not change(editor, core):
                continue
        except NoPlace:
            continue
        made[name] += 1
        # What the change lets real rows see of padding means nothing, but where the change is one of padding.
        how = {"padding": not reason, "turned": name == TURNED}
        what = f"{graph.id}, {node}: {name} {editor.chosen}"
        path.write_bytes(model.SerializeToString())
        try:
            expected = numbers(path, **how)
            assert any(expected), "the variant does not run"
            report = inspect(path)
            found = {s.node for s in report.sites}
            reasons = [d.reason for d in report.declined]
            assert found >= before - {node} or not reason, f"another attention is declined too: {reasons}"
            if reason:
                assert node not in found, "it is rewritten"
                assert any(re.search(reason, r) for r in reasons), reasons
            unseen = name in UNSEEN or (name == "top left" and expected[-1] is None)  # without a past it is lower right
            if reason and finite(expected) and not unseen:
                assert difference(original, expected) > 1e-5, "nothing changed"
            if found and finite(expected):
                rewrite(path, out, EXACT, force=True)
                assert difference(expected, numbers(out, **how)) < tolerance(False), "the rewritten variant computes something else"
            fates["declined" if node not in found else "equal"] += 1
        except Exception as error:
            fates["wrong"] += 1
            wrong.append(f"{what}: {type(error).__name__} {str(error)[:600]}")
    print(dict(fates), dict(made))
    assert not wrong, "\n".join(wrong)
    assert fates["declined"] > wanted // 2, fates
    assert fates["equal"] > 0, fates


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", CONDITIONS)
def test_other_masks_of_the_operator(name: str, family: str, tmp_path: Path) -> None:
    """One of the two Attention nodes of an export sees fewer keys: it alone is declined."""
    condition, reason = CONDITIONS[name]
    (graph,) = (g for g in frozen() if g.id == f"dynamo-sdpa-23/{family}")
    model = onnx.load_model_from_string(content(graph))
    node = [n for n in model.graph.node if n.op_type == "Attention"][1]
    assert masked_operator(Editor(model, random.Random(SEED)), node, condition)
    path, out = tmp_path / "variant.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    report = inspect(path)
    assert [s.id for s in report.sites] == ["layers.0"]
    assert [d.id for d in report.declined] == ["layers.1"]
    assert re.search(reason, report.declined[0].reason), report.declined[0].reason
    expected = numbers(path, padding=False)
    assert any(expected)
    rewrite(path, out, EXACT, force=True)
    assert difference(expected, numbers(out, padding=False)) < tolerance(False)
