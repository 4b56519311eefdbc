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
from tests.graph_passes.builder import DV, HKV, HQ, LOWEST, Builder, Spelling, Tensors

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


def _multiplied(b: Builder, x: str) -> str:
    mask = builder.causal(b, Tensors("query", "present_key", "attention_mask", "past_key"))
    return b.op("Mul", b.op("Cast", mask, to=TensorProto.FLOAT), x)


def _nan_to_num(b: Builder, p: str) -> str:
    """As exporters write it: NaN, then both infinities (looked for in a wider type)."""
    p = b.op("Where", b.op("IsNaN", p), b.const(0.0, np.float32), p)
    for op, end in (("Greater", 3e38), ("Less", -3e38)):
        infinite = b.op("And", b.op("IsInf", b.op("Cast", p, to=TensorProto.DOUBLE)), b.op(op, p, b.const(0.0, np.float32)))
        p = b.op("Where", infinite, b.const(end, np.float32), p)
    return p


def _guarded_by_what_is_a_number(b: Builder, p: str) -> str:
    return b.op("Where", b.op("Not", b.op("IsNaN", p)), p, b.const(0.0, np.float32))


def _guarded_in_another_shape(b: Builder, p: str) -> str:
    """Between a Reshape to three axes and one back."""
    lengths = b.op("Shape", p)
    flat = b.op("Reshape", p, b.op("Concat", b.const([-1]), b.op("Slice", lengths, b.const([2]), b.const([4])), axis=0))
    return b.op("Reshape", _guarded_by_what_is_a_number(b, flat), lengths)


def _guarded_behind_a_mask(b: Builder, p: str) -> str:
    return _guarded_by_what_is_a_number(b, _zeroed_again(b, p))


def _bounded_twice(b: Builder, x: str) -> str:
    return b.op("Clip", b.op("Max", b.const(LOWEST, np.float32), x), b.const(LOWEST, np.float32))


def _read_for_nothing(b: Builder, x: str) -> str:
    """By a node that no output depends on."""
    b.op("Relu", x)
    return x


def _share_by_reciprocal(b: Builder, p: str) -> str:
    """exp(x - max) * (1 / sum)."""
    scores = b.nodes.pop().input[0]
    e = b.op("Exp", b.op("Sub", scores, b.op("ReduceMax", scores, b.const([-1]))))
    return b.op("Mul", b.op("Reciprocal", b.op("ReduceSum", e, b.const([-1]))), e)


def _log_softmax(b: Builder, p: str) -> str:
    scores = b.nodes.pop().input[0]
    return b.op("Exp", b.op("LogSoftmax", scores, axis=-1))


def _log_sum_exp(b: Builder, p: str) -> str:
    scores = b.nodes.pop().input[0]
    return b.op("Exp", b.op("Sub", scores, b.op("ReduceLogSumExp", scores, b.const([-1]))))


def _zeroed_again(b: Builder, p: str) -> str:
    """What the mask of the scores removed is made 0 once more, by choice and by multiplication."""
    t = Tensors("query", "present_key", "attention_mask", "past_key")
    hidden = b.op("Not", builder.causal_padding(b, t))
    p = b.op("Where", hidden, b.const(0.0, np.float32), p)
    return b.op("Mul", p, b.op("Cast", builder.causal(b, t), to=TensorProto.FLOAT))


