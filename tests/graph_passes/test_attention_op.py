"""The ONNX Attention operator: rewritten where it is full causal attention by proof, declined elsewhere.

The operator's own conformance cases are in `test_attention_conformance`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto

from graph_passes.pipeline import inspect
from tests.graph_passes import builder, running
from tests.graph_passes.builder import DV, HKV, HQ, Builder, D


def attention(
    *,
    mask: str = "bool",
    past_outside: bool = True,
    opset: int = 23,
    heads: int = HKV,
    inputs: tuple[str, ...] = (),
    outputs: int = 1,
    used: int = 0,
    **attrs: object,
) -> onnx.ModelProto:
    """One Attention node over inputs of the given number of key/value heads."""
    b = Builder(opset)
    past = "past" if past_outside else 0
    total = "past + seq" if past_outside else "seq"
    q = b.input("query", ["batch", HQ, "seq", D])
    keep = b.input("attention_mask", ["batch", total], TensorProto.INT64)
    k, v = (b.input(n, ["batch", heads, "seq", w]) for n, w in (("key", D), ("value", DV)))
    if past_outside:
        pk, pv = (b.input(n, ["batch", heads, past, w]) for n, w in (("past_key", D), ("past_value", DV)))
        k, v = b.op("Concat", pk, k, axis=2), b.op("Concat", pv, v, axis=2)
    else:
        pk = b.op("Slice", k, b.const([0]), b.const([0]), b.const([2]))
    t = builder.Tensors(q, k, keep, pk)
    bias = ""
    if mask != "none":
        bias = builder.causal_padding(b, t)
    if mask == "float":
        bias = b.op("Where", bias, b.const(0.0, "float32"), b.const(builder.LOWEST, "float32"))
    more = [
        b.input(n, ["batch", heads, "inner", w]) if n.startswith("past") else b.input(n, ["batch"], TensorProto.INT64)
        for n, w in ((i, D) for i in inputs)
    ]
    y = b.op("Attention", q, k, v, bias, *more, outputs=outputs, **attrs)
    b.output(b.op("Transpose", y, perm=[0, 2, 1, 3], name="result"))
    if used:
        b.output(f"{y}_{used}")
    return b.model()


CASES = {
    "bool mask": {"scale": 0.25},
    "float mask": {"mask": "float", "scale": 0.3},
    "default scale": {},
    "as many heads": {"heads": HQ},
    "one head": {"heads": 1},
    "causal flag without a past": {"mask": "none", "past_outside": False, "is_causal": 1},
    "causal flag and mask, no past": {"past_outside": False, "is_causal": 1},
    "opset 24": {"opset": 24},
    "opset 25": {"opset": 25},
    "opset 26": {"opset": 26, "mask": "float"},
    "soft-cap": {"softcap": 1.5},
    "causal flag on more keys than rows": {"mask": "none", "is_causal": 1},
    "product that nothing reads": {"outputs": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_is_found_and_equal(name: str, tmp_path: Path) -> None:
    options = CASES[name]
    model = attention(**options)  # type: ignore[arg-type]
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.pattern == "onnx Attention"
    assert site.kv_heads == options.get("heads", HKV)
    assert site.scale == pytest.approx(options.get("scale", D**-0.5), rel=1e-6)
    assert site.mask.kind == ("causal" if options.get("mask") == "none" else "causal+padding")
    assert site.softcap == options.get("softcap", 0)
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for batch, rows, past in ((2, 24, 0), (3, 5, 17), (2, 1, 9)):
        if past and not options.get("past_outside", True):
            continue
        for pad in ("none",) if options.get("mask") == "none" else ("none", "left", "right"):
            data = builder.feeds(model, batch, rows, past, pad=pad)
            real = running.real_rows(data["attention_mask"], rows)
            assert running.largest_difference(full(data)["result"], sparse(data)["result"], real) < 2e-6


def test_a_window_to_the_right_that_is_causality(tmp_path: Path) -> None:
    model = attention(opset=25, mask="none", past_outside=False, right_window_size=0)
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.mask.kind == "causal"
    out, _ = running.rewritten(path)
    data = builder.feeds(model, 2, 24, 0)
    model.graph.node[-2].ClearField("attribute")  # ONNX Runtime 1.31 does not know the window; is_causal says the same
    model.graph.node[-2].attribute.append(onnx.helper.make_attribute("is_causal", 1))
    assert model.graph.node[-2].op_type == "Attention"
    full = running.Session(running.save(model, tmp_path, "causal.onnx"))(data)
    assert np.abs(full["result"] - running.Session(out)(data)["result"]).max() < 2e-6


REFUSED = {
    "top left and mask": ({"is_causal": 1}, "it is kv <= q, needed is kv <= past + q"),
    "no mask": ({"mask": "none"}, "no mask"),
    "window of opset 25": ({"opset": 25, "left_window_size": 7}, "left_window_size 7"),
    "looks ahead": ({"opset": 25, "mask": "none", "right_window_size": 3}, "right_window_size 3"),
    "an attribute of a later opset": ({"surprise": 1}, "attribute surprise"),
    "product is read": ({"outputs": 4, "used": 3}, "product of queries and keys of the operator is used"),
    "lengths of batch items, causal, and a mask": (
        {"opset": 24, "is_causal": 1, "inputs": ("", "", "nonpad")},
        "counts the rows of each batch item from its own length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_declined(name: str, tmp_path: Path) -> None:
    options, reason = REFUSED[name]
    inputs = options.get("inputs", ())
    model = attention(**{**options, "inputs": tuple(i for i in inputs if i)})  # type: ignore[arg-type, attr-defined]
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    if inputs and not inputs[0]:  # type: ignore[index]
        node.input[4:] = ["", "", node.input[4]]
    report = inspect(running.save(model, tmp_path))
    assert report.sites == ()
    (declined,) = report.declined
    assert reason in declined.reason
    assert declined.stopped_by == f"Attention {node.name}"


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_a_mask_of_one_column_is_not_repeated(opset: int, tmp_path: Path) -> None:
    """By ONNX's reference every row sees key 0 alone; ONNX Runtime 1.31 refuses the call."""
    model = attention(opset=opset, mask="none", past_outside=False, is_causal=1)
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), bool), "column"))
    node.input[3] = "column"
    data = builder.feeds(model, 2, 6, 0)
    (got,) = onnx.reference.ReferenceEvaluator(model).run(None, data)
    first = np.repeat(data["value"][:, :, :1], HQ // HKV, axis=1)
    assert np.abs(got - first.transpose(0, 2, 1, 3)).max() < 1e-6
    (declined,) = inspect(running.save(model, tmp_path)).declined
    assert declined.reason == "its mask column has the length 1 where the scores have seq."


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    (declined,) = inspect(running.save(attention(heads=3), tmp_path)).declined
    assert "not a multiple" in declined.reason
