"""Files of older opsets: what is raised computes the same, keeps its weights and names, and the rest is refused with one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes.errors import GraphError
from graph_passes.opset import BODIES, opset_of, raise_opset
from graph_passes.pipeline import inspect, rewrite
from tests.data.frozen import GRAPHS, thaw
from tests.data.judge import judge
from tests.graph_passes import builder, running
from tests.graph_passes.builder import Spelling


def model_of(nodes: list[onnx.NodeProto], opset: int, outputs: int, *, initializers: tuple[onnx.TensorProto, ...] = ()) -> onnx.ModelProto:
    """x [3, 4, 6] -> y0, y1, ..."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6]), helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)],
        list(initializers),
    )
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def branch(name: str, axis: int) -> onnx.GraphProto:
    nodes = [helper.make_node("ReduceMean", ["x"], [f"{name}_mean"], axes=[axis], keepdims=0)]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_mean", TensorProto.FLOAT, None)])


def changed_operators(opset: int) -> list[onnx.NodeProto]:
    """Each operator whose nodes are written anew, in the form of the opset."""
    reductions = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"]
    nodes = [
        helper.make_node(f"Reduce{op}", ["positive"], [f"y{i}"], axes=[1 if i % 2 else -1], keepdims=i % 3 != 0)
        for i, op in enumerate(reductions)
    ]
    nodes.insert(0, helper.make_node("Exp", ["x"], ["positive"]))
    axis = {"axis": 1} if opset >= 13 else {}  # the default before 13: everything from axis 1 on together
    nodes += [helper.make_node(op, ["x"], [f"y{9 + i}"], **axis) for i, op in enumerate(("Softmax", "LogSoftmax"))]
    nodes += [helper.make_node("Softmax", ["x"], ["y11"], axis=-2), helper.make_node("Dropout", ["x"], ["y20"])]
    nodes += [helper.make_node("ReduceMax", ["x"], ["y12"]), helper.make_node("Split", ["x"], ["y13", "y14"], axis=1)]
    if opset < 13:
        nodes += [
            helper.make_node("ReduceSum", ["x"], ["y15"], axes=[2]),
            helper.make_node("Split", ["x"], ["y16", "y17"], axis=2, split=[1, 5]),
            helper.make_node("Unsqueeze", ["x"], ["wide"], axes=[0, 2]),
            helper.make_node("Squeeze", ["wide"], ["y18"], axes=[2]),
        ]
    else:
        nodes += [
            helper.make_node("ReduceSum", ["x", "two"], ["y15"]),
            helper.make_node("Split", ["x", "parts"], ["y16", "y17"], axis=2),
            helper.make_node("Unsqueeze", ["x", "zero_two"], ["wide"]),
            helper.make_node("Squeeze", ["wide", "two"], ["y18"]),
        ]
    nodes.append(helper.make_node("If", ["flag"], ["y19"], then_branch=branch("yes", 1), else_branch=branch("no", 2)))
    return nodes


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 17])
def test_raised_operators_compute_the_same(opset: int, tmp_path: Path) -> None:
    given = {"two": [2], "parts": [1, 5], "zero_two": [0, 2]}
    constants = tuple(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in given.items()) if opset >= 13 else ()
    model = model_of(changed_operators(opset), opset, 21, initializers=constants)
    old = running.Session(running.save(model, tmp_path), optimise=False)
    raise_opset(model)
    assert opset_of(model) == 18
    onnx.checker.check_model(model, full_check=True)
    new = running.Session(running.save(model, tmp_path, "raised.onnx"), optimise=False)
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    for flag in (True, False):
        a, b = (session({"x": x, "flag": np.array(flag)}) for session in (old, new))
        assert len(a) == 21
        for name, value in a.items():
            assert value.shape == b[name].shape, name
            assert np.abs(value - b[name]).max() < 1e-6, name


