"""Mask builders other than the commonest, and that the evaluation would catch a wrong proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from graph_passes.patterns import softmax_core
from graph_passes.patterns.masks.crosscheck import crosscheck
from graph_passes.pipeline import inspect
from graph_passes.site import KeyMask, Mask, Refusal
from graph_passes.symbolic.graph import SymbolicGraph
from tests.graph_passes import builder, running
from tests.graph_passes.builder import LOWEST, Builder, Spelling, Tensors
from tests.graph_passes.test_refusals import MASKS, chunked, sliding

ROWS, PAST = 8, 3
STATIC = Spelling(static=True)


def check(spelling: Spelling, folder: Path, kind: str = "causal+padding", change: object = None) -> None:
    """The site is found with the given kind of mask, and is equal after the rewrite."""
    model = builder.attention(spelling, change=change)  # type: ignore[arg-type]
    path = running.save(model, folder)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    assert [s.mask.kind for s in report.sites] == [kind]
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    sizes = [(2, ROWS, PAST)] if spelling.static else [(2, 20, 0), (3, 5, 17), (2, 1, 9)]
    for batch, rows, past in sizes:
        for pad in ("left", "right") if kind != "causal" else ("none",):
            data = builder.feeds(model, batch, rows, past if spelling.past else 0, pad=pad)
            real = running.real_rows(data["attention_mask"], rows)
            assert running.largest_difference(full(data)["result"], sparse(data)["result"], real) < 2e-6


def folded(shift: int = 0, dtype: type = bool) -> builder.MaskMaker:
    """The causal half as a constant [1, 1, S, T], as static exports have it."""
    triangle = np.tri(ROWS, ROWS + PAST, PAST + shift, dtype=bool)[None, None]
    return lambda b, t: b.op("And", b.const(triangle, bool), builder.padding(b, t))


def buffer(b: Builder, t: Tensors) -> str:
    """A square buffer from which rows and columns of this call are cut."""
    square = b.const(np.tri(64, dtype=bool)[None, None], bool)
    part = b.op("Slice", square, b.const([PAST, 0]), b.const([PAST + ROWS, PAST + ROWS]), b.const([2, 3]))
    return b.op("And", part, builder.padding(b, t))


def open_buffer(b: Builder, t: Tensors) -> str:
    """A square buffer cut to the length of a prompt, without a past."""
    square = b.const(np.tri(64, dtype=bool)[None, None], bool)
    rows = b.dim(t.q, 2)
    # Numbers beyond the buffer must not make the evaluation longer than the buffer.
    zero = b.op("Sub", b.const([200, 200]), b.const([200, 200]))
    return b.op("Slice", square, zero, b.op("Concat", rows, rows, axis=0), b.const([2, 3]))


def trilu(b: Builder, t: Tensors) -> str:
    """Not(Trilu(ones, past + 1)): what torch.triu masks."""
    shape = b.op("Concat", b.dim(t.q, 2), b.dim(t.k, 2), axis=0)
    ones = b.op("Expand", b.const(1), shape)
    above = b.op("Trilu", ones, b.op("Add", b.scalar(t.past, 2), b.const(1)), upper=1)
    return b.op("And", b.op("Unsqueeze", b.op("Equal", above, b.const(0)), b.const([0, 1])), builder.padding(b, t))


def cumulated(b: Builder, t: Tensors) -> str:
    """Positions as a running sum of ones, compared with Greater and Not."""
    ones = b.op("Expand", b.const(1), b.dim(t.k, 2))
    kv = b.op("Unsqueeze", b.op("Sub", b.op("CumSum", ones, b.const(0)), b.const(1)), b.const([0, 1, 2]))
    _, q = builder.positions(b, t)
    return b.op("And", b.op("Not", b.op("Greater", kv, q)), builder.padding(b, t))


def expanded(b: Builder, t: Tensors) -> str:
    """Broadcast to [B, Hq, S, T] before use."""
    shape = b.op("Concat", b.dim(t.q, 0), b.const([builder.HQ]), b.dim(t.q, 2), b.dim(t.k, 2), axis=0)
    return b.op("Expand", builder.causal_padding(b, t), shape)


def said_twice(b: Builder, t: Tensors) -> str:
    """Conditions that follow from causality change nothing."""
    kv, q = builder.positions(b, t)
    loose = b.op("LessOrEqual", kv, b.op("Add", q, b.const(1)))
    return b.op("And", b.op("And", loose, builder.causal_padding(b, t)), b.op("GreaterOrEqual", kv, b.const(0)))


def two_sources(b: Builder, t: Tensors) -> str:
    """Which keys are real is asked of two tensors, joined in the graph before causality."""
    other = b.op("Not", b.op("Equal", t.mask, b.const(7)))
    keys = b.op("And", b.op("Cast", t.mask, to=TensorProto.BOOL), other)
    return b.op("And", builder.causal(b, t), b.op("Unsqueeze", keys, b.const([1, 2])))


def cumulated_reals(b: Builder, t: Tensors) -> str:
    """The same in real numbers."""
    ones = b.op("Expand", b.const(1.0, np.float32), b.dim(t.k, 2))
    kv = b.op("Unsqueeze", b.op("Sub", b.op("CumSum", ones, b.const(0)), b.const(1.0, np.float32)), b.const([0, 1, 2]))
    _, q = builder.positions(b, t)
    return b.op("And", b.op("LessOrEqual", kv, b.op("Cast", q, to=TensorProto.FLOAT)), builder.padding(b, t))


def joined(b: Builder, t: Tensors) -> str:
    """The past, all of it seen, and a square of the call, side by side."""
    rows, past = b.dim(t.q, 2), b.dim(t.past, 2)
    square = b.op("Trilu", b.op("Expand", b.const(1), b.op("Concat", rows, rows, axis=0)), b.const(0), upper=0)
    both = b.op("Concat", b.op("Expand", b.const(1), b.op("Concat", rows, past, axis=0)), square, axis=1)
    return b.op("And", b.op("Unsqueeze", b.op("Cast", both, to=TensorProto.BOOL), b.const([0, 1])), builder.padding(b, t))


def earlier_or_own(b: Builder, t: Tensors) -> str:
    """The comparisons are of one integer: of `kv < q`, `kv == q` and `kv > q` just one holds."""
    kv, q = builder.positions(b, t)
    return b.op("And", b.op("Or", b.op("Less", kv, q), b.op("Equal", kv, q)), builder.padding(b, t))


def first_key_too(b: Builder, t: Tensors) -> str:
    """The first key is no exception: no row comes before it."""
    kv, _ = builder.positions(b, t)
    return b.op("And", b.op("Or", builder.causal(b, t), b.op("Equal", kv, b.const(0))), builder.padding(b, t))


def the_later_is_the_row(b: Builder, t: Tensors) -> str:
    kv, q = builder.positions(b, t)
    return b.op("And", b.op("Equal", b.op("Max", kv, q), q), builder.padding(b, t))


GOOD = {
    "cumulated, in real numbers": (cumulated_reals, Spelling()),
    "joined of past and square": (joined, Spelling()),
    "first key too": (first_key_too, Spelling()),
    "earlier or own": (earlier_or_own, Spelling()),
    "the later is the row": (the_later_is_the_row, Spelling()),
    "folded": (folded(), STATIC),
    "folded, as infinities": (folded(), replace(STATIC, mask_as="add_inf")),
    "buffer": (buffer, STATIC),
    "open buffer": (open_buffer, Spelling(past=False)),
    "trilu": (trilu, Spelling()),
    "trilu, no past": (trilu, Spelling(past=False)),
    "cumulated": (cumulated, Spelling()),
    "expanded": (expanded, Spelling()),
    "said twice": (said_twice, Spelling()),
    "two sources": (two_sources, Spelling()),
}


@pytest.mark.parametrize("name", GOOD)
def test_full_causal(name: str, tmp_path: Path) -> None:
    make, spelling = GOOD[name]
    check(replace(spelling, mask=make), tmp_path, "causal" if name == "open buffer" else "causal+padding")


def test_two_masks_added_one_after_the_other(tmp_path: Path) -> None:
    def add_padding(b: Builder, at: str, x: str) -> str:
        if at != "masked":
            return x
        keys = builder.padding(b, Tensors("", "", "attention_mask", ""))
        return b.op("Add", x, b.op("Where", keys, b.const(0.0, np.float32), b.const(LOWEST, np.float32)))

    check(Spelling(mask=builder.causal), tmp_path, change=add_padding)


def test_one_less_the_product_of_causality_and_padding(tmp_path: Path) -> None:
    """(1 - causal * padding) * -10000, with the padding as the input has it: numbers that are taken to be 0 and 1."""

    def add(b: Builder, at: str, x: str) -> str:
        if at != "scores":
            return x
        t = Tensors("query", "present_key", "attention_mask", "past_key")
        causal = b.op("Cast", builder.causal(b, t), to=TensorProto.FLOAT)
        real = b.op("Cast", b.op("Unsqueeze", t.mask, b.const([1, 2])), to=TensorProto.FLOAT)
        hidden = b.op("Sub", b.const(1.0, np.float32), b.op("Mul", causal, real))
        return b.op("Add", x, b.op("Mul", hidden, b.const(-1e4, np.float32)))

    check(Spelling(mask=None), tmp_path, change=add)


def test_one_row_sees_every_key(tmp_path: Path) -> None:
    """A graph for decoding alone needs no causal mask: its one row stands at the end."""
    b = Builder()
    q = b.input("query", ["batch", 4, 1, 16])
    k, v = b.input("key", ["batch", 2, "total", 16]), b.input("value", ["batch", 2, "total", 16])
    keep = b.input("attention_mask", ["batch", "total"], TensorProto.INT64)
    k4, v4 = (
        b.op("Reshape", b.op("Expand", b.op("Unsqueeze", x, b.const([2])), b.const([1, 1, 2, 1, 1])), b.const([0, 4, -1, 16]))
        for x in (k, v)
    )
    scores = b.op("MatMul", q, b.op("Transpose", k4, perm=[0, 1, 3, 2]))
    bias = b.op("Where", builder.padding(b, Tensors(q, k, keep, "")), b.const(0.0, np.float32), b.const(LOWEST, np.float32))
    b.output(b.op("MatMul", b.op("Softmax", b.op("Add", scores, bias), axis=-1), v4, name="result"))
    path = running.save(b.model(), tmp_path)
    (site,) = inspect(path).sites
    assert (site.kv_heads, site.mask.kind) == (2, "causal+padding")
    out, _ = running.rewritten(path)
    generator = np.random.default_rng(0)
    data = {
        n: generator.standard_normal((3, h, s, 16)).astype(np.float32) for n, h, s in (("query", 4, 1), ("key", 2, 11), ("value", 2, 11))
    }
    data["attention_mask"] = builder.padding_mask(3, 11, "left")
    assert np.abs(running.Session(path)(data)["result"] - running.Session(out)(data)["result"]).max() < 2e-6


def square(b: Builder, t: Tensors) -> str:
    """A square of the new tokens, expanded to all keys: a call of several rows has no past, or it fails."""
    rows = b.op("Range", b.const(0), b.scalar(t.q, 2), b.const(1))
    new = b.op("LessOrEqual", b.op("Unsqueeze", rows, b.const([0, 1, 2])), b.op("Unsqueeze", rows, b.const([0, 1, 3])))
    shape = b.op("Concat", b.dim(t.q, 0), b.const([1]), b.dim(t.q, 2), b.dim(t.k, 2), axis=0)
    return b.op("And", b.op("Expand", new, shape), builder.padding(b, t))


def test_a_square_of_the_new_tokens_expanded_to_all_keys(tmp_path: Path) -> None:
    model = builder.attention(Spelling(mask=square))
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.mask.kind == "causal+padding"
    assert [e.split(":")[0] for e in site.evidence[:2]] == ["for past = 0", "for past = 0"]
    assert any(e.startswith("for seq = 1: mask proved") for e in site.evidence)
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for batch, rows, past in ((2, 20, 0), (2, 1, 9)):
        data = builder.feeds(model, batch, rows, past, pad="left")
        real = running.real_rows(data["attention_mask"], rows)
        assert running.largest_difference(full(data)["result"], sparse(data)["result"], real) < 2e-6
    with pytest.raises(Exception, match="Expand"):
        full(builder.feeds(model, 2, 5, 9))


def test_a_strict_square_is_declined(tmp_path: Path) -> None:
    """Causal for one row only: without a past a row does not see itself."""

    def strict_square(b: Builder, t: Tensors) -> str:
        rows = b.op("Range", b.const(0), b.scalar(t.q, 2), b.const(1))
        new = b.op("Less", b.op("Unsqueeze", rows, b.const([0, 1, 2])), b.op("Unsqueeze", rows, b.const([0, 1, 3])))
        shape = b.op("Concat", b.dim(t.q, 0), b.const([1]), b.dim(t.q, 2), b.dim(t.k, 2), axis=0)
        return b.op("Expand", new, shape)

    (declined,) = inspect(running.save(builder.attention(Spelling(mask=strict_square)), tmp_path)).declined
    assert "hides the last 1 of the keys" in declined.reason


BAD = {
    "folded, one later": (folded(1), "sees keys that come after"),
    "folded, one earlier": (folded(-1), "hides the last 1 of the keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_shifted_constants_are_declined(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    (declined,) = inspect(running.save(builder.attention(replace(STATIC, mask=make)), tmp_path)).declined
    assert reason in declined.reason


def test_a_constant_band_is_a_window(tmp_path: Path) -> None:
    band = np.tri(ROWS, ROWS + PAST, PAST, dtype=bool) & ~np.tri(ROWS, ROWS + PAST, PAST - 4, dtype=bool)
    spelling = replace(STATIC, mask=lambda b, t: b.const(band[None, None], bool))
    (declined,) = inspect(running.save(builder.attention(spelling), tmp_path)).declined
    assert "sliding window of 4 keys" in declined.reason


def test_a_constant_that_is_no_triangle_is_declined(tmp_path: Path) -> None:
    triangle = np.tri(ROWS, ROWS + PAST, PAST, dtype=bool)
    triangle[5, 2] = False
    spelling = replace(STATIC, mask=lambda b, t: b.const(triangle[None, None], bool))
    (declined,) = inspect(running.save(builder.attention(spelling), tmp_path)).declined
    assert "of which nothing is proved" in declined.reason


def test_positions_in_float16_are_not_trusted(tmp_path: Path) -> None:
    """Above 2048 float16 does not tell neighbours apart: 2049 <= 2048 would hold."""

    def rounded(b: Builder, t: Tensors) -> str:
        kv, q = builder.positions(b, t)
        return b.op("LessOrEqual", *(b.op("Cast", x, to=TensorProto.FLOAT16) for x in (kv, q)))

    report = inspect(running.save(builder.attention(Spelling(mask=rounded)), tmp_path))
    assert report.sites == ()
    assert "of which nothing is proved" in report.declined[0].reason


CLAIMS = {
    "sliding window of 4": sliding(4),
    "sliding window of 4096": sliding(4096),
    "sliding window of 131072": sliding(131072),
    "chunked": chunked,
    **{n: MASKS[n][0] for n in ("prefix", "top left", "anticausal", "strict", "dilated", "padding only")},
}


@pytest.mark.parametrize("name", CLAIMS)
def test_the_evaluation_catches_a_wrong_claim(name: str) -> None:
    """The evaluation alone, told that a mask is causal (with the padding that it has), finds that it is not."""
    make = CLAIMS[name]
    sg = SymbolicGraph(gs.import_onnx(builder.attention(Spelling(mask=make))))
    softmax = next(n for n in sg.graph.nodes if n.op == "Softmax")
    core = softmax_core.find_core(sg, softmax)
    keys = KeyMask("attention_mask") if "window" in name or name == "padding only" else None
    with pytest.raises(Refusal, match="evaluates otherwise"):
        crosscheck(sg, core.terms, Mask(keys), softmax_core.measure(sg, core).grid)


def test_the_evaluation_catches_a_window_as_wide_as_a_context_without_a_past() -> None:
    sg = SymbolicGraph(gs.import_onnx(builder.attention(Spelling(mask=sliding(4096), past=False))))
    core = softmax_core.find_core(sg, next(n for n in sg.graph.nodes if n.op == "Softmax"))
    with pytest.raises(Refusal, match="evaluates otherwise"):
        crosscheck(sg, core.terms, Mask(KeyMask("attention_mask")), softmax_core.measure(sg, core).grid)


@pytest.mark.parametrize("claim", [None, KeyMask("attention_mask", test="zero")])
def test_the_evaluation_catches_wrong_padding(claim: KeyMask | None) -> None:
    sg = SymbolicGraph(gs.import_onnx(builder.attention()))
    core = softmax_core.find_core(sg, next(n for n in sg.graph.nodes if n.op == "Softmax"))
    with pytest.raises(Refusal, match="evaluates otherwise"):
        crosscheck(sg, core.terms, Mask(claim), softmax_core.measure(sg, core).grid)
