"""Symbolic lengths and elements are what ONNX Runtime computes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from graph_passes.symbolic.graph import Stuck, SymbolicGraph
from graph_passes.symbolic.logic import And, Equal, Formula, Ite, LessEqual, Not, Value, less_equal, truth
from graph_passes.symbolic.poly import (
    Clamped,
    Dim,
    Index,
    Load,
    Poly,
    Quotient,
    Remainder,
    Symbol,
    const,
    floordiv,
    is_nonnegative,
    poly,
    remainder,
)
from tests.graph_passes import builder, running
from tests.graph_passes.builder import Builder, Spelling
from tests.graph_passes.exporters import EXPORTS
from tests.graph_passes.test_exports import feeds as model_feeds

Numbers = Mapping[Symbol, int]


def number(p: Poly, at: Numbers) -> int:
    total = 0
    for monomial, coefficient in p.terms:
        total += coefficient * math.prod(symbol(s, at) for s in monomial)
    return total


def symbol(s: Symbol, at: Numbers) -> int:
    if isinstance(s, Quotient):
        return number(s.numerator, at) // number(s.denominator, at)
    if isinstance(s, Remainder):
        return number(s.numerator, at) % number(s.denominator, at)
    return min(number(s.length, at), s.bound) if isinstance(s, Clamped) else at[s]


def element(v: Value, at: Numbers) -> float:
    if isinstance(v, (bool, float)):
        return float(v)
    if isinstance(v, Poly):
        return float(number(v, at))
    if isinstance(v, Ite):
        return element(v.then if holds(v.condition, at) else v.other, at)
    return float(holds(v, at))


def holds(f: Formula, at: Numbers) -> bool:
    if isinstance(f, bool):
        return f
    if isinstance(f, LessEqual):
        return number(f.poly, at) <= 0
    if isinstance(f, Equal):
        return number(f.poly, at) == 0
    if isinstance(f, Not):
        return not holds(f.of, at)
    left, right = holds(f.left, at), holds(f.right, at)
    return left and right if isinstance(f, And) else left or right


def symbols(v: Value) -> set[Symbol]:
    if isinstance(v, (bool, float)):
        return set()
    if isinstance(v, Poly):
        nested = [symbols(s.numerator) | symbols(s.denominator) for s in v.symbols if isinstance(s, (Quotient, Remainder))]
        nested += [symbols(s.length) for s in v.symbols if isinstance(s, Clamped)]
        return {s for s in v.symbols if not isinstance(s, Clamped)}.union(*nested)
    if isinstance(v, Ite):
        return symbols(v.condition) | symbols(v.then) | symbols(v.other)
    if isinstance(v, (LessEqual, Equal)):
        return symbols(v.poly)
    return symbols(v.of) if isinstance(v, Not) else symbols(v.left) | symbols(v.right)


def test_division_and_signs_agree_with_numbers() -> None:
    """Random polynomials over indices and lengths: floordiv, remainder and is_nonnegative against arithmetic."""
    generator = random.Random(0)
    n, m = Dim("n"), Dim("m")
    i, j = Index("i", poly(n)), Index("j", const(4))
    proved = divided = 0
    for _ in range(1500):
        pieces = [poly(i), poly(j), poly(i) * 4, poly(i) * poly(m), poly(n), poly(m), const(1), poly(j) * poly(n)]
        p = sum((x * generator.choice([-4, -1, 0, 0, 0, 1, 2, 4]) for x in pieces), start=const(0))
        divisor = generator.choice([const(2), const(4), poly(m) + 1 if generator.random() < 0.3 else poly(n), const(3)])
        points = [{n: x, m: y, i: a, j: b} for x, y in itertools.product((1, 2, 5), (0, 1, 3)) for a in range(x) for b in range(4)]
        values = [number(p, at) for at in points]
        if is_nonnegative(p):
            proved += 1
            assert min(values) >= 0, str(p)
            quotient, rest = floordiv(p, divisor), remainder(p, divisor)
            for at, value in zip(points, values, strict=True):
                size = number(divisor, at)
                assert (number(quotient, at), number(rest, at)) == divmod(value, size), f"{p} by {divisor}"
            divided += not any(isinstance(s, (Quotient, Remainder)) for s in (*quotient.symbols, *rest.symbols))
        f = less_equal(p)
        for at, value in zip(points, values, strict=True):
            assert holds(f, at) == (value <= 0), str(p)
    assert proved > 100
    assert divided > 5


def test_a_comparison_and_its_opposite_are_one_atom() -> None:
    q, kv = poly(Index("q", poly(Dim("S")))), poly(Index("kv", poly(Dim("T"))))
    after = less_equal(q + 1 - kv)
    assert after == Not(less_equal(kv - q))
    assert str(less_equal(kv - q - Dim_poly("past"))) == "kv <= past + q"
    assert str(Not(less_equal(kv - q + 7))) == "kv >= q - 6"
    assert less_equal(kv * 2 - q * 2 - 3) == less_equal(kv - q - 1)
    assert less_equal(-kv) is True
    assert less_equal(kv + 1) is False


def Dim_poly(name: str) -> Poly:
    return poly(Dim(name))


def everything(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor of a model, computed by ONNX Runtime without optimisation."""
    import onnxruntime as ort

    model = onnx.load(path)
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=o) for n in model.graph.node for o in n.output if o and o not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    results = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return {**feeds, **dict(zip(names, results, strict=True))}