CHANGES = {
    "probabilities made 0 again": ("probabilities", _zeroed_again),
    "made 0 before they are removed": ("scores", _multiplied),
    "bounded by the lowest number": ("masked", _bounded_twice),
    "nan_to_num": ("probabilities", _nan_to_num),
    "guarded by what is a number": ("probabilities", _guarded_by_what_is_a_number),
    "guarded in another shape": ("probabilities", _guarded_in_another_shape),
    "guarded behind a mask": ("probabilities", _guarded_behind_a_mask),
    "read for nothing": ("scores", _read_for_nothing),
    "share by a reciprocal": ("probabilities", _share_by_reciprocal),
    "exponential of LogSoftmax": ("probabilities", _log_softmax),
    "exponential less that of the sum": ("probabilities", _log_sum_exp),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_no_attention_is_passed(name: str, tmp_path: Path) -> None:
    where, change = CHANGES[name]
    out = _check_equal(builder.attention(change=lambda b, at, x: change(b, x) if at == where else x), tmp_path)
    assert not {"Softmax", "Exp", "IsNaN", "Clip", "Relu"} & {n.op_type for n in onnx.load(out).graph.node}


@pytest.mark.parametrize("op", ["Div", "Mul"])
def test_product_that_is_divided_late(op: str, tmp_path: Path) -> None:
    """(e @ v) / sum(e) or (e @ v) * (1 / sum(e)), as attention in blocks is written."""
    model = builder.attention(Spelling(parts=True))
    nodes = {n.op_type: n for n in model.graph.node if n.op_type in ("Div", "ReduceSum", "Exp")}
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[0] == nodes["Div"].output[0])
    result = product.output[0]
    product.input[0], product.output[0] = nodes["Exp"].output[0], "undivided"
    nodes["Div"].input[0], nodes["Div"].output[0] = "undivided", result
    order = [n for n in model.graph.node if n is not nodes["Div"]]
    order.insert(order.index(product) + 1, nodes["Div"])
    if op == "Mul":
        nodes["Div"].op_type = "Mul"
        inverse = onnx.helper.make_node("Reciprocal", [nodes["Div"].input[1]], ["inverse"], "inverse")
        nodes["Div"].input[1] = "inverse"
        order.insert(order.index(nodes["Div"]), inverse)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in order]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    _check_equal(model, tmp_path)


@pytest.mark.parametrize(
    "equations",
    [("bkgsd,bktd->bkgst", "bkgst,bktd->bkgsd"), ("bskgd,btkd->bkgst", "bkgst,btkd->bskgd")],
    ids=["heads first", "rows first"],
)
def test_einsum_with_the_heads_of_a_group_as_an_axis(equations: tuple[str, str], tmp_path: Path) -> None:
    b = Builder()
    heads_first = equations[0].startswith("bkg")
    q, k, v = (
        b.input(n, ["batch", heads, "seq", 16] if heads_first else ["batch", "seq", heads, 16])
        for n, heads in (("query", HQ), ("key", HKV), ("value", HKV))
    )
    mask = b.input("attention_mask", ["batch", "seq"], TensorProto.INT64)
    grouped = b.op("Reshape", q, b.const([0, HKV, HQ // HKV, -1, 16] if heads_first else [0, 0, HKV, HQ // HKV, 16]))
    rows = b.op("Range", b.const(0), b.scalar(mask, 1), b.const(1))
    causal = b.op("LessOrEqual", b.op("Unsqueeze", rows, b.const([0])), b.op("Unsqueeze", rows, b.const([1])))
    keep = b.op("And", causal, b.op("Unsqueeze", b.op("Cast", mask, to=TensorProto.BOOL), b.const([1, 2, 3])))
    scores = b.op("Mul", b.op("Einsum", grouped, k, equation=equations[0]), b.const(0.25, np.float32))
    p = b.op("Softmax", b.op("Where", keep, scores, b.const(LOWEST, np.float32)), axis=-1)
    out = b.op("Einsum", p, v, equation=equations[1])
    shape = [0, HQ, -1, 16] if heads_first else [0, 0, HQ, 16]
    joined = b.op("Reshape", out, b.const(shape))
    b.op("Transpose", joined, perm=[0, 2, 1, 3] if heads_first else [0, 1, 2, 3], name="result")
    b.output("result")
    model = b.model()
    path = running.save(model, tmp_path)
    twin, report = running.rewritten(path)
    assert [(s.heads, s.kv_heads) for s in report.inspection.sites] == [(HQ, HKV)]
    data = builder.feeds(model, 3, 20, 0, pad="left")
    real = data["attention_mask"].astype(bool)
    expected, got = (running.Session(p)(data)["result"][real] for p in (path, twin))
    assert np.abs(expected - got).max() < 2e-6


def _check_equal(model: onnx.ModelProto, folder: Path) -> Path:
    """The rewritten model: nothing is declined, and it gives what the original gives."""
    path = running.save(model, folder)
    assert [d.reason for d in inspect(path).declined] == []
    out, report = running.rewritten(path)
    assert report.rewritten == 1
    for batch, rows, past in LENGTHS:
        for pad in ("left", "right"):
            data = builder.feeds(model, batch, rows, past, pad=pad)
            real = running.real_rows(data["attention_mask"], rows)
            expected, got = (running.Session(p)(data)["result"] for p in (path, out))
            assert running.largest_difference(expected, got, real) < 2e-6
    return out


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
