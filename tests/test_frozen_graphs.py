"""Every frozen graph: its full-causal layers are rewritten and equal at alpha 1, every other layer is declined for what it truly is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graph_passes import op
from graph_passes.config import Config
from graph_passes.op import Policy
from graph_passes.pipeline import rewrite
from graph_passes.reference import sample_attention
from graph_passes.report import RewriteReport
from tests.data import truth
from tests.data.families import FAMILIES, FULL, HEAD_SIZE
from tests.data.frozen import GRAPHS, Frozen, frozen, read_manifest, thaw
from tests.data.judge import EXACT, SITUATIONS, Runner, feeds, judge, tolerance
from tests.data.make import ROUTES, default_families
from tests.graph_passes.builder import padding_mask

ALL = tuple(frozen())

NEAR_DUPLICATES = (
    "ort-basic",
    "genai-fp16-webgpu",
    "hf-exporter-cuda",
    "hf-exporter-cuda-nopast",
    "hf-exporter-webgpu",
    "hf-exporter-webgpu-nopast",
)
"""Routes whose graphs differ from another route's in a node or two."""

JUDGED = tuple(g for g in ALL if not (g.route in NEAR_DUPLICATES and g.family == "llama"))
"""The graphs that are run; of near-duplicates llama, which is qwen3 without QK-norm, is not."""

EXCEPTIONS: dict[str, str] = {}
"""Graph -> why a full-causal layer of it is not rewritten. Nothing else may be declined."""

ALLOWED_SKIPS = ("the graph has no past", "the graph takes no padding")
"""Calls that a graph cannot have by its inputs."""

REFUSED_BY_THE_ORIGINAL = (
    "batch_size must be 1 when sequence_length > 1 and past context is given",  # GroupQueryAttention
    "is too small for sequence_length",  # GroupQueryAttention: padded rows in a batch with a ring cache
    "invalid expand shape",  # the builder's graphs with MultiHeadAttention: their mask serves a prompt or one token, no chunk,
    "Shape mismatch attempting to re-use buffer",  # and they declare lengths of repeated keys that do not hold
)
"""Calls that ONNX Runtime refuses on the original graph."""

NOT_LOADED = {
    "genai-paged": "PagedAttention has no CPU kernel",
    "dynamo-sdpa-23-fp16/gemma2": "torch.onnx multiplies float16 by float32 at opset 23",
    "dynamo-sdpa-23-fp16/gpt-oss": "torch.onnx multiplies float16 by float32 at opset 23",
}
"""Routes or graphs that ONNX Runtime does not load on a CPU."""

SAME_MODEL = {"genai-fp16-cuda/qwen3": "genai-fp32-cpu/qwen3", "genai-fp16-webgpu/qwen3": "genai-fp32-cpu/qwen3"}
"""Graphs that ONNX Runtime loads but refuses to run on a CPU (QK-norm inside of GroupQueryAttention), and the same model by another route."""


