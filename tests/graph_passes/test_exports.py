"""What torch.onnx exports today: every full-causal layer is rewritten and equal, every other layer is declined."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_passes.config import Config, Entry
from graph_passes.pipeline import inspect
from tests.graph_passes import running
from tests.graph_passes.builder import padding_mask
from tests.graph_passes.exporters import EXPORTS, HEAD_SIZE, HEADS, KV_HEADS, LAYERS, VOCABULARY

FULL_CAUSAL = [
    "llama sdpa 20",
    "llama eager 18",
    "qwen2 sdpa 23",
    "llama sdpa 20, no past",
    "llama sdpa 18, torchscript",
    "llama eager 18, torchscript",
]
LENGTHS = {"prefill": (3, 40, 0), "prefill on a past": (2, 24, 9), "chunk": (3, 18, 30), "decode": (3, 1, 37)}


def feeds(name: str, batch: int, rows: int, past: int, pad: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    mask = padding_mask(batch, past + rows, pad)
    out = {
        "input_ids": generator.integers(0, VOCABULARY, (batch, rows)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
    }
    for i in range(LAYERS if EXPORTS[name].past else 0):
        for k in ("key", "value"):
            out[f"past_key_values.{i}.{k}"] = generator.standard_normal((batch, KV_HEADS, past, HEAD_SIZE)).astype(np.float32)
    return out


@pytest.mark.parametrize("name", FULL_CAUSAL)
def test_full_causal_models_are_rewritten_and_equal(name: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported(name), path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    assert [s.id for s in report.sites] == [f"layers.{i}" for i in range(LAYERS)]
    for i, site in enumerate(report.sites):
        assert (site.heads, site.kv_heads, site.head_size, site.mask.kind) == (HEADS, KV_HEADS, HEAD_SIZE, "causal+padding")
        assert site.scale == pytest.approx(HEAD_SIZE**-0.5, rel=1e-6)
        if EXPORTS[name].past:
            assert (site.key.tensor, site.value.tensor) == (f"present.{i}.key", f"present.{i}.value")
    out, done = running.rewritten(path)
    assert done.rewritten == LAYERS
    before, after = onnx.load(path), onnx.load(out)
    assert [i.SerializeToString() for i in after.graph.input] == [i.SerializeToString() for i in before.graph.input]
    assert [o.SerializeToString() for o in after.graph.output] == [o.SerializeToString() for o in before.graph.output]
    kinds = [n.op_type for n in after.graph.node]
    assert kinds.count("SampleAttention") == LAYERS
    torchscript = not EXPORTS[name].dynamo  # it reads the padding through the mask's own nodes, see the key mask
    assert not {
        "Softmax",
        "Attention",
        "LessOrEqual",
        *(() if torchscript else ("GatherND",)),
        *(() if torchscript else ("Expand",)),
    } & set(kinds)
    full, sparse = running.Session(path), running.Session(out)
    for what, (batch, rows, past) in LENGTHS.items():
        if past and not EXPORTS[name].past:
            continue
        for pad in ("none", "left", "right"):
            data = feeds(name, batch, rows, past, pad)
            real = running.real_rows(data["attention_mask"], rows)
            expected, got = full(data), sparse(data)
            assert running.largest_difference(expected["logits"], got["logits"], real) < 1e-4, (what, pad)
            for output in full.outputs[1:]:
                a, b = (x[output].swapaxes(1, 2) for x in (expected, got))
                keys = data["attention_mask"].astype(bool)
                assert running.largest_difference(a, b, keys) < 1e-4, (what, pad, output)


def test_a_window_in_one_layer_of_two(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("qwen2 window sdpa 18, torchscript"), path)
    report = inspect(path)
    assert [s.id for s in report.sites] == ["layers.0"]
    (declined,) = report.declined
    assert declined.id == "layers.1"
    assert "sliding window of 4096 keys" in declined.reason
    assert declined.stopped_by.startswith("Greater")
    out, done = running.rewritten(path)
    assert done.rewritten == 1
    kinds = [n.op_type for n in onnx.load(out).graph.node]
    assert (kinds.count("SampleAttention"), kinds.count("Softmax")) == (1, 1)
    data = feeds("qwen2 window sdpa 18, torchscript", 3, 18, 30, "left")
    real = running.real_rows(data["attention_mask"], 18)
    assert running.largest_difference(running.Session(path)(data)["logits"], running.Session(out)(data)["logits"], real) < 1e-4


def test_a_shared_mask_stays_for_the_layer_that_is_skipped(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("llama sdpa 20"), path)
    out, report = running.rewritten(path, Config(running.EXACT.defaults, (Entry("layers.0", skip=True),)))
    assert (report.rewritten, report.skipped) == (1, ("layers.0",))
    kinds = [n.op_type for n in onnx.load(out).graph.node]
    assert [kinds.count(k) for k in ("Softmax", "SampleAttention", "GatherND")] == [1, 1, 1]
    data = feeds("llama sdpa 20", 3, 18, 30, "right")
    real = running.real_rows(data["attention_mask"], 18)
    assert running.largest_difference(running.Session(path)(data)["logits"], running.Session(out)(data)["logits"], real) < 1e-4


def test_an_encoder_is_declined(exported: Callable[[str], Path]) -> None:
    report = inspect(exported("bert eager 18, torchscript"))
    assert report.sites == ()
    assert [d.id for d in report.declined] == ["layers.0", "layers.1"]
    assert all("not causal" in d.reason for d in report.declined)


def test_a_packed_sequence_mask_is_declined(exported: Callable[[str], Path]) -> None:
    """Without an attention_mask, transformers compares position ids: packed sequences must not see each other."""
    report = inspect(exported("llama sdpa 20, no past, no mask"))
    assert report.sites == ()
    assert all("depends on the values of position_ids" in d.reason for d in report.declined)
    assert len(report.declined) == LAYERS


def test_nodes_of_the_attention_interface_are_sites(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("llama sample 20"), path)
    report = inspect(path)
    assert [(s.id, s.pattern, s.heads, s.kv_heads, s.mask.kind) for s in report.sites] == [
        (f"layers.{i}", "SampleAttention", HEADS, KV_HEADS, "causal+padding") for i in range(LAYERS)
    ]
    out, done = running.rewritten(path)
    assert done.rewritten == LAYERS
    reference = tmp_path / "reference.onnx"
    shutil.copy(exported("llama sdpa 20"), reference)  # the same seed: the same weights
    data = feeds("llama sample 20", 3, 18, 30, "left")
    real = running.real_rows(data["attention_mask"], 18)
    assert running.largest_difference(running.Session(reference)(data)["logits"], running.Session(out)(data)["logits"], real) < 1e-4


def test_a_rewritten_model_can_be_given_new_settings(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("llama sdpa 20"), path)
    first, _ = running.rewritten(path)
    again, done = running.rewritten(first)
    assert done.rewritten == LAYERS
    assert [s.pattern for s in done.inspection.sites] == ["SampleAttention"] * LAYERS
    a, b = onnx.load(first), onnx.load(again)
    assert [f.name + f.overload for f in b.functions] == [f.name + f.overload for f in a.functions]
    assert [n.SerializeToString() for n in b.graph.node] == [n.SerializeToString() for n in a.graph.node]