def compare(path: Path, feeds: dict[str, np.ndarray], samples: int = 12) -> tuple[int, int]:
    """Compares shapes and elements of every tensor; returns how many shapes were complete and how many elements were compared."""
    model = onnx.load(path)
    del model.graph.value_info[:]  # what exporters declare is not trusted here
    graph = gs.import_onnx(model)
    sg = SymbolicGraph(graph)
    actual = everything(path, feeds)
    at: dict[Symbol, int] = {
        Dim(d.dim_param): n
        for i in model.graph.input
        for d, n in zip(i.type.tensor_type.shape.dim, feeds[i.name].shape, strict=True)
        if d.dim_param and "+" not in d.dim_param
    }
    generator = np.random.default_rng(0)
    shapes = elements = 0
    for node in graph.nodes:
        for out in node.outputs:
            shape = sg.shape(out)
            if shape is None or out.name not in actual:
                continue
            array = actual[out.name]
            assert len(shape) == array.ndim, out.name
            known = [symbols(n) <= set(at) for n in shape]
            for length, n, is_known in zip(shape, array.shape, known, strict=True):
                assert not is_known or number(length, at) == n, f"{out.name}: {length} is {n}"
            shapes += all(known)
            if not all(known) or array.size == 0 or array.dtype.kind not in "iub":
                continue
            index = tuple(poly(Index(f"i{k}", n)) if number(n, at) > 1 else const(0) for k, n in enumerate(shape))
            try:
                value = sg.value(out, index)
            except Stuck:
                continue
            for _ in range(samples):
                place = tuple(int(generator.integers(n)) for n in array.shape)
                here = {**at, **{next(iter(p.symbols)): x for p, x in zip(index, place, strict=True) if p.value is None}}
                for s in symbols(value):
                    if isinstance(s, Load) and s.tensor in actual and all(symbols(k) <= set(here) for k in s.index):
                        # A choice may name an element outside of a tensor in the branch that is not taken.
                        inside = (min(max(number(k, here), 0), n - 1) for k, n in zip(s.index, actual[s.tensor].shape, strict=True))
                        here[s] = int(actual[s.tensor][tuple(inside)])
                if symbols(value) <= set(here):
                    assert element(value, here) == float(array[place]), f"{out.name}{place}: {value}"
                    elements += 1
    return shapes, elements


