"""Lengths that a graph gives several names, and masks that take an input to hold 0 and 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from graph_passes.pipeline import inspect
from graph_passes.symbolic.equations import Equation, solve
from graph_passes.symbolic.poly import Dim, poly
from tests.graph_passes import builder, running
from tests.graph_passes.builder import LOWEST, Builder, Spelling, Tensors

PAST, SEQ, TOTAL, OTHER = (Dim(n) for n in ("past", "seq", "total", "other"))
P, S, T, Q = (poly(d) for d in (PAST, SEQ, TOTAL, OTHER))


def test_equations() -> None:
    certain = [Equation(P + S, Q + S, certain=True)]
    assert solve(certain, lambda s: False) == ({OTHER: P}, frozenset())
    assert solve([Equation(T, P + S, certain=False)], lambda s: s == TOTAL) == ({TOTAL: P + S}, frozenset({TOTAL}))
    # An uncertain equation decides nothing but what may be taken, and no length becomes a difference.
    assert solve([Equation(T, P + S, certain=False)], lambda s: s == SEQ) == ({}, frozenset())
    assert solve([Equation(S, P, certain=False)], lambda s: False) == ({}, frozenset())
    # Two sums with a common length: the past of one layer and of another.
    assert solve([Equation(P + S, Q + S, certain=False)], lambda s: False) == ({OTHER: P}, frozenset({OTHER}))
    # What is there to repeat says nothing of a length of its own.
    expanded = Equation(T, P + S, certain=False, repeats=True)
    assert solve([expanded], lambda s: s == TOTAL) == ({}, frozenset())
    assert solve([Equation(P + S, Q + S, certain=False, repeats=True)], lambda s: False) == ({OTHER: P}, frozenset({OTHER}))
    # Contradictions, halves and lengths of 0 decide nothing.
    assert solve([Equation(S, P + S, certain=True)], lambda s: True) == ({}, frozenset())
    assert solve([Equation(S, S + 1, certain=True)], lambda s: True) == ({}, frozenset())
    assert solve([Equation(2 * S, P + 1, certain=True)], lambda s: True) == ({}, frozenset())
    assert solve([Equation(2 * S, poly(16), certain=True)], lambda s: True) == ({SEQ: poly(8)}, frozenset())


def renamed(model: onnx.ModelProto, names: dict[str, list[str]]) -> onnx.ModelProto:
    """The model with lengths of inputs renamed."""
    for i in model.graph.input:
        for dim, name in zip(i.type.tensor_type.shape.dim, names.get(i.name, []), strict=False):
            if name:
                dim.dim_param = name
    return model


NAMES = {
    "the mask's columns": {"attention_mask": ["", "total"]},
    "the mask's rows and columns": {"attention_mask": ["b_mask", "total"]},
    "the past of values": {"past_value": ["", "", "past_value"]},
    "every batch": {"past_key": ["b1"], "past_value": ["b2"], "attention_mask": ["b3"]},
    "everything": {"past_key": ["b1", "", "p1"], "past_value": ["b2", "", "p2"], "attention_mask": ["b3", "t"]},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", [Spelling(), Spelling(mask_as="where", transpose="3d", scale="both")], ids=["add", "where"])
def test_lengths_with_names_of_their_own(name: str, spelling: Spelling, tmp_path: Path) -> None:
    model = builder.attention(spelling)
    named = renamed(builder.attention(spelling), NAMES[name])
    path = running.save(named, tmp_path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    assert [s.mask.kind for s in report.sites] == ["causal+padding"]
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for batch, rows, past in ((2, 20, 0), (3, 18, 7), (2, 1, 9)):
        data = builder.feeds(model, batch, rows, past, pad="left")
        if "rows" in name or name == "everything":
            # One row of the mask for the whole batch, as broadcasting allows.
            data["attention_mask"] = data["attention_mask"][-1:]
        real = np.broadcast_to(running.real_rows(data["attention_mask"], rows), (batch, rows))
        assert running.largest_difference(full(data)["result"], sparse(data)["result"], real) < 2e-6


def test_as_many_columns_as_rows(tmp_path: Path) -> None:
    """A mask of the new tokens alone meets the scores of all keys: a call has one row or no past, or it fails."""
    model = builder.attention(Spelling(mask=_square))
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.mask.kind == "causal"
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for rows, past in ((20, 0), (1, 9)):
        data = builder.feeds(model, 2, rows, past)
        assert np.abs(full(data)["result"] - sparse(data)["result"]).max() < 2e-6
    with pytest.raises(Exception, match="Add"):
        full(builder.feeds(model, 2, 5, 9))


def _square(b: Builder, t: Tensors) -> str:
    rows = b.op("Range", b.const(0), b.scalar(t.q, 2), b.const(1))
    return b.op("LessOrEqual", b.op("Unsqueeze", rows, b.const([0, 1, 2])), b.op("Unsqueeze", rows, b.const([0, 1, 3])))


def subtracted(b: Builder, at: str, x: str) -> str:
    """(1 - attention_mask) * lowest, as older transformers write padding."""
    if at != "masked":
        return x
    flags = b.op("Cast", b.op("Unsqueeze", "attention_mask", b.const([1, 2])), to=TensorProto.FLOAT)
    return b.op("Add", x, b.op("Mul", b.op("Sub", b.const(1.0, np.float32), flags), b.const(LOWEST, np.float32)))


def filled(b: Builder, t: Tensors) -> str:
    """Where the float causal mask and the attention mask sum to 0, lowest is assigned: `mask[..., :n] = masked_fill(...)`."""
    low, zero = b.const(LOWEST, np.float32), b.const(0.0, np.float32)
    batch = b.op("Concat", b.dim(t.q, 0), b.const([1]), b.dim(t.q, 2), b.dim(t.k, 2), axis=0)
    whole = b.op("Expand", b.op("Where", builder.causal(b, t), zero, low), batch)
    flags = b.op("Cast", b.op("Unsqueeze", t.mask, b.const([1, 2])), to=TensorProto.FLOAT)
    padded = b.op("Equal", b.op("Add", whole, flags), zero)
    updates = b.op("Where", padded, low, whole)
    grids = []
    for k in range(4):
        axis = b.op("Range", b.const(0), b.op("Squeeze", b.op("Slice", batch, b.const([k]), b.const([k + 1])), b.const([0])), b.const(1))
        column = b.op("Unsqueeze", axis, b.const([x for x in range(4) if x != k]))
        grids.append(b.op("Unsqueeze", b.op("Expand", column, batch), b.const([4])))
    return b.op("Equal", b.op("ScatterND", whole, b.op("Concat", *grids, axis=-1), updates), zero)


@pytest.mark.parametrize("name", ["subtracted from 1", "assigned"])
def test_flags_as_numbers(name: str, tmp_path: Path) -> None:
    if name == "assigned":
        model = builder.attention(Spelling(mask=filled))
    else:
        model = builder.attention(Spelling(mask=builder.causal), change=subtracted)
    path = running.save(model, tmp_path)
    report = inspect(path)
    assert [d.reason for d in report.declined] == []
    (site,) = report.sites
    assert site.mask.kind == "causal+padding"
    assert any("is taken to hold 0 and 1 only" in e for e in site.evidence) == (name != "assigned")
    out, _ = running.rewritten(path)
    full, sparse = running.Session(path), running.Session(out)
    for batch, rows, past in ((2, 20, 0), (3, 18, 7), (2, 1, 9)):
        for pad in ("left", "right"):
            data = builder.feeds(model, batch, rows, past, pad=pad)
            real = running.real_rows(data["attention_mask"], rows)
            assert running.largest_difference(full(data)["result"], sparse(data)["result"], real) < 2e-6


def test_positions_subtracted_from_1_are_no_flags(tmp_path: Path) -> None:
    def change(b: Builder, at: str, x: str) -> str:
        if at != "masked":
            return x
        ids = b.input("position_ids", ["batch", "seq"], TensorProto.INT64)
        bias = b.op("Sub", b.const(1.0, np.float32), b.op("Cast", b.op("Unsqueeze", ids, b.const([1, 3])), to=TensorProto.FLOAT))
        return b.op("Add", x, bias)

    (declined,) = inspect(running.save(builder.attention(change=change), tmp_path)).declined
    assert "neither keeps a score" in declined.reason


def test_half_types_widened_before_the_products(tmp_path: Path) -> None:
    """Half queries, keys and values with scores and result in float: one half node, and its result widened."""
    model = builder.attention(replace(Spelling(), dtype=TensorProto.FLOAT16))
    graph = model.graph
    for node in [n for n in graph.node if n.op_type == "MatMul"]:
        place = list(graph.node).index(node)
        for k, name in enumerate(node.input):
            wide = f"{name}_wide_{node.output[0]}"
            if not (k == 0 and node is not graph.node[place]) and "softmax" not in name:
                graph.node.insert(place, onnx.helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT))
                node.input[k] = wide
                place += 1
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    next(o for o in graph.output if o.name == "result").type.tensor_type.elem_type = TensorProto.FLOAT
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert (site.cast, site.query.tensor) == (TensorProto.FLOAT, "query")
    out, _ = running.rewritten(path)
    data = builder.feeds(model, 2, 20, 7, pad="left")
    real = running.real_rows(data["attention_mask"], 20)
    expected, got = running.Session(path)(data)["result"], running.Session(out)(data)["result"]
    assert got.dtype == np.float32
    assert running.largest_difference(expected, got, real) < 4e-3


@pytest.mark.parametrize("declared", [False, True], ids=["open result", "declared result"])
def test_a_declared_width_that_the_join_of_the_past_contradicts(declared: bool, tmp_path: Path) -> None:
    """ONNX Runtime runs it where the past is empty, with the width of the new values: nothing follows from what is declared."""
    model = builder.attention(Spelling(repeat="concat"))
    value = next(i for i in model.graph.input if i.name == "past_value")
    value.type.tensor_type.shape.dim[3].dim_value = 2 * builder.DV
    if declared:
        joined = next(n.output[0] for n in model.graph.node if "past_value" in n.input and n.op_type == "Concat")
        info = onnx.helper.make_tensor_value_info(joined, onnx.TensorProto.FLOAT, ["batch", builder.HKV, "total", 2 * builder.DV])
        for stated in [v for v in (*model.graph.output, *model.graph.value_info) if v.name == joined] or [model.graph.value_info.add()]:
            stated.CopyFrom(info)
    (declined,) = inspect(running.save(model, tmp_path)).declined
    assert declined.reason == "the shapes of its queries, keys and values are not known."


def test_one_row_of_positions_meets_all(tmp_path: Path) -> None:
    """`q - q[0:1]`: the slice is repeated, it is not as long as the rows; the mask is top left."""

    def top_left(b: Builder, t: Tensors) -> str:
        kv, q = builder.positions(b, t)
        first = b.op("Slice", q, b.const([0]), b.const([1]), b.const([2]))
        return b.op("LessOrEqual", kv, b.op("Sub", q, first))

    (declined,) = inspect(running.save(builder.attention(Spelling(mask=top_left)), tmp_path)).declined
    assert "it cannot be told whether axis" in declined.reason
