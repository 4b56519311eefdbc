"""Spellings of full causal attention are found, and the rewritten graph gives what the original gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from graph_passes.pipeline import inspect
from tests.graph_passes import builder, running
from tests.graph_passes.builder import DV, HKV, HQ, Spelling

SPELLINGS = {
    "eager": Spelling(),
    "sdpa": Spelling(scale="both", transpose="3d", guard=True, mask_as="add_inf"),
    "scale on q": Spelling(scale="q"),
    "scale on k": Spelling(scale="k"),
    "division": Spelling(scale="div"),
    "scale computed from a shape": Spelling(scale="computed"),
    "no scale": Spelling(scale="none"),
    "scale after the mask": Spelling(scale="after_mask"),
    "where": Spelling(mask_as="where"),
    "where, branches swapped": Spelling(mask_as="unless"),
    "mask by multiplication with the lowest": Spelling(mask_as="mul_not"),
    "mask by (m - 1) * 1e9": Spelling(mask_as="shift"),
    "as many kv heads": Spelling(repeat="concat"),
    "one kv head, broadcast by the product": Spelling(repeat="multiply"),
    "keys as [B, T, H, D]": Spelling(transpose="bshd", repeat="concat"),
    "keys as [B, T, H, D], repeated": Spelling(transpose="bshd"),
    "no past": Spelling(past=False),
    "causal only": Spelling(mask=builder.causal),
    "static": Spelling(static=True),
    "float16": Spelling(dtype=TensorProto.FLOAT16, cast=True),
    "soft-cap": Spelling(softcap="div"),
    "soft-cap by a factor, scale on q, where": Spelling(softcap="mul", scale="q", mask_as="where"),
    "soft-cap in float16": Spelling(softcap="div", dtype=TensorProto.FLOAT16),
    "products of three axes": Spelling(product="3d"),
    "products of five axes": Spelling(product="grouped"),
    "einsum": Spelling(product="einsum"),
    "FusedMatMul": Spelling(product="fused"),
    "softmax in parts": Spelling(parts=True),
    "softmax in parts of products of three axes with a soft-cap": Spelling(parts=True, product="3d", softcap="div"),
    "opset 18": Spelling(opset=18),
    "opset 23": Spelling(opset=23),
}
SCALES = {"no scale": 1.0}
KV_HEADS = {"as many kv heads": HQ, "one kv head, broadcast by the product": 1, "keys as [B, T, H, D]": HQ}
LENGTHS = [(2, 8, 3), (3, 20, 0), (3, 5, 17), (2, 1, 9)]  # batch, rows, past: prefill, chunk, decode


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_found_and_equal(name: str, tmp_path: Path) -> None:
    spelling = SPELLINGS[name]
    model = builder.attention(spelling)
    path = running.save(model, tmp_path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    (site,) = report.sites
    assert site.id == "layers.0"
    assert (site.heads, site.kv_heads, site.head_size, site.value_size) == (HQ, KV_HEADS.get(name, HKV), 16, DV)
    assert site.scale == pytest.approx(SCALES.get(name, 0.25), rel=1e-3 if "float16" in name else 1e-6)
    assert site.softcap == pytest.approx(builder.CAP if spelling.softcap else 0, rel=1e-3 if "float16" in name else 1e-6)
    assert site.mask.kind == ("causal" if name == "causal only" else "causal+padding")
    out, done = running.rewritten(path)
    assert done.rewritten == 1
    kinds = [n.op_type for n in onnx.load(out).graph.node]
    assert kinds.count("SampleAttention") == 1
    assert not {"Softmax", "Exp", "Einsum", "FusedMatMul", "Tanh"} & set(kinds)
    assert "Expand" not in kinds, "key/value heads are still repeated"
    full, sparse = running.Session(path), running.Session(out)
    assert sparse.outputs == full.outputs
    tolerance = 4e-3 if spelling.dtype == TensorProto.FLOAT16 else 2e-6
    for batch, rows, past in [LENGTHS[0]] if spelling.static else LENGTHS:
        for pad in ("none",) if name == "causal only" else ("none", "left", "right"):
            feeds = builder.feeds(model, batch, rows, past if spelling.past else 0, pad=pad)
            expected, got = full(feeds), sparse(feeds)
            real = running.real_rows(feeds["attention_mask"], rows)
            assert running.largest_difference(expected["result"], got["result"], real) < tolerance
            if spelling.past:
                assert (expected["present_key"] == got["present_key"]).all()


def test_without_value_info_and_node_names(tmp_path: Path) -> None:
    model = builder.attention(SPELLINGS["sdpa"])
    for node in model.graph.node:
        node.name = ""
    path = running.save(model, tmp_path)
    report = inspect(path)
    assert len(report.sites) == 1
    assert report.sites[0].node  # the tensor it makes stands in for its name


def test_bfloat16_is_found(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 on the CPU: the graph is checked, not run."""
    path = running.save(builder.attention(Spelling(dtype=TensorProto.BFLOAT16, cast=True, scale="both")), tmp_path)
    (site,) = inspect(path).sites
    assert (site.kv_heads, site.scale, site.mask.kind) == (HKV, 0.25, "causal+padding")
    out, _ = running.rewritten(path)
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert "Expand" not in [n.op_type for n in onnx.load(out).graph.node]