UNDERSTOOD = {
    "llama sdpa 20": 1.0,
    "llama eager 18": 1.0,
    "qwen2 sdpa 23": 1.0,
    "qwen2 window sdpa 18, torchscript": 1.0,
    "llama sdpa 20, no past, no mask": 0.95,  # Slice from 1: max(seq - 1, 0) stays open
    "bert eager 18, torchscript": 0.3,  # a table of 512 positions cut to seq: min(seq, 512) stays open
}
"""Share of tensors whose lengths are all known when the file declares none."""


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_exported_graphs(name: str, exported: Callable[[str], Path]) -> None:
    path = exported(name)
    nodes = len(onnx.load(path).graph.node)
    for batch, rows, past in ((3, 6, 4), (2, 5, 0)):
        if past and not EXPORTS[name].past:
            continue
        feeds = model_feeds(name, batch, rows, past, "left")
        wanted = {i.name for i in onnx.load(path).graph.input}
        shapes, elements = compare(path, {k: v for k, v in feeds.items() if k in wanted})
        assert shapes >= UNDERSTOOD[name] * nodes
        assert elements > 200


@pytest.mark.parametrize(
    "spelling",
    [
        Spelling(),
        Spelling(scale="both", transpose="3d", guard=True),
        Spelling(past=False),
        Spelling(transpose="bshd"),
        Spelling(static=True),
    ],
)
def test_built_graphs(spelling: Spelling, tmp_path: Path) -> None:
    model = builder.attention(spelling)
    path = running.save(model, tmp_path)
    past = 3 if spelling.past else 0
    shapes, elements = compare(path, builder.feeds(model, 2, 8, past, pad="right"))
    assert shapes >= len(model.graph.node) - 1
    assert elements > 100


def integer_operators() -> onnx.ModelProto:
    """The integer operators that mask builders use, over lengths and positions."""
    b = Builder()
    x = b.input("x", ["n", "m"], onnx.TensorProto.INT64)
    n, m = b.scalar(x, 0), b.scalar(x, 1)
    zero, one, two, three = (b.const(i) for i in (0, 1, 2, 3))
    r, c = b.op("Range", zero, n, one), b.op("Range", two, b.op("Add", m, two), one)
    rows, columns = b.op("Unsqueeze", r, b.const([1])), b.op("Unsqueeze", c, b.const([0]))
    grid = b.op("Add", b.op("Mul", rows, three), columns)
    outs = [
        b.op("Div", grid, three),
        b.op("Mod", grid, two),
        b.op("Max", rows, columns),
        b.op("Min", rows, columns),
        b.op("Neg", grid),
        b.op("Where", b.op("Less", rows, columns), grid, b.op("Sub", rows, columns)),
        b.op("Xor", b.op("Greater", rows, columns), b.op("Equal", rows, columns)),
        b.op("Not", b.op("GreaterOrEqual", columns, rows)),
        b.op("Or", b.op("LessOrEqual", columns, rows), b.op("Cast", x, to=onnx.TensorProto.BOOL)),
        b.op("Trilu", b.op("Expand", one, b.op("Concat", b.dim(x, 0), b.dim(x, 1), axis=0)), one, upper=0),
        b.op("Trilu", x, zero, upper=1),
        b.op("Gather", x, r, axis=0),
        b.op("GatherElements", x, b.op("Expand", b.const([[0]]), b.op("Shape", x)), axis=1),
        b.op("CumSum", b.op("Expand", two, b.op("Shape", x)), one),
        b.op("CumSum", b.op("Expand", two, b.op("Shape", x)), one, exclusive=1),
        b.op("Transpose", grid, perm=[1, 0]),
        b.op("Reshape", grid, b.const([-1])),
        b.op("Flatten", grid, axis=0),
        b.op("Slice", grid, b.const([1]), b.const([2**63 - 1]), b.const([0])),
        b.op("Slice", b.const(np.arange(12).reshape(3, 4)), b.const([2, 0]), b.const([-4, 4]), b.const([0, 1]), b.const([-1, 2])),
        b.op("Concat", x, grid, axis=0),
        b.op("Split", grid, b.op("Concat", b.const([1]), b.op("Sub", b.dim(x, 1), b.const([1])), axis=0), axis=1, outputs=2),
        b.op("Tile", x, b.const([1, 2])),
        b.op("Expand", b.op("Unsqueeze", x, b.const([1])), b.op("Concat", b.const([2]), b.dim(x, 1), axis=0)),
        b.op("GatherND", x, b.op("Unsqueeze", b.op("Concat", b.op("Unsqueeze", zero, b.const([0])), b.const([1]), axis=0), b.const([0]))),
        b.op("Size", x),
        b.op("ReduceMax", x, b.const([1])),
        b.op("ArgMax", x, axis=1, keepdims=0),
        b.op("Cast", b.op("Cast", grid, to=onnx.TensorProto.FLOAT16), to=onnx.TensorProto.INT64),
        b.op("Cast", b.op("Div", b.op("Cast", two, to=1), b.op("Cast", three, to=1)), to=onnx.TensorProto.INT64),
        b.op("Gather", b.const(np.tril(np.ones((16, 16), bool), -1)), r, axis=0),
    ]
    for out in outs:
        b.outputs.append(onnx.ValueInfoProto(name=out))
    return b.model()