@pytest.mark.parametrize("graph", JUDGED, ids=lambda g: g.id)
def test_full_layers_are_rewritten_and_equal_the_others_declined(graph: Frozen, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(thaw(graph.path))
    result = judge(path, head_size=FAMILIES[graph.family].head_size if graph.family in FAMILIES else HEAD_SIZE)
    found = result.report.inspection
    sites = {s.id for s in found.sites}
    reasons = {d.id: d.reason for d in found.declined if d.id.startswith("layers.")}
    kinds = truth.layers(graph.route, graph.family)
    assert sorted(sites | reasons.keys()) == [f"layers.{i}" for i in range(len(kinds))]
    for i, kind in enumerate(kinds):
        name = f"layers.{i}"
        if kind != FULL:
            assert name not in sites, f"{name} is {kind}, but was rewritten"
            assert truth.holds(reasons[name], kind), f"{name} is {kind}, but was declined because {reasons[name]}"
        elif graph.id not in EXCEPTIONS:
            assert name in sites, f"{name} is full causal, but was declined: {reasons[name]}"
    assert not result.broken
    if result.unusable:
        assert NOT_LOADED.keys() & {graph.route, graph.id}, result.unusable
        return
    if graph.id in SAME_MODEL:
        return  # compared below
    skipped = [d for d in result.differences if d.skipped]
    assert [d for d in skipped if not any(w in d.skipped for w in (*ALLOWED_SKIPS, *REFUSED_BY_THE_ORIGINAL))] == []
    assert not sites or len(skipped) < len(result.differences)
    assert [d for d in result.differences if d.relative > tolerance(result.half)] == []


def test_a_lost_key_mask_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above sees what it is for: padding that a rewrite drops."""

    def careless(path: Path, out: Path, *arguments: Any, **options: Any) -> RewriteReport:
        report = rewrite(path, out, *arguments, **options)
        model = onnx.load(out)
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == op.OP_TYPE:
                mask, none, every = node.input[3], f"{node.name}/none", f"{node.name}/every"
                nodes += [onnx.helper.make_node("Not", [mask], [none]), onnx.helper.make_node("Or", [mask, none], [every])]
                node.input[3] = every
            nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, out)
        return report

    monkeypatch.setattr("tests.data.judge.rewrite", careless)
    path = tmp_path / "model.onnx"
    path.write_bytes(thaw(GRAPHS / "dynamo-sdpa-20" / "llama.onnx.xz"))
    result = judge(path)
    shown = {d.situation for d in result.differences if d.relative > tolerance(False)}
    assert shown >= {"prefill, left padding", "chunk, left padding", "decode, left padding"}


@pytest.mark.parametrize("name", SAME_MODEL)
def test_what_no_cpu_runs_agrees_with_the_same_model_by_another_route(name: str, tmp_path: Path) -> None:
    path, other = tmp_path / "model.onnx", tmp_path / "other.onnx"
    by_id = {g.id: g.path for g in ALL}
    path.write_bytes(thaw(by_id[name]))
    other.write_bytes(thaw(by_id[SAME_MODEL[name]]))
    assert rewrite(path, tmp_path / "twin.onnx", EXACT).rewritten == 2
    refused, twin, oracle = Runner(path), Runner(tmp_path / "twin.onnx"), Runner(other)
    for batch, rows, past, pad in SITUATIONS.values():
        if past and rows > 1 and batch > 1:
            continue
        data = [feeds(session, batch, rows, past, pad) for session in (twin, oracle)]
        assert not any(isinstance(d, str) for d in data)
        got, want = (session(d)["logits"].astype(np.float64) for session, d in zip((twin, oracle), data, strict=True))
        real = padding_mask(batch, past + rows, pad)[:, -rows:].astype(bool)
        assert np.abs(got - want)[real].max() < tolerance(True) * np.abs(want[real]).max()
    with pytest.raises(Exception, match="only on the CUDA and WebGPU"):  # if this ever runs, it belongs into the test above
        refused(feeds(refused, 1, 30, 0, "none"))


def test_the_frozen_set_is_whole() -> None:
    """What a route does not have is written in the manifest with the exporter's own words."""
    there = {(g.route, g.family) for g in ALL}
    manifest = read_manifest()
    assert set(manifest) == set(ROUTES)
    for route in ROUTES:
        wanted = set(default_families(route))
        assert {f for r, f in there if r == route} | set(manifest[route]["not exported"]) >= wanted, route
    assert len({f for _, f in there} & set(FAMILIES)) >= 20
    assert len(manifest) >= 10
    assert sum(p.stat().st_size for p in GRAPHS.rglob("*") if p.is_file()) < 10 * 2**20


SPARSE = Policy(alpha=(0.5,), block_q=16, block_k=16, sample_rows=4, window=0, sink=0, dense_rows=0, min_length=0)


SPARSE_FAMILIES = (
    *("llama", "qwen3", "gpt2", "phi", "falcon-mqa", "gpt-bigcode", "gptj", "glm", "gemma2", "gemma3", "cohere2", "deepseek-v3"),
    *("gpt-neox", "opt", "stablelm"),
)
"""One of each head layout, rotary form, cache form, norm and mixture of layers."""


@pytest.mark.parametrize("graph", [g for g in ALL if g.route == "dynamo-sdpa-20" and g.family in SPARSE_FAMILIES], ids=lambda g: g.family)
def test_sparse_nodes_compute_what_the_reference_says(graph: Frozen, tmp_path: Path) -> None:
    """One family after another with a threshold that drops blocks: each node gets the operands that the specification means."""
    path, twin = tmp_path / "model.onnx", tmp_path / "model.sa.onnx"
    path.write_bytes(thaw(graph.path))
    report = rewrite(path, twin, Config(SPARSE))
    assert report.ok
    model = onnx.load(twin)
    nodes = [n for n in model.graph.node if n.op_type == op.OP_TYPE]
    known = {o.name for o in model.graph.output}
    for name in dict.fromkeys(t for n in nodes for t in (*n.input, n.output[0])):
        if name not in known:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    onnx.save(model, twin)
    session = Runner(twin)
    data = feeds(session, 2, 70, 20, "left")
    assert not isinstance(data, str), data
    values = session(data)
    least = 1.0
    for site, node in zip((s for s in report.inspection.sites), nodes, strict=True):
        q, k, v, mask = (values[name] if name in values else data[name] for name in node.input)
        softcap = onnx.helper.get_node_attr_value(node, "softcap")
        expected, _, cra = sample_attention(q, k, v, mask.astype(bool), SPARSE.for_heads(site.heads), site.scale, softcap)
        real = mask.astype(bool)[:, -70:]
        got, want = values[node.output[0]].swapaxes(1, 2)[real], expected.swapaxes(1, 2)[real]
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
        least = min(least, float(cra.swapaxes(1, 2)[real].min()))
    assert least < 0.9, "the threshold drops nothing, so this shows nothing"


@pytest.mark.parametrize("route", ["handwritten", "torchscript-eager-18"])
def test_regenerating_shows_no_drift(route: str) -> None:
    """The graphs of the pinned versions come out as they were frozen (one route that needs no exporter, and the fastest one that does)."""
    families = ["llama"] if route != "handwritten" else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.make", "--check", route, *families], capture_output=True, text=True, check=False
    )
    manifest = read_manifest()[route]["packages"]
    assert done.returncode == 0, f"frozen with {json.dumps(manifest)}\n{done.stdout}\n{done.stderr[-2000:]}"
    assert "as frozen" in done.stdout