def test_shift_by_the_largest_score(tmp_path: Path) -> None:
    def shift(b: builder.Builder, at: str, x: str) -> str:
        return b.op("Sub", x, b.op("ReduceMax", x, b.const([-1]))) if at == "masked" else x

    model = builder.attention(change=shift)
    path = running.save(model, tmp_path)
    out, report = running.rewritten(path)
    assert report.rewritten == 1
    data = builder.feeds(model, 2, 20, 3, pad="left")
    real = running.real_rows(data["attention_mask"], 20)
    assert running.largest_difference(running.Session(path)(data)["result"], running.Session(out)(data)["result"], real) < 2e-6
    other = builder.attention(change=lambda b, at, x: b.op("Sub", x, b.op("ReduceMax", x, b.const([2]))) if at == "masked" else x)
    assert inspect(running.save(other, tmp_path, "columns.onnx")).sites == ()


def test_dropout_of_inference_is_passed(tmp_path: Path) -> None:
    path = running.save(builder.attention(change=lambda b, at, x: b.op("Dropout", x) if at == "probabilities" else x), tmp_path)
    assert len(inspect(path).sites) == 1


def test_shape_readers_do_not_stop_it(tmp_path: Path) -> None:
    """TorchScript reads the shape of scores and results; the readers go with what they read."""

    def change(b: builder.Builder, at: str, x: str) -> str:
        if at == "scores":
            b.op("Shape", x)
        return x

    path = running.save(builder.attention(replace(SPELLINGS["eager"]), change=change), tmp_path)
    out, report = running.rewritten(path)
    assert report.rewritten == 1
    assert "Softmax" not in [n.op_type for n in onnx.load(out).graph.node]


LOW = float(np.finfo(np.float32).min)


def guarded(b: builder.Builder, p: str) -> str:
    return b.op("Where", b.op("Not", b.op("IsNaN", p)), p, b.const(0.0, np.float32))


def clamped(b: builder.Builder, x: str) -> str:
    return b.op("Clip", b.op("Max", x, b.const(LOW, np.float32)), b.const(LOW, np.float32))


def read_for_nothing(b: builder.Builder, x: str) -> str:
    b.op("Relu", x)
    return x


def share_by_reciprocal(b: builder.Builder, p: str) -> str:
    """The Softmax before it becomes exp(x - max) * (1 / sum)."""
    softmax = next(n for n in b.nodes if p in n.output)
    b.nodes.remove(softmax)
    x = softmax.input[0]
    e = b.op("Exp", b.op("Sub", x, b.op("ReduceMax", x, b.const([-1]))))
    return b.op("Mul", b.op("Reciprocal", b.op("ReduceSum", e, b.const([-1]))), e)


CHANGES = {
    "guard by what is a number": ("probabilities", guarded),
    "clamped at the lowest number": ("masked", clamped),
    "read by a node that nothing depends on": ("scores", read_for_nothing),
    "softmax by a reciprocal": ("probabilities", share_by_reciprocal),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_mean_nothing(name: str, tmp_path: Path) -> None:
    place, change = CHANGES[name]
    model = builder.attention(change=lambda b, at, x: change(b, x) if at == place else x)
    path = running.save(model, tmp_path)
    assert [d.reason for d in inspect(path).declined] == []
    out, report = running.rewritten(path)
    assert report.rewritten == 1
    assert not {"Softmax", "Exp", "IsNaN", "Clip", "Relu"} & {n.op_type for n in onnx.load(out).graph.node}
    data = builder.feeds(model, 2, 20, 3, pad="left")
    real = running.real_rows(data["attention_mask"], 20)
    full, sparse = (running.Session(p)(data)["result"] for p in (path, out))
    assert running.largest_difference(full, sparse, real) < 2e-6
