"""Fused operators of ONNX Runtime: what is made of them gives what the untouched operator gives, for every kind of call that it
serves, outputs and caches alike; what is not carried over is declined and stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes.config import Config, Entry
from graph_passes.pipeline import inspect
from tests.graph_passes import running
from tests.graph_passes.builder import LOWEST, Builder, feeds

HQ, HKV, D, DV = 4, 2, 16, 8


def grouped(
    *,
    packed: bool = True,
    past: bool = True,
    dtype: int = TensorProto.FLOAT,
    rotary: int = 8,
    stated_positions: bool = False,
    layers: int = 1,
    sink: bool = False,
    also: Callable[[Builder], None] | None = None,
    **attrs: Any,
) -> onnx.ModelProto:
    """GroupQueryAttention as the model builder of ONNX Runtime puts it: lengths from the attention mask, cache and rotary inside.

    Args:
        rotary: half the turned width of a head; 0: no rotary embedding inside.
        layers: as many operators, each with a cache of its own.
        sink: a sink for each head.
        also: adds more to the graph.
    """
    b = Builder(20)
    real = helper.tensor_dtype_to_np_dtype(dtype)
    names = {"qkv": (HQ + 2 * HKV) * D} if packed else {"query": HQ * D, "key": HKV * D, "value": HKV * D}
    inputs = [b.input(n, ["batch", "seq", w], dtype) for n, w in names.items()] + [""] * (2 if packed else 0)
    mask = b.input("attention_mask", ["batch", "total"], TensorProto.INT64)
    seqlens = b.op("Cast", b.op("Sub", b.op("ReduceSum", mask, b.const([1]), keepdims=0), b.const(1)), to=TensorProto.INT32)
    total = b.op("Cast", b.op("Gather", b.op("Shape", mask), b.const(1), axis=0), to=TensorProto.INT32)
    angles = np.outer(np.arange(64), 10.0 ** -(np.arange(max(rotary, 1)) / max(rotary, 1)))
    caches = [b.const(np.cos(angles), real), b.const(np.sin(angles), real)] if rotary else ["", ""]
    more = [b.input("position_ids", ["batch", "seq"], TensorProto.INT64) if stated_positions else ""]
    more += ["", b.const(np.ones(HQ), real)] if sink else []
    for i in range(layers):
        cache = [b.input(f"past_{n}.{i}", ["batch", HKV, "past", D], dtype) for n in ("key", "value")] if past else ["", ""]
        kinds = {"num_heads": HQ, "kv_num_heads": HKV, "do_rotary": int(rotary > 0), **attrs}
        y = b.op("GroupQueryAttention", *inputs, *cache, seqlens, total, *caches, *more, domain="com.microsoft", outputs=3, **kinds)
        b.output(y, dtype, 3), b.output(f"{y}_1", dtype), b.output(f"{y}_2", dtype)
    if also is not None:
        also(b)
    return b.model()


@dataclass(frozen=True)
class Call:
    """One call: rows, keys in all, length of the past buffer, and the number of real keys of each batch item."""

    rows: int
    total: int
    past: int
    real: tuple[int, ...]

    def feeds(self, model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        lengths = {"batch": len(self.real), "seq": self.rows, "past": self.past, "total": self.total}
        out: dict[str, np.ndarray] = {}
        for i in model.graph.input:
            shape = [d.dim_value or lengths[d.dim_param] for d in i.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
            out[i.name] = generator.standard_normal(shape).astype(dtype)
        out["attention_mask"] = (np.arange(self.total)[None] < np.array(self.real)[:, None]).astype(np.int64)
        if "position_ids" in out:
            # Of a first prompt the kernel reads the first number only.
            out["position_ids"] = np.tile(np.arange(self.total - self.rows, self.total), (len(self.real), 1)) + (3 if self.rows > 1 else 0)
        return out


CALLS = {
    "prompt": Call(24, 24, 0, (24,)),
    "prompt, padded on the right": Call(24, 24, 0, (24, 15)),
    "prompt into a shared buffer": Call(24, 24, 40, (24, 15)),
    "chunk": Call(18, 41, 23, (41,)),
    "chunk in a shared buffer": Call(18, 41, 60, (41,)),
    "chunk with fewer real keys than columns": Call(18, 41, 23, (30,)),
    "chunk with fewer real keys in a shared buffer": Call(18, 41, 60, (30,)),
    "decode": Call(1, 20, 19, (20,)),
    "decode, items of different lengths": Call(1, 20, 19, (20, 11, 5)),
    "decode in a shared buffer": Call(1, 20, 40, (20, 11, 5)),
}

GROUPED: dict[str, dict[str, Any]] = {
    "packed": {},
    "separate": {"packed": False},
    "interleaved rotary": {"rotary_interleaved": 1},
    "rotary outside": {"rotary": 0},
    "positions are an input": {"stated_positions": True, "packed": False},
    "without a cache": {"past": False},
    "soft-cap": {"softcap": 1.5},
    "scale": {"scale": 0.1},
    "float16": {"dtype": TensorProto.FLOAT16},
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_query_attention(name: str, tmp_path: Path) -> None:
    options = GROUPED[name]
    model = grouped(**options)
    path = running.save(model, tmp_path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    (site,) = report.sites
    assert (site.pattern, site.heads, site.kv_heads, site.mask.kind) == ("com.microsoft.GroupQueryAttention", HQ, HKV, "causal+padding")
    assert site.softcap == options.get("softcap", 0)
    assert site.scale == pytest.approx(options.get("scale", D**-0.5))
    out, _ = running.rewritten(path)
    assert {n.domain for n in onnx.load(out).graph.node} == {"", "sample_attention"}
    full, sparse = running.Session(path), running.Session(out)
    tolerance = 4e-3 if options.get("dtype") else 2e-6
    for what, call in CALLS.items():
        if call.past and not options.get("past", True):
            continue
        data = call.feeds(model)
        expected, got = full(data), sparse(data)
        y, *caches = full.outputs
        rows = np.arange(call.rows)[None] < np.array(call.real)[:, None] if call.rows == call.total else np.ones((len(call.real), 1), bool)
        rows = np.broadcast_to(rows, expected[y].shape[:2])
        assert np.abs(expected[y]).max() > 0.1
        assert running.largest_difference(expected[y], got[y], rows) < tolerance, what
        for cache in caches:
            assert expected[cache].shape == got[cache].shape, what
            for item, real in enumerate(call.real):
                a, b = (x[cache][item, :, :real].astype(np.float64) for x in (expected, got))
                assert np.abs(a - b).max() < tolerance, (what, cache)


def test_layers_share_what_is_the_same(tmp_path: Path) -> None:
    """Positions, the key mask and the rotary tables are looked up once for all layers."""
    one, three = (running.rewritten(running.save(grouped(layers=n), tmp_path, f"{n}.onnx"))[0] for n in (1, 3))
    count = [[n.op_type for n in onnx.load(p).graph.node] for p in (one, three)]
    assert [c.count("SampleAttention") for c in count] == [1, 3]
    for op in ("Range", "Gather", "Equal", "Less", "ReduceSum"):
        assert count[1].count(op) == count[0].count(op), op
    model, data = onnx.load(tmp_path / "3.onnx"), CALLS["decode in a shared buffer"].feeds(grouped(layers=3))
    expected, got = running.Session(tmp_path / "3.onnx")(data), running.Session(three)(data)
    for output in [o.name for o in model.graph.output][::3]:
        assert np.abs(expected[output] - got[output]).max() < 2e-6


GROUPED_DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"local_window_size": 4}, "sliding window (local_window_size 4)"),
    "ring buffer": ({"sliding_window_cache": 1, "local_window_size": 8}, "holds a window only"),
    "smooth softmax": ({"smooth_softmax": 1}, "a sink is added"),
    "head sink": ({"sink": True}, "a sink is added"),
    "quantised cache": ({"kv_cache_bit_width": 8}, "quantised"),
    "not causal": ({"causal": 0}, "not causal"),
    "scores": ({"qk_output": 1}, "scores are an output"),
    "an attribute of a later version": ({"surprise": 1}, "attribute surprise"),
}


@pytest.mark.parametrize("name", GROUPED_DECLINED)
def test_grouped_query_attention_that_is_declined(name: str, tmp_path: Path) -> None:
    options, reason = GROUPED_DECLINED[name]
    path = running.save(grouped(**options), tmp_path)
    (declined,) = inspect(path).declined
    assert declined.pattern == "com.microsoft.GroupQueryAttention"
    assert reason in declined.reason
    assert declined.stopped_by.startswith("GroupQueryAttention ")


def joined(
    op: str = "MultiHeadAttention",
    *,
    form: str = "flat",
    past: bool = True,
    bias: bool = False,
    keys: str = "",
    projection: bool = False,
    size: int = D,
    value_size: int = D,
    **attrs: Any,
) -> onnx.ModelProto:
    """MultiHeadAttention or Attention of `com.microsoft`.

    Args:
        form: `flat` (three tensors), `packed` ([B, S, heads, 3, size]).
        bias: a causal mask with padding is added to the scores.
        keys: mask of the keys: `2d` ([B, T]), `1d` (a count for each item), or none.
        projection: a bias of the projection is added inside.
    """
    b = Builder(20)
    generator = np.random.default_rng(1)
    total = "past + seq" if past else "seq"
    mask = b.input("attention_mask", ["batch", total], TensorProto.INT64)
    keys_mask = {
        "": lambda: "",
        "2d": lambda: b.op("Cast", mask, to=TensorProto.INT32),
        "1d": lambda: b.op("Cast", b.op("ReduceSum", mask, b.const([1]), keepdims=0), to=TensorProto.INT32),
    }[keys]()
    if op == "Attention":
        x = b.input("x", ["batch", "seq", 32])
        weights = b.const(generator.standard_normal((32, 3 * HQ * D)) / 6, np.float32)
        cache = b.input("past_both", [2, "batch", HQ, "past", D]) if past else ""
        inputs = [x, weights, b.const(generator.standard_normal(3 * HQ * D), np.float32), keys_mask, cache]
        outputs = 2 if past else 1
    else:
        if form == "flat":
            q, k, v = (b.input(n, ["batch", "seq", HQ * w]) for n, w in (("query", size), ("key", size), ("value", value_size)))
        else:
            q, k, v = b.input("qkv", ["batch", "seq", HQ, 3, D]), "", ""
        width = HQ * (2 * size + value_size)
        inputs = [q, k, v, b.const(generator.standard_normal(width), np.float32) if projection else "", keys_mask]
        cache = [b.input(f"past_{n}", ["batch", HQ, "past", w]) for n, w in (("key", size), ("value", value_size))] if past else []
        inputs += [_causal_bias(b, mask, q, cache[0] if past else "") if bias else "", *cache]
        outputs = 3 if past else 1
    while not inputs[-1]:
        inputs.pop()
    y = b.op(op, *inputs, domain="com.microsoft", outputs=outputs, num_heads=HQ, **attrs)
    b.output(y, rank=3)
    for k in range(1, outputs):
        b.output(f"{y}_{k}", rank=5 if op == "Attention" else 4)
    return b.model()


def _causal_bias(b: Builder, mask: str, query: str, past: str) -> str:
    rows = b.scalar(query, 1)
    before = b.scalar(past, 2) if past else b.const(0)
    kv = b.op("Range", b.const(0), b.op("Add", rows, before), b.const(1))
    q = b.op("Unsqueeze", b.op("Add", b.op("Range", b.const(0), rows, b.const(1)), before), b.const([1]))
    causal = b.op("Unsqueeze", b.op("LessOrEqual", kv, q), b.const([0, 1]))
    padding = b.op("Unsqueeze", b.op("Cast", mask, to=TensorProto.BOOL), b.const([1, 2]))
    return b.op("Where", b.op("And", causal, padding), b.const(0.0, np.float32), b.const(LOWEST, np.float32))


JOINED: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "bias, no past": {"bias": True, "past": False},
    "bias, wider values": {"bias": True, "past": False, "value_size": DV},
    "bias of the projection": {"bias": True, "projection": True},
    "scale": {"bias": True, "scale": 0.1},
    "unidirectional": {"unidirectional": 1},
    "unidirectional, no past": {"unidirectional": 1, "past": False},
    "unidirectional, mask of keys": {"unidirectional": 1, "keys": "2d"},
    "unidirectional, counts of keys": {"unidirectional": 1, "keys": "1d", "past": False},
    "projection inside": {"op": "Attention", "unidirectional": 1},
    "projection inside, no past": {"op": "Attention", "unidirectional": 1, "past": False},
    "projection inside, mask of keys": {"op": "Attention", "unidirectional": 1, "keys": "2d"},
}


@pytest.mark.parametrize("name", JOINED)
def test_multi_head_attention(name: str, tmp_path: Path) -> None:
    options = JOINED[name]
    model = joined(**options)
    path = running.save(model, tmp_path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    (site,) = report.sites
    masked = bool(options.get("bias") or options.get("keys"))
    assert site.mask.kind == ("causal+padding" if masked else "causal")
    assert site.pattern == f"com.microsoft.{options.get('op', 'MultiHeadAttention')}"
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for batch, rows, past in ((2, 24, 0), (3, 18, 20), (2, 1, 9)):
        if past and not options.get("past", True):
            continue
        for pad in ("none", "left", "right") if masked else ("none",):
            if pad == "left" and options.get("keys") == "1d":
                continue
            data = feeds(model, batch, rows, past, pad=pad)
            expected, got = full(data), sparse(data)
            real = running.real_rows(data["attention_mask"], rows)
            y, *caches = full.outputs
            assert running.largest_difference(expected[y], got[y], real) < 3e-6, (rows, past, pad)
            assert all((expected[c] == got[c]).all() for c in caches)


JOINED_DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({}, "no mask"),
    "padding only": ({"keys": "2d"}, "not causal"),
    "a mask that only lowers": ({"unidirectional": 1, "keys": "2d", "mask_filter_value": -2.0}, "lowers scores by 2"),
    "rotary inside": ({"op": "Attention", "unidirectional": 1, "do_rotary": 1}, "rotary embedding inside"),
    "projection inside, no mask": ({"op": "Attention"}, "no mask"),
}


@pytest.mark.parametrize("name", JOINED_DECLINED)
def test_multi_head_attention_that_is_declined(name: str, tmp_path: Path) -> None:
    options, reason = JOINED_DECLINED[name]
    (declined,) = inspect(running.save(joined(**options), tmp_path)).declined
    assert reason in declined.reason


def test_packed_queries_keys_and_values(tmp_path: Path) -> None:
    """ONNX Runtime has no kernel for them on the CPU: what is made of them is compared with three tensors."""
    packed, flat = (joined(form=form, past=False, unidirectional=1) for form in ("packed", "flat"))
    out, _ = running.rewritten(running.save(packed, tmp_path, "packed.onnx"))
    data = feeds(packed, 2, 24, 0)
    parts = {n: data["qkv"][:, :, :, k].reshape(2, 24, HQ * D) for k, n in enumerate(("query", "key", "value"))}
    expected = running.Session(running.save(flat, tmp_path))({**parts, "attention_mask": data["attention_mask"]})
    got = running.Session(out)(data)
    assert np.abs(next(iter(expected.values())) - next(iter(got.values()))).max() < 2e-6


def test_norm_of_queries_and_keys(tmp_path: Path) -> None:
    """ONNX Runtime has no kernel for the norm on the CPU: the norm outside of the operator is the reference."""
    model, generator = grouped(packed=False), np.random.default_rng(0)
    weights = {n: generator.random(D).astype(np.float32) + 0.5 for n in ("query", "key")}
    inside = onnx.ModelProto()
    inside.CopyFrom(model)
    node = next(n for n in inside.graph.node if n.op_type == "GroupQueryAttention")
    node.input.extend([""] * (14 - len(node.input)) + ["query_norm", "key_norm"])
    node.attribute.append(helper.make_attribute("qk_norm_epsilon", 1e-4))
    inside.graph.initializer.extend(onnx.numpy_helper.from_array(w, f"{n}_norm") for n, w in weights.items())
    out, report = running.rewritten(running.save(inside, tmp_path, "inside.onnx"))
    assert report.rewritten == 1
    data = CALLS["chunk"].feeds(model)
    normed = dict(data)
    for name, weight in weights.items():
        x = data[name].reshape(1, 18, -1, D).astype(np.float64)
        normed[name] = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * weight).reshape(data[name].shape).astype(np.float32)
    expected, got = running.Session(running.save(model, tmp_path))(normed), running.Session(out)(data)
    assert all(np.abs(expected[n] - got[n]).max() < 3e-6 for n in expected)


def test_what_is_not_rewritten_stays_whole(tmp_path: Path) -> None:
    """A layer that is skipped, and one that is declined, keep their operator to the letter."""
    path = running.save(grouped(layers=2), tmp_path)
    out, report = running.rewritten(path, Config(running.EXACT.defaults, (Entry("layers.1", skip=True),)))
    assert (report.rewritten, report.skipped) == (1, ("layers.1",))
    before, after = onnx.load(path), onnx.load(out)
    whole = [n for n in before.graph.node if n.op_type == "GroupQueryAttention"][1]
    (kept,) = [n for n in after.graph.node if n.op_type == "GroupQueryAttention"]
    assert kept.SerializeToString() == whole.SerializeToString()
    data = CALLS["decode, items of different lengths"].feeds(before)
    expected, got = running.Session(path)(data), running.Session(out)(data)
    assert all(np.abs(expected[n] - got[n]).max() < 2e-6 for n in expected if expected[n].ndim == 3)


UNREWRITTEN: dict[str, tuple[onnx.ModelProto, dict[str, np.ndarray]]] = {
    "grouped": (grouped(softcap=1.5), CALLS["decode, items of different lengths"].feeds(grouped())),
    "padding only": (joined(keys="2d"), feeds(joined(keys="2d"), 2, 18, 9, pad="right")),
    "unidirectional": (joined(unidirectional=1), feeds(joined(), 2, 18, 9)),
    "no mask": (joined("Attention", past=False), feeds(joined("Attention", past=False), 2, 18, 0)),
}


@pytest.mark.parametrize("name", UNREWRITTEN)
def test_attention_that_is_not_rewritten_in_a_model_of_standard_operators(name: str, tmp_path: Path) -> None:
    model, data = UNREWRITTEN[name]
    path = running.save(model, tmp_path)
    out, report = running.rewritten(
        path,
        Config(running.EXACT.defaults, (Entry("layers.0", skip=True),) if inspect(path).sites else ()),
        standard=True,
        allow_no_match=True,
    )
    assert report.rewritten == 0
    assert {n.domain for n in onnx.load(out).graph.node} == {o.domain for o in onnx.load(out).opset_import} == {""}
    expected, got = running.Session(path)(data), running.Session(out)(data)
    y = next(iter(expected))
    assert np.abs(expected[y] - got[y]).max() < 3e-6


def _norm(b: Builder, x: str) -> str:
    return b.op(
        "SkipSimplifiedLayerNormalization", x, x, b.const(np.linspace(0.5, 1.5, 32), np.float32), domain="com.microsoft", epsilon=1e-5
    )


def _layer_norm(b: Builder, x: str) -> str:
    scale, shift, bias = (b.const(np.linspace(low, 1.5, 32), np.float32) for low in (0.5, -1.0, -0.3))
    return b.op("SkipLayerNormalization", x, x, scale, shift, bias, domain="com.microsoft", epsilon=1e-5)


def _turned(interleaved: int, whole: bool) -> Callable[[Builder, str], str]:
    def make(b: Builder, x: str) -> str:
        angles = np.outer(np.arange(64), 10.0 ** -(np.arange(4) / 4))
        positions = b.input("position_ids", [1] if whole else ["batch", "seq"], TensorProto.INT64)
        caches = [b.const(f(angles), np.float32) for f in (np.cos, np.sin)]
        return b.op("RotaryEmbedding", x, positions, *caches, domain="com.microsoft", interleaved=interleaved)

    return make


OTHERS: dict[str, Callable[[Builder, str], str]] = {
    "SimplifiedLayerNormalization": lambda b, x: b.op(
        "SimplifiedLayerNormalization", x, b.const(np.linspace(0.5, 1.5, 32), np.float32), axis=-1
    ),
    "SkipSimplifiedLayerNormalization": _norm,
    "SkipLayerNormalization": _layer_norm,
    "Gelu": lambda b, x: b.op("Gelu", x, domain="com.microsoft"),
    "BiasGelu": lambda b, x: b.op("BiasGelu", x, b.const(np.linspace(-1, 1, 32), np.float32), domain="com.microsoft"),
    "FastGelu": lambda b, x: b.op("FastGelu", x, b.const(np.linspace(-1, 1, 32), np.float32), domain="com.microsoft"),
    "QuickGelu": lambda b, x: b.op("QuickGelu", x, domain="com.microsoft", alpha=1.7),
    "FusedMatMul": lambda b, x: b.op("FusedMatMul", x, x, domain="com.microsoft", transA=1, alpha=0.5),
    "RotaryEmbedding": _turned(0, False),
    "RotaryEmbedding, interleaved": _turned(1, False),
    "RotaryEmbedding, one position": _turned(0, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators(name: str, tmp_path: Path) -> None:
    """They stay as they are, unless standard operators alone are asked for."""
    made: list[str] = []

    def also(b: Builder) -> None:
        made.append(OTHERS[name](b, b.input("x", ["batch", "seq", 32])))
        b.output(made[0], rank=3)

    model = grouped(packed=False, also=also)
    (y,) = made
    path = running.save(model, tmp_path)
    out, _ = running.rewritten(path)
    kept = {n.name: n.SerializeToString() for n in onnx.load(out).graph.node}
    assert [n.SerializeToString() for n in model.graph.node if n.output[0] == y] == [
        kept[n.name] for n in model.graph.node if n.output[0] == y
    ]
    out, _ = running.rewritten(path, standard=True)
    after = onnx.load(out)
    assert name.split(",", maxsplit=1)[0] not in {n.op_type for n in after.graph.node}
    assert {n.domain for n in after.graph.node} == {o.domain for o in after.opset_import} == {"", "sample_attention"}
    data = CALLS["chunk"].feeds(model)
    if "position_ids" in data:
        data["position_ids"] = np.array([5]) if "one position" in name else np.arange(23, 41)[None]
    expected, got = running.Session(path)(data)[y], running.Session(out)(data)[y]
    assert np.abs(expected).max() > 0.1
    assert np.abs(expected - got).max() < 3e-6 * max(1.0, np.abs(expected).max())
