"""The whole check on the sample model: figures, gates, files, and the polygraphy commands that it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_passes import reference
from graph_passes.op import policy_from_attributes
from sa_export.check.decoder import DecoderInputs, feed, greedy, open_session
from sa_export.check.exactness import exact_cases
from sa_export.check.probe import probe_model
from sa_export.check.prompts import make_prompts
from sa_export.check.quality import Thresholds
from sa_export.check.result import load_result
from sa_export.check.run import CheckOptions, Subject, run_check
from sa_export.errors import UserError
from tests.sa_export.conftest import SAMPLE, Converted

OPTIONS = CheckOptions(lengths=(1024,), prompts=2, needles=6, greedy_tokens=8)


@pytest.fixture(scope="module")
def checked(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("check") / "check"
    run_check(converted.full, [Subject("tile", converted.rewritten)], output, OPTIONS, command="sa-export check ...")
    return output


def test_figures_are_sensible_and_complete(checked: Path) -> None:
    result = load_result(checked / "check.json")
    assert [e.name for e in result.candidates[0].exact] == ["prefill", "chunked prefill", "decode", "left padding", "right padding"]
    assert all(e.ok and 0 <= e.relative < 1e-4 for e in result.candidates[0].exact)
    row = result.candidates[0].lengths[0]
    assert (row.length, row.prompts, row.needles, row.recalled_full) == (1024, 2, 12, 12)
    assert 0.3 < row.density < 0.9
    assert 0 < row.cra_min < row.cra_mean < 1
    assert abs(row.loss_change) < 0.1
    assert 0 < row.kl_mean < row.kl_max
    assert 0.8 < row.top1 <= 1
    assert row.logits_max_abs > 0
    assert 0 <= row.greedy_same <= row.greedy_tokens == 8
    assert [s.id for s in row.sites] == [f"layers.{i}/SampleAttention" for i in range(6)]
    for site in row.sites:
        assert len(site.density) == len(site.cra_min) == 4
        assert 0 < site.output_error < 1
    # Layer 0 sees the same input in both models: what it loses is its own error.
    assert row.sites[0].drift == pytest.approx(row.sites[0].output_error, rel=1e-3)
    assert row.sites[5].drift > row.sites[5].output_error
    assert {g.name for g in row.gates} >= {"loss rise", "needle recall / full", "density"}
    with np.load(checked / "check.npz") as arrays:
        for head in result.candidates[0].maps:
            blocks, mass = arrays[f"{head.key}/blocks"], arrays[f"{head.key}/mass"]
            assert blocks.shape == mass.shape == (8, 16)
            np.testing.assert_allclose(mass.sum(1), 1, rtol=1e-4)
    assert (checked / "report.html").stat().st_size > 10_000


def test_probe_shows_what_the_reference_selects(converted: Converted) -> None:
    model, sites = probe_model(converted.rewritten, tap_inputs=True)
    ids = np.random.default_rng(0).integers(1, 4000, (1, 600))
    session = open_session(model, converted.folder)
    names = [o.name for o in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feed(DecoderInputs.from_model(converted.full), ids)), strict=True))
    for site in sites[::3]:
        q, k, v = (outputs[n] for n in (site.query, site.key, site.value))
        assert k.shape == (1, 2, 600, 64)  # not repeated for the query heads
        selection = reference.select(q, k, v, None, policy_from_attributes(site.attributes), site.attributes["scale"])
        assert (outputs[site.blocks] != selection.block_mask).mean() < 0.002  # ties in rounding
        assert not outputs[site.blocks].all()


def test_alpha_1_and_short_contexts_are_the_original(converted: Converted) -> None:
    cases = exact_cases(converted.full, converted.rewritten, dtype="float32", length=300, vocabulary=4096, seed=1)
    assert max(c.relative for c in cases) < 1e-4
    assert max(c.max_abs for c in cases) < 1e-3
    inputs = DecoderInputs.from_model(converted.full)
    ids = np.random.default_rng(2).integers(1, 4096, (1, 255))  # min_length is 256
    a, b = (open_session(m).run(["logits"], feed(inputs, ids))[0] for m in (converted.full, converted.rewritten))
    assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()
    ids = np.random.default_rng(2).integers(1, 4096, (1, 1000))
    a, b = (open_session(m).run(["logits"], feed(inputs, ids))[0] for m in (converted.full, converted.rewritten))
    assert np.abs(a - b).max() > 1e-2  # longer ones are sparse


def test_exactness_sees_a_wrong_scale(converted: Converted, tmp_path: Path) -> None:
    model = onnx.load(converted.rewritten, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SampleAttention")
    next(a for a in node.attribute if a.name == "scale").f *= 1.01
    broken = converted.folder / "broken.sa.onnx"
    try:
        onnx.save(model, broken)
        cases = exact_cases(converted.full, broken, dtype="float32", length=100, vocabulary=4096, seed=1)
        assert not any(c.ok for c in cases)
    finally:
        broken.unlink()


def test_greedy_64_tokens_are_those_of_transformers(converted: Converted) -> None:
    """HF generate, the full ONNX model, and the rewritten one at alpha 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sa_export.check.exactness import with_alpha_one

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    prompt = make_prompts(lambda t: tokenizer.encode(t, add_special_tokens=False), length=500, count=1, needles=3, seed=5, first_ids=[0])[
        0
    ].ids
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.from_numpy(prompt)[None]
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False)[
            0, 500:
        ].tolist()
    # generate keeps the end token from being chosen before the 64th; the sample model's end token is 0, which greedy must not meet either.
    assert 0 not in want

    class Runner:
        def __init__(self, session: object) -> None:
            self.session = session

        def infer(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            names = [o.name for o in self.session.get_outputs()]  # type: ignore[attr-defined]
            return dict(zip(names, self.session.run(names, values), strict=True))  # type: ignore[attr-defined]

    inputs = DecoderInputs.from_model(converted.full)
    assert greedy(Runner(open_session(converted.full)), inputs, prompt, 64) == want
    assert greedy(Runner(open_session(with_alpha_one(converted.rewritten), converted.folder)), inputs, prompt, 64) == want


def test_plain_polygraphy_repeats_it(checked: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(checked / "polygraphy.sh")], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert "Accuracy Summary" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "logits" in done.stdout


def test_a_missed_gate_fails_the_check(converted: Converted, tmp_path: Path) -> None:
    options = CheckOptions(lengths=(512,), prompts=1, needles=2, greedy_tokens=0, thresholds=Thresholds(density=0.01))
    result = run_check(converted.full, [Subject("a", converted.rewritten)], tmp_path / "check", options)
    assert not result.ok
    assert [g.name for g in result.candidates[0].lengths[0].gates if not g.ok] == ["density"]
    assert json.loads((tmp_path / "check" / "check.json").read_text())["ok"] is False
    shown = run_check(converted.full, [Subject("a", converted.rewritten, gated=False)], tmp_path / "shown", options)
    assert shown.ok  # for comparison only


def test_refusals(converted: Converted, tmp_path: Path) -> None:
    subject = Subject("a", converted.rewritten)
    with pytest.raises(UserError, match="longer than the model's limit of 8704"):
        run_check(converted.full, [subject], tmp_path / "x", CheckOptions(lengths=(9000,)))
    with pytest.raises(UserError, match=r"no tokenizer .* --tokenizer"):
        run_check(converted.full, [subject], tmp_path / "x", OPTIONS, tokenizer_folder=tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        run_check(converted.full, [Subject("a", tmp_path / "no.onnx")], tmp_path / "x", OPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for force, sentence in ((False, "--force"), (True, "left alone")):
        with pytest.raises(UserError, match=sentence):
            run_check(converted.full, [subject], tmp_path / "full", OPTIONS, force=force)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
