"""What is not full causal attention is declined, with a reason that is true and the node that stopped it, and the graph stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from graph_passes.pipeline import inspect, rewrite
from tests.graph_passes import builder, running
from tests.graph_passes.builder import HQ, Builder, Spelling, Tensors


def sliding(window: int) -> builder.MaskMaker:
    def make(b: Builder, t: Tensors) -> str:
        kv, q = builder.positions(b, t)
        inside = b.op("Greater", kv, b.op("Sub", q, b.const(window)), name="window_test")
        return b.op("And", b.op("And", inside, b.op("LessOrEqual", kv, q)), builder.padding(b, t))

    return make


def chunked(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    same = b.op("Equal", b.op("Div", kv, b.const(8)), b.op("Div", q, b.const(8)))
    return b.op("And", same, b.op("LessOrEqual", kv, q))


def prefix(b: Builder, t: Tensors) -> str:
    kv, _ = builder.positions(b, t)
    return b.op("Or", builder.causal(b, t), b.op("Less", kv, b.const(4)))


def top_left(b: Builder, t: Tensors) -> str:
    zero, one = b.const(0), b.const(1)
    kv = b.op("Unsqueeze", b.op("Range", zero, b.scalar(t.k, 2), one), b.const([0, 1, 2]))
    q = b.op("Unsqueeze", b.op("Range", zero, b.scalar(t.q, 2), one), b.const([0, 1, 3]))
    return b.op("LessOrEqual", kv, q)


def anticausal(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    return b.op("GreaterOrEqual", kv, q)


def strict(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    return b.op("Less", kv, q)


def other_than_own(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    return b.op("Or", b.op("Less", kv, q), b.op("Greater", kv, q))


def earlier_but_for_the_second(b: Builder, t: Tensors) -> str:
    """`kv < q` or `kv == q`, less `kv == q - 1`."""
    kv, q = builder.positions(b, t)
    seen = b.op("Or", b.op("Less", kv, q), b.op("Equal", kv, q))
    return b.op("And", seen, b.op("Not", b.op("Equal", b.op("Add", kv, b.const(1)), q)))


def dilated(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    even = b.op("Equal", b.op("Mod", kv, b.const(2)), b.const(0))
    return b.op("And", even, b.op("LessOrEqual", kv, q))


def by_position_ids(b: Builder, t: Tensors) -> str:
    kv, _ = builder.positions(b, t)
    ids = b.input("position_ids", ["batch", "seq"], TensorProto.INT64)
    return b.op("LessOrEqual", kv, b.op("Unsqueeze", ids, b.const([1, 3])))


def rows_padded_too(b: Builder, t: Tensors) -> str:
    """A row that is padding sees nothing: its own mask entry is asked as well."""
    own = b.op("Slice", t.mask, b.dim(t.past, 2), b.const([2**31 - 1]), b.const([1]))
    rows = b.op("Unsqueeze", b.op("Cast", own, to=TensorProto.BOOL), b.const([1, 3]))
    return b.op("And", builder.causal_padding(b, t), rows)


def per_head(b: Builder, t: Tensors) -> str:
    heads = b.const(np.array([True, True, False, True]).reshape(1, HQ, 1, 1), bool)
    return b.op("And", builder.causal(b, t), heads)


def hides_everything(b: Builder, t: Tensors) -> str:
    return b.op("And", builder.causal(b, t), b.const(False, bool))


MASKS: dict[str, tuple[builder.MaskMaker | None, str, str]] = {
    "none": (None, "no mask", ""),
    "padding only": (builder.padding, "not causal", "Add"),
    "sliding window of 4": (sliding(4), "sliding window of 4 keys", "Greater"),
    "sliding window of 4096": (sliding(4096), "sliding window of 4096 keys", "Greater"),
    "sliding window of 131072": (sliding(131072), "sliding window of 131072 keys", "Greater"),
    "chunked": (chunked, "chunks or strides", "Equal"),
    "prefix": (prefix, "sees keys that come after it", "Add"),
    "top left": (top_left, "not the lower-right causal one: it is kv <= q, needed is kv <= past + q", "LessOrEqual"),
    "anticausal": (anticausal, "sees keys that come after it", "Add"),
    "strict": (strict, "hides the last 1 of the keys", "Less"),
    "other than own": (other_than_own, "sees keys that come after it", "Add"),
    "earlier but for the second": (earlier_but_for_the_second, "a condition that full causal attention does not have", ""),
    "dilated": (dilated, "chunks or strides", "Equal"),
    "by position ids": (by_position_ids, "depends on the values of position_ids", "LessOrEqual"),
    "rows padded too": (rows_padded_too, "depends on the values of attention_mask", ""),
    "different by head": (per_head, "depends on the values of", ""),
    "hides every key": (hides_everything, "hides every key", ""),
}


def declined(model: onnx.ModelProto, folder: Path) -> tuple[str, str]:
    """Reason and node; checks that the candidate has one fate, and that a rewrite changes nothing."""
    path = running.save(model, folder)
    report = inspect(path)
    assert report.sites == ()
    (site,) = report.declined
    assert site.id == "layers.0"
    assert site.reason.endswith(".")
    assert site.stopped_by.split()[1] in {n.name for n in model.graph.node}
    out = folder / "out.onnx"
    assert not rewrite(path, out).ok
    assert not out.exists()
    return site.reason, site.stopped_by


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, tmp_path: Path) -> None:
    make, reason, node = MASKS[name]
    found, stopped_by = declined(builder.attention(Spelling(mask=make)), tmp_path)
    assert reason in found
    assert stopped_by.startswith(node)


@pytest.mark.parametrize("name", ["sliding window of 4096", "anticausal", "strict", "prefix"])
def test_masks_without_a_past(name: str, tmp_path: Path) -> None:
    make, reason, _ = MASKS[name]
    assert reason in declined(builder.attention(Spelling(mask=make, past=False, mask_as="add_inf")), tmp_path)[0]


def test_top_left_without_a_past_is_causal(tmp_path: Path) -> None:
    path = running.save(builder.attention(Spelling(mask=top_left, past=False)), tmp_path)
    assert [s.mask.kind for s in inspect(path).sites] == ["causal"]


Change = Callable[[Builder, str, str], str]


def at(place: str, change: Callable[[Builder, str], str]) -> Change:
    return lambda b, where, x: change(b, x) if where == place else x


def softcap(b: Builder, x: str) -> str:
    cap = b.const(30.0, np.float32)
    return b.op("Mul", b.op("Tanh", b.op("Div", x, cap)), cap)


def masked_before_the_cap(b: Builder, x: str) -> str:
    return softcap(b, weak_mask(b, x, builder.LOWEST))


def capped_twice(b: Builder, x: str) -> str:
    return softcap(b, softcap(b, x))


def sinks(b: Builder, x: str) -> str:
    rows = b.op("Concat", b.dim("query", 0), b.const([HQ]), b.dim("query", 2), b.const([1]), axis=0)
    return b.op("Concat", x, b.op("Expand", b.const(np.ones((1, HQ, 1, 1)), np.float32), rows), axis=-1)


def alibi(b: Builder, x: str) -> str:
    slopes = b.const(np.array([0.5, 0.25, 0.125, 0.0625]).reshape(1, HQ, 1, 1), np.float32)
    kv = b.op("Cast", b.op("Range", b.const(0), b.scalar("present_key", 2), b.const(1)), to=TensorProto.FLOAT)
    return b.op("Add", x, b.op("Mul", slopes, kv))


def learned_bias(b: Builder, x: str) -> str:
    table = b.const(np.random.default_rng(0).standard_normal((1, HQ, 1, 1)), np.float32)
    return b.op("Add", x, table)


def weak_mask(b: Builder, x: str, fill: float = -2.0) -> str:
    return b.op(
        "Add",
        x,
        b.op(
            "Where",
            builder.causal(b, Tensors("query", "present_key", "attention_mask", "past_key")),
            b.const(0.0, np.float32),
            b.const(fill, np.float32),
        ),
    )


def multiplicative(b: Builder, x: str) -> str:
    """Scores of the last key before the row are made 0, which no other mask removes."""
    kv, q = builder.positions(b, Tensors("query", "present_key", "attention_mask", "past_key"))
    earlier = b.op("Not", b.op("Equal", kv, b.op("Sub", q, b.const(1))))
    return b.op("Mul", x, b.op("Cast", earlier, to=TensorProto.FLOAT))


def multiplied_back(b: Builder, x: str) -> str:
    """Scores that are masked are multiplied by 0: they are seen again."""
    mask = builder.causal(b, Tensors("query", "present_key", "attention_mask", "past_key"))
    return b.op("Mul", x, b.op("Cast", mask, to=TensorProto.FLOAT))


def rectified(b: Builder, x: str) -> str:
    return b.op("Relu", x)


def heads_mixed(b: Builder, x: str) -> str:
    return b.op("Einsum", x, b.const(np.eye(4) + 0.1, np.float32), equation="bhst,hg->bgst")


def sum_used(b: Builder, x: str) -> str:
    b.output(b.op("ReduceLogSumExp", x, b.const([-1])))
    return x


def guarded_by_its_size(b: Builder, x: str) -> str:
    """No guard: probabilities do meet this condition."""
    return b.op("Where", b.op("Greater", x, b.const(0.2, np.float32)), b.const(0.0, np.float32), x)


def probabilities_in_a_window(b: Builder, x: str) -> str:
    """Probabilities that the mask of the scores keeps are made 0."""
    kv, q = builder.positions(b, Tensors("query", "present_key", "attention_mask", "past_key"))
    near = b.op("Greater", kv, b.op("Sub", q, b.const(8)))
    return b.op("Where", near, x, b.const(0.0, np.float32))


def nan_is_one(b: Builder, x: str) -> str:
    return b.op("Where", b.op("IsNaN", x), b.const(1.0, np.float32), x)


def temperature(b: Builder, x: str) -> str:
    _, q = builder.positions(b, Tensors("query", "present_key", "attention_mask", "past_key"))
    return b.op("Mul", x, b.op("Add", b.op("Log", b.op("Cast", q, to=TensorProto.FLOAT)), b.const(1.0, np.float32)))


def negative(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.const(-1.0, np.float32))


def read_twice(b: Builder, x: str) -> str:
    b.output(b.op("Relu", x))
    return x


def as_output(b: Builder, x: str) -> str:
    b.output(x)
    return x


def squared(b: Builder, x: str) -> str:
    return b.op("Mul", x, x)


def at_least(low: float) -> Callable[[Builder, str], str]:
    """A bound that scores may be below."""
    return lambda b, x: b.op("Max", x, b.const(low, np.float32))


def at_most(b: Builder, x: str) -> str:
    return b.op("Clip", x, "", b.const(50.0, np.float32))


def dropped_at_random(b: Builder, x: str) -> str:
    return b.op("Dropout", x, b.const(0.5, np.float32), b.const(True, bool))


CHANGES: dict[str, tuple[Change, str, str]] = {
    "mask before the soft-cap": (at("scores", masked_before_the_cap), "applied before the soft-cap", "Add"),
    "soft-cap after the mask": (at("masked", softcap), "applied before the soft-cap", "Add"),
    "soft-cap twice": (at("scores", capped_twice), "Tanh twice", "Tanh"),
    "sinks": (at("masked", sinks), "attention sink", "Concat"),
    "alibi": (at("scores", alibi), "not a mask of 0 and -inf but a bias", ""),
    "learned bias": (at("scores", learned_bias), "bias", ""),
    "weak mask": (at("scores", weak_mask), "the value -2", "Add"),
    "multiplicative mask": (at("scores", multiplicative), "makes some of them 0, which does not remove them", "Mul"),
    "multiplied when masked already": (at("masked", multiplied_back), "may bring them back", "Mul"),
    "temperature by row": (at("scores", temperature), "neither one constant number nor part of a mask", ""),
    "rectified": (at("scores", rectified), "Relu between the scores and Softmax", "Relu"),
    "sum of exponentials used": (at("masked", sum_used), "attention sink", "ReduceLogSumExp"),
    "probabilities cut off": (at("probabilities", guarded_by_its_size), "only the product with the values may read them", "Softmax"),
    "probabilities in a window": (at("probabilities", probabilities_in_a_window), "that the mask of its scores keeps", "Where"),
    "guard that fills with 1": (at("probabilities", nan_is_one), "only the product with the values may read them", "Softmax"),
    "at least -1000": (at("masked", at_least(-1e3)), "Max between the scores and Softmax", "Max"),
    "at most 50": (at("scores", at_most), "Clip between the scores and Softmax", "Clip"),
    "negative scale": (at("scores", negative), "a factor > 0 is needed", "MatMul"),
    "probabilities read twice": (at("probabilities", read_twice), "only the product with the values may read them", "Softmax"),
    "probabilities are an output": (at("probabilities", as_output), "output of the graph", "Softmax"),
    "scores are read twice": (at("scores", read_twice), "is also read by Relu", "Relu"),
    "scores are an output": (at("masked", as_output), "output of the graph", "Add"),
    "probabilities squared": (at("probabilities", squared), "go through Mul", "Mul"),
    "dropout that drops": (at("probabilities", dropped_at_random), "go through Dropout", "Dropout"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_scores_and_probabilities(name: str, tmp_path: Path) -> None:
    change, reason, node = CHANGES[name]
    found, stopped_by = declined(builder.attention(change=change), tmp_path)
    assert reason in found
    assert stopped_by.startswith(node)


def test_heads_that_are_mixed_are_no_router_alone(tmp_path: Path) -> None:
    report = inspect(running.save(builder.attention(change=at("scores", heads_mixed)), tmp_path))
    assert report.sites == ()
    assert [("heads that are mixed" in d.reason, d.stopped_by.split()[0]) for d in report.declined] == [(True, "Einsum")]


@pytest.mark.parametrize("op", ["Div", "Mul"])
@pytest.mark.parametrize("late", [False, True], ids=["probabilities divided", "product divided"])
def test_more_than_the_sum_of_the_exponentials(late: bool, op: str, tmp_path: Path) -> None:
    """Softmax with one more in its sum: a sink with the score 0."""

    def change(b: Builder, place: str, x: str) -> str:
        if place == "probabilities":
            e = b.op("Exp", b.nodes.pop().input[0])
            kept["sum"] = b.op("Add", b.op("ReduceSum", e, b.const([-1])), b.const(1.0, np.float32))
            return e if late else divided(b, e)
        return divided(b, x) if late and place == "result" else x

    def divided(b: Builder, x: str) -> str:
        return b.op("Div", x, kept["sum"]) if op == "Div" else b.op("Mul", b.op("Reciprocal", kept["sum"]), x)

    kept: dict[str, str] = {}
    assert "divided by more than their sum" in declined(builder.attention(change=change), tmp_path)[0]


@pytest.mark.parametrize("axis", [1, 2, -2])
def test_softmax_over_another_axis(axis: int, tmp_path: Path) -> None:
    model = builder.attention()
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    softmax.attribute[0].i = axis
    assert f"over axis {axis}" in declined(model, tmp_path)[0]


def test_keys_of_another_length_than_the_mask(tmp_path: Path) -> None:
    """The mask counts the past of another cache: nothing says that both are equally long."""

    def other_past(b: Builder, t: Tensors) -> str:
        other = b.input("other_key", ["batch", 2, "other", 16])
        return builder.causal(b, Tensors(t.q, t.k, t.mask, other))

    assert "not the lower-right causal" in declined(builder.attention(Spelling(mask=other_past)), tmp_path)[0]


def test_router_is_listed_but_is_no_layer(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", "seq", 16])
    scores = b.op("MatMul", x, b.const(np.ones((16, 4)), np.float32))
    b.output(b.op("Softmax", scores, axis=-1), rank=3)
    (site,) = inspect(running.save(b.model(), tmp_path)).declined
    assert site.id == "other.0"
    assert "stored weight" in site.reason


def test_attention_inside_of_a_branch_is_listed(tmp_path: Path) -> None:
    inner = builder.attention()
    b = Builder()
    b.inputs += inner.graph.input
    flag = b.input("flag", [], TensorProto.BOOL)
    then = onnx.helper.make_graph(inner.graph.node, "then", [], [inner.graph.output[-1]], inner.graph.initializer)
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Transpose", ["query"], ["other_result"], perm=[0, 2, 1, 3])],
        "else",
        [],
        [onnx.helper.make_tensor_value_info("other_result", 1, None)],
    )
    b.op("If", flag, then_branch=then, else_branch=other, name="result")
    b.output("result")
    (site,) = inspect(running.save(b.model(), tmp_path)).declined
    assert site.id == "other.0"
    assert "inside of If" in site.reason


def test_attention_inside_of_a_function_is_listed(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", "seq", 16])
    b.output(b.op("Probabilities", x, domain="custom"), rank=3)
    model = b.model()
    body = [onnx.helper.make_node("Softmax", ["i"], ["o"], axis=-1)]
    model.functions.append(onnx.helper.make_function("custom", "Probabilities", ["i"], ["o"], body, [onnx.helper.make_opsetid("", 20)]))
    (site,) = inspect(running.save(model, tmp_path)).declined
    assert "inside of Probabilities" in site.reason


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("MultiHeadAttention", "no mask"),
        ("GroupQueryAttention", "lacks an input that its operator needs"),
        ("PagedAttention", "lie in pages"),
        ("SparseAttention", "sparse already"),
        ("DecoderMaskedMultiHeadAttention", "is not taken apart"),
    ],
)
def test_fused_operators_of_onnx_runtime_are_listed(op: str, reason: str, tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", "seq", 64])
    heads = {"num_heads": 4} | ({"kv_num_heads": 2} if op.startswith("Group") else {})
    b.output(b.op(op, x, x, x, domain="com.microsoft", **heads), rank=3)
    (site,) = inspect(running.save(b.model(), tmp_path)).declined
    assert site.id == "layers.0"
    assert site.pattern == f"com.microsoft.{op}"
    assert reason in site.reason
    assert site.stopped_by == f"{op} {op}_0"


@pytest.mark.parametrize("op", ["Div", "Mul"])
def test_softmax_in_parts_is_listed(op: str, tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", 4, "seq", "seq"])
    e = b.op("Exp", b.op("Sub", x, b.op("ReduceMax", x, b.const([-1]))))
    total = b.op("ReduceSum", e, b.const([-2, -1]))
    b.output(b.op("Div", e, total) if op == "Div" else b.op("Mul", b.op("Reciprocal", total), e))
    (site,) = inspect(running.save(b.model(), tmp_path)).declined
    assert "Exp, ReduceSum and a division" in site.reason