def test_what_means_the_same_is_not_touched(tmp_path: Path) -> None:
    """Nodes to the letter, weights inside and outside of the file, names, notes, and operators that ONNX does not know."""
    model = onnx.load_from_string(thaw(GRAPHS / "torchscript-sdpa-17" / "llama.onnx.xz"))
    model.graph.node[3].doc_string = "note"
    model.graph.node[3].metadata_props.add(key="k", value="v")
    first = model.graph.node[0].output[0]
    model.graph.node.append(helper.make_node("SimplifiedLayerNormalization", [first, first], ["odd"], axis=-1))
    model.graph.node.append(helper.make_node("FastGelu", [first], ["odder"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    outside = max(model.graph.initializer, key=lambda t: t.ByteSize())
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="nowhere")  # there is no such file: nothing may want to read it
    before = onnx.ModelProto.FromString(model.SerializeToString())
    raise_opset(model)
    old = {n.output[0]: n for n in before.graph.node}
    changed = {o.op_type for o in old.values()} & {"ReduceMean", "Softmax", "Split", "Squeeze", "Unsqueeze"}
    assert "ReduceMean" in changed
    for node in model.graph.node:
        twin = old.pop(node.output[0], None)
        assert twin is not None or node.op_type == "Constant"
        if twin is not None and node.op_type not in changed:
            assert node.SerializeToString() == twin.SerializeToString()
    assert not old
    assert [t.SerializeToString() for t in model.graph.initializer] == [t.SerializeToString() for t in before.graph.initializer]
    for name in ("input", "output", "value_info"):
        assert list(getattr(model.graph, name)) == list(getattr(before.graph, name))


def test_what_another_opset_computes_differently_is_refused(tmp_path: Path) -> None:
    """inspect lists the sites all the same; rewrite names the operator and leaves nothing behind, or needs no raising."""
    model = onnx.load_from_string(thaw(GRAPHS / "torchscript-eager-14" / "llama.onnx.xz"))
    shape = [
        helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 2, 3, 3]),
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None),
    ]
    model.graph.input.append(shape[0])
    model.graph.output.append(shape[1])
    model.graph.node.append(helper.make_node("LpPool", ["p"], ["pooled"], name="pool", kernel_shape=[2, 2]))
    path = running.save(model, tmp_path)
    before = path.read_bytes()
    report = inspect(path)
    assert report.opset == 14
    assert [s.id for s in report.sites] == ["layers.0", "layers.1"]
    assert "rewrite refuses: LpPool (pool)" in report.as_text()
    with pytest.raises(GraphError, match=r"LpPool \(pool\) of opset 14 is another operator in opset 18; export"):
        rewrite(path, tmp_path / "out.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx"]
    assert path.read_bytes() == before


def test_an_operator_is_refused_only_across_its_change() -> None:
    hardmax = [helper.make_node("Hardmax", ["x"], ["y0"], axis=1)]
    with pytest.raises(GraphError, match="Hardmax"):
        raise_opset(model_of(hardmax, 12, 1))
    raise_opset(raised := model_of(hardmax, 13, 1))
    assert opset_of(raised) == 18


def test_without_a_match_the_file_stays_of_its_opset(tmp_path: Path) -> None:
    path = running.save(model_of([helper.make_node("ReduceMean", ["x"], ["y0"], axes=[1])], 14, 1), tmp_path)
    rewrite(path, tmp_path / "out.onnx", allow_no_match=True)
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(path)


def test_the_report_says_that_the_opset_was_raised(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(thaw(GRAPHS / "torchscript-eager-14" / "llama.onnx.xz"))
    assert "opset 14" in inspect(path).as_text()
    report = rewrite(path, tmp_path / "out.onnx")
    assert "nodes; opset 14 raised to 18)" in report.as_text()
    assert (report.as_dict()["opset"], report.as_dict()["opset_after"]) == (14, opset_of(onnx.load(tmp_path / "out.onnx")))


def test_opsets_with_bodies_stay() -> None:
    for opset in BODIES:
        model = model_of([helper.make_node("Relu", ["x"], ["y0"])], opset, 1)
        before = model.SerializeToString()
        raise_opset(model)
        assert model.SerializeToString() == before


@pytest.mark.parametrize("opset", [9, 27, 28])
def test_opsets_out_of_reach(opset: int, tmp_path: Path) -> None:
    """Sites are listed with the sentence that `rewrite` refuses with, and nothing is written."""
    path = running.save(builder.attention(Spelling(opset=opset) if opset > 20 else Spelling()), tmp_path)
    model = onnx.load(path)
    model.opset_import[0].version = opset
    before = model.SerializeToString()
    path.write_bytes(before)
    sentence = f"The model imports opset {opset}; .* 18 to 26"
    with pytest.raises(GraphError, match=sentence):
        raise_opset(model)
    assert model.SerializeToString() == before
    assert re.search(f"rewrite refuses: {sentence}", inspect(path).as_text())
    assert len(inspect(path).sites) == 1 or opset < 18
    if opset >= 18:
        with pytest.raises(GraphError, match=sentence):
            rewrite(path, tmp_path / "out.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("opset", [25, 26])
@pytest.mark.parametrize("route", ["dynamo-eager-24", "dynamo-sdpa-24"])
def test_a_model_of_the_newest_opsets(route: str, opset: int, tmp_path: Path) -> None:
    """An exported model of opset 24, whose operators mean the same in the newer ones, is rewritten in its own opset and is equal."""
    model = onnx.load_model_from_string(thaw(GRAPHS / route / "llama.onnx.xz"))
    next(o for o in model.opset_import if o.domain == "").version = opset
    path = running.save(model, tmp_path)
    judgement = judge(path)
    assert judgement.report.rewritten == 2
    assert judgement.report.ok
    assert judgement.equal
    assert sum(not d.skipped for d in judgement.differences) >= 5
    after = onnx.load(path.with_suffix(".sa.onnx"))
    assert opset_of(after) == opset
    assert {o.version for f in after.functions for o in f.opset_import if o.domain == ""} == {opset}
