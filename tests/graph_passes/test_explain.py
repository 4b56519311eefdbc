"""Near misses: the reason, the best match and a cut-out that stands alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from graph_passes.errors import GraphError
from graph_passes.explain import explain, write_cut_out
from graph_passes.pipeline import inspect
from sa_export.cli.main import main
from tests.data.frozen import GRAPHS, thaw
from tests.graph_passes import builder
from tests.graph_passes.builder import Spelling


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def with_second_reader(folder: Path) -> Path:
    """The probabilities are read by something else than the product with the values."""
    model = builder.attention(Spelling())
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    model.graph.node.append(helper.make_node("Mul", [softmax.output[0]] * 2, ["squares"], name="squarer"))
    model.graph.output.append(onnx.ValueInfoProto(name="squares"))
    return saved(model, folder)


def without_values(folder: Path) -> Path:
    """The probabilities go through an operator that attention does not have."""
    model = builder.attention(Spelling())
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and softmax.output[0] in n.input)
    at = list(model.graph.node).index(product)
    model.graph.node.insert(at, helper.make_node("Neg", [softmax.output[0]], ["turned"], name="turner"))
    product.input[0] = "turned"
    return saved(model, folder)


@pytest.mark.parametrize(("make", "stopper"), [(with_second_reader, "Mul squarer"), (without_values, "Neg turner")])
def test_best_match_and_cut_out(make: Callable[[Path], Path], stopper: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    report = inspect(path)
    assert not report.sites
    (found,) = explain(path, report)
    states = {step.role: step.state for step in found.steps}
    assert {"queries x keys", "scale", "mask", "softmax", "probabilities x values"} <= set(states)
    assert "missing" not in states.values()
    assert [step.node for step in found.steps if step.state == "stopped"] == [found.site.stopped_by]
    text = found.as_text()
    assert found.site.reason in text
    assert stopper in text
    out = tmp_path / "cut.onnx"
    write_cut_out(path, found, out)
    cut = onnx.load(out)
    onnx.checker.check_model(cut)
    assert stopper in {f"{n.op_type} {n.name}" for n in cut.graph.node}
    assert {"Softmax", "MatMul"} <= {n.op_type for n in cut.graph.node}
    assert len(cut.graph.node) < len(onnx.load(path).graph.node)
    whole = {n.SerializeToString(deterministic=True) for n in onnx.load(path).graph.node}
    assert {n.SerializeToString(deterministic=True) for n in cut.graph.node} <= whole
    with pytest.raises(GraphError, match="exists; choose another name"):
        write_cut_out(path, found, out)


FROZEN = {
    "dynamo-sdpa-20/bloom": "Mul",
    "torchscript-eager-18/gpt-oss": "Concat",
    "genai-fp32-cpu/gpt-oss": "GroupQueryAttention",
    "genai-paged/llama": "PagedAttention",
    "optimum/mistral-window": "Greater",
    "optimum/qwen3-moe": "MatMul",
    "handwritten/attention-23-window": "Greater",
}
"""Graphs with something declined, and the operator that stops it."""


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_graphs_are_explained(name: str, tmp_path: Path) -> None:
    """The best match, the first node that stops it among the nodes around it, and a cut-out that opens."""
    path = tmp_path / "model.onnx"
    path.write_bytes(thaw(GRAPHS / f"{name}.onnx.xz"))
    report = inspect(path)
    found = explain(path, report)
    assert [e.site for e in found] == list(report.declined)
    operators = {n.op_type for n in onnx.load(path).graph.node}
    for e in found:
        (stopped,) = (s.node for s in e.steps if s.state == "stopped")
        assert stopped == e.site.stopped_by
        assert stopped in e.around
        assert any(line.startswith(f"{stopped}: ") for line in e.lines)
        write_cut_out(path, e, tmp_path / "cut.onnx", force=True)
        cut = onnx.load(tmp_path / "cut.onnx").graph
        assert len(cut.node) == len(e.around) > 4
        assert {n.op_type for n in cut.node} <= operators
        assert {i for n in cut.node for i in n.input if i} <= {
            *(i.name for i in cut.input),
            *(t.name for t in cut.initializer),
            *(o for n in cut.node for o in n.output),
        }
    assert FROZEN[name] in {e.site.stopped_by.split()[0] for e in found}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """A router: its Softmax is listed, with what is missing for an attention."""
    element = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["logits"], name="router"),
            helper.make_node("Softmax", ["logits"], ["p"], name="gate", axis=-1),
        ],
        "g",
        [helper.make_tensor_value_info("x", element, ["rows", 8])],
        [helper.make_tensor_value_info("p", element, ["rows", 4])],
        [onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    path = saved(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path)
    report = inspect(path)
    (found,) = explain(path, report, report.declined[0].id)
    assert {step.role for step in found.steps if step.state == "missing"} == {"queries x keys", "probabilities x values"}
    assert "weight" in found.site.reason or "product of queries and keys" in found.site.reason
    write_cut_out(path, found, tmp_path / "cut.onnx")
    with pytest.raises(GraphError, match="no declined candidate"):
        explain(path, report, "layers.9")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_second_reader(tmp_path)
    cut = tmp_path / "cut.onnx"
    assert main(["inspect", "--explain", str(path)]) == 1
    assert "x stopped here" in capsys.readouterr().out
    assert main(["inspect", str(path), "--explain", "layers.0", "--explain-output", str(cut), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["explained"][0]["best_match"]
    assert cut.is_file()
    assert main(["inspect", str(path), "--explain", "layers.0", "--explain-output", str(cut)]) == 2
    assert main(["inspect", "--explain"]) == 2
    assert "no model was given" in capsys.readouterr().err
    good = saved(builder.attention(Spelling()), tmp_path)
    assert main(["inspect", str(good), "--explain", "layers.0"]) == 2
    assert "layers.0 is a site that can be rewritten" in capsys.readouterr().err