def test_integer_operators(tmp_path: Path) -> None:
    model = integer_operators()
    path = running.save(model, tmp_path)
    for n, m in ((5, 7), (3, 3), (9, 2)):
        x = np.random.default_rng(0).integers(-1, 2, (n, m))
        _, elements = compare(path, {"x": x}, samples=40)
        assert elements > 1000


def test_elements_of_unknown_floats_do_not_become_integers(tmp_path: Path) -> None:
    """2 x <= 1 is not x <= 0 for x = 0.5: a comparison of unknown floats stays as it is."""
    b = Builder()
    x = b.input("x", ["n"])
    out = b.op("LessOrEqual", b.op("Add", x, x), b.const(1.0, np.float32))
    b.output(out, onnx.TensorProto.BOOL, rank=1)
    sg = SymbolicGraph(gs.import_onnx(b.model()))
    value = sg.value(sg.tensors[out], (poly(Index("i", Dim_poly("n"))),))
    assert {s.tensor for s in symbols(truth(value)) if isinstance(s, Load)} == {out}


def test_axes_that_a_graph_computes_or_is_given() -> None:
    """Axes made from constants are as good as stored ones; those that are an input say nothing, and are no default."""
    b = Builder()
    x, given = b.input("x", ["n", 4]), b.input("axes", [1], onnx.TensorProto.INT64)
    computed = b.op("Reshape", b.const(-1), b.const([1]))
    mean = b.op("ReduceMean", x, computed)
    cut = b.op("Slice", x, b.const([0]), b.const([2]), computed)
    open_cut = b.op("Slice", x, b.const([0]), b.const([2]), given)
    for out in (mean, cut, open_cut):
        b.output(out, rank=2)
    sg = SymbolicGraph(gs.import_onnx(b.model()))
    n = Dim_poly("n")
    assert [sg.shape(sg.tensors[t]) for t in (mean, cut)] == [(n, const(1)), (n, const(2))]
    assert all(length.value is None and length != n for length in sg.known_shape(sg.tensors[open_cut]))
    with pytest.raises(Stuck, match="the bounds of its Slice are not known"):
        sg.value(sg.tensors[open_cut], (const(0), const(0)))


def test_an_expand_to_fewer_axes_keeps_the_others() -> None:
    b = Builder()
    x = b.input("x", ["n", 1, 4])
    outs = [b.op("Expand", x, b.const([1])), b.op("Expand", x, b.const([3, 4])), b.op("Expand", x, b.dim(x, 0))]
    for out in outs:
        b.output(out, rank=3)
    sg = SymbolicGraph(gs.import_onnx(b.model()))
    n = Dim_poly("n")
    assert [sg.shape(sg.tensors[t]) for t in outs[:2]] == [(n, const(1), const(4)), (n, const(3), const(4))]
    assert [x.value for x in sg.known_shape(sg.tensors[outs[2]])] == [None, 1, 4]
