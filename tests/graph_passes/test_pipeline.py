"""The two verbs on files: what they keep, what they refuse, and what they leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes.config import Config, Entry, write_config
from graph_passes.errors import GraphError
from graph_passes.op import DOMAIN, OP_TYPE, Policy, policy_from_attributes
from graph_passes.pipeline import inspect, rewrite
from tests.graph_passes import builder, running
from tests.graph_passes.builder import Spelling


def two_layers(second: Spelling | None = None) -> onnx.ModelProto:
    """Two independent attentions in one graph, the second with its names prefixed."""
    a, b = builder.attention(), builder.attention(second or Spelling())
    model = onnx.compose.merge_models(a, onnx.compose.add_prefix(b, "l1_"), io_map=[])
    del model.graph.value_info[:]
    return model


def test_every_attribute_stands_on_the_node(tmp_path: Path) -> None:
    path = running.save(two_layers(), tmp_path)
    settings = Policy(policy="tile", alpha=(0.5,), window=7)
    config = Config(settings, (Entry("layers.1", {"policy": "column_slash", "alpha": [0.5, 0.6, 0.7, 1.0]}),))
    out, report = running.rewritten(path, config)
    nodes = [n for n in onnx.load(out).graph.node if n.op_type == OP_TYPE]
    assert [n.name for n in nodes] == ["layers.0/SampleAttention", "layers.1/SampleAttention"]
    assert [n.overload for n in nodes] == ["tile.mask", "column_slash.mask"]
    attributes = [{a.name: helper.get_attribute_value(a) for a in n.attribute} for n in nodes]
    assert [policy_from_attributes(a) for a in attributes] == [
        settings,
        settings.replace(policy="column_slash", alpha=(0.5, 0.6, 0.7, 1.0)),
    ]
    assert [a["scale"] for a in attributes] == [0.25, 0.25]
    assert report.policies["layers.0"] == settings


def test_what_graphsurgeon_drops_is_kept(tmp_path: Path) -> None:
    model = builder.attention()
    model.doc_string, model.domain, model.model_version = "doc", "org.example", 7
    model.producer_name, model.producer_version = "someone", "3"
    model.metadata_props.add(key="k", value="v")
    model.graph.doc_string = "graph doc"
    model.graph.metadata_props.add(key="gk", value="gv")
    last = model.graph.node[-1]
    last.doc_string = "kept"
    last.metadata_props.add(key="namespace", value="model.layers.0")
    model.graph.value_info.append(
        helper.make_tensor_value_info(next(n.output[0] for n in model.graph.node if n.op_type == "Softmax"), TensorProto.FLOAT, None)
    )
    model.graph.value_info.append(helper.make_tensor_value_info(last.input[0], TensorProto.FLOAT, ["batch", 4, "seq", 8]))
    # A function with an overload, called from the graph; graphsurgeon knows no overloads.
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("custom", "Activate", ["x"], ["y"], body, [helper.make_opsetid("", 20)], overload="fast")
    model.functions.append(function)
    call = helper.make_node("Activate", ["query"], ["activated"], domain="custom", overload="fast")
    model.graph.node.append(call)
    model.graph.output.append(helper.make_tensor_value_info("activated", TensorProto.FLOAT, [None] * 4))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    path = running.save(model, tmp_path)
    before, after = onnx.load(path), onnx.load(running.rewritten(path)[0])
    for field in ("doc_string", "domain", "model_version", "producer_name", "producer_version"):
        assert getattr(after, field) == getattr(before, field)
    assert [(p.key, p.value) for p in after.metadata_props] == [("k", "v")]
    assert after.graph.doc_string == "graph doc"
    assert [(p.key, p.value) for p in after.graph.metadata_props] == [("gk", "gv")]
    twin = next(n for n in after.graph.node if n.output[0] == last.output[0])
    assert twin.SerializeToString() == last.SerializeToString()
    assert next(n for n in after.graph.node if n.op_type == "Activate").overload == "fast"
    assert function.SerializeToString() in [f.SerializeToString() for f in after.functions]
    assert [v.name for v in after.graph.value_info] == [last.input[0]]
    data = builder.feeds(model, 2, 24, 3)
    assert (running.Session(running.rewritten(path)[0])(data)["activated"] == np.maximum(data["query"], 0)).all()


def test_empty_lists_of_attributes_are_kept(tmp_path: Path) -> None:
    """Unoptimised exports hold `Constant(value_ints=[])`, whose type graphsurgeon cannot tell."""
    model = builder.attention()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["no_axes"]))
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="value_ints", type=onnx.AttributeProto.INTS))
    model.graph.output.append(helper.make_tensor_value_info("no_axes", TensorProto.INT64, [0]))
    path = running.save(model, tmp_path)
    out, _ = running.rewritten(path)
    node = next(n for n in onnx.load(out).graph.node if n.output[0] == "no_axes")
    assert node.SerializeToString() == model.graph.node[0].SerializeToString()


def test_unused_inputs_stay(tmp_path: Path) -> None:
    """A causal layer without padding reads no attention_mask after the rewrite; callers feed it all the same."""
    path = running.save(builder.attention(Spelling(mask=builder.causal)), tmp_path)
    out, _ = running.rewritten(path)
    assert [i.name for i in onnx.load(out).graph.input] == [i.name for i in onnx.load(path).graph.input]


def test_names_that_are_taken(tmp_path: Path) -> None:
    model = builder.attention()
    model.graph.node[0].name = "layers.0/SampleAttention"
    out, _ = running.rewritten(running.save(model, tmp_path))
    names = [n.name for n in onnx.load(out).graph.node]
    assert "layers.0/SampleAttention_1" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("repeat", [True, False])
def test_a_longer_padding_mask_is_cut(repeat: bool, tmp_path: Path) -> None:
    """A mask buffer may be longer than the keys (`total`), and hold one row for the whole batch."""

    def from_buffer(b: builder.Builder, t: builder.Tensors) -> str:
        buffer = b.input("buffer", [1 if repeat else "batch", "total"], TensorProto.BOOL)
        used = b.op("Slice", buffer, b.const([0]), b.dim(t.k, 2), b.const([1]))
        return b.op("And", builder.causal(b, t), b.op("Unsqueeze", used, b.const([1, 2])))

    def gathered(b: builder.Builder, t: builder.Tensors) -> str:
        buffer = b.input("buffer", [1 if repeat else "batch", "total"], TensorProto.BOOL)
        used = b.op("Gather", buffer, b.op("Range", b.const(0), b.scalar(t.k, 2), b.const(1)), axis=1)
        return b.op("And", builder.causal(b, t), b.op("Unsqueeze", used, b.const([1, 2])))

    model = builder.attention(Spelling(mask=gathered))
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.mask.keys is not None
    assert (site.mask.keys.tensor, site.mask.keys.cut, site.mask.keys.repeat) == ("buffer", True, repeat)
    out, _ = running.rewritten(path)
    model.graph.input[-1].type.tensor_type.shape.dim[1].dim_value = 64
    data = builder.feeds(model, 3, 9, 14)
    data["buffer"] = np.random.default_rng(0).random((1 if repeat else 3, 64)) < 0.7
    data["buffer"][:, :15] = True
    real = np.broadcast_to(data["buffer"][:, 14:23], (3, 9))
    assert running.largest_difference(running.Session(path)(data)["result"], running.Session(out)(data)["result"], real) < 2e-6
    # A Slice to the keys gives as many of them, or what it is joined with fails.
    path = running.save(builder.attention(Spelling(mask=from_buffer)), tmp_path, "sliced.onnx")
    (site,) = inspect(path).sites
    assert site.mask.keys is not None
    assert (site.mask.keys.tensor, site.mask.keys.cut) == ("buffer", True)
    out, _ = running.rewritten(path)
    assert running.largest_difference(running.Session(path)(data)["result"], running.Session(out)(data)["result"], real) < 2e-6


@pytest.mark.parametrize(
    ("test", "expected"),
    [("Not", "zero"), ("NotEqual", "!="), ("Equal", "=="), ("Greater", ">="), ("LessOrEqual", "<=")],
)
def test_padding_told_by_a_comparison(test: str, expected: str, tmp_path: Path) -> None:
    """Keys are real where the token is (not) some number."""

    def compared(b: builder.Builder, t: builder.Tensors) -> str:
        if test == "Not":
            keys = b.op("Not", b.op("Cast", t.mask, to=TensorProto.BOOL))
        elif test == "NotEqual":
            keys = b.op("Not", b.op("Equal", t.mask, b.const(5)))
        else:
            keys = b.op(test, t.mask, b.const(1))
        return b.op("And", builder.causal(b, t), b.op("Unsqueeze", keys, b.const([1, 2])))

    model = builder.attention(Spelling(mask=compared))
    path = running.save(model, tmp_path)
    (site,) = inspect(path).sites
    assert site.mask.keys is not None
    assert site.mask.keys.test == expected
    out, _ = running.rewritten(path)
    data = builder.feeds(model, 3, 9, 14)
    data["attention_mask"] = np.random.default_rng(0).integers(0, 7, (3, 23))
    keys = {
        "Not": lambda m: m == 0,
        "NotEqual": lambda m: m != 5,
        "Equal": lambda m: m == 1,
        "Greater": lambda m: m > 1,
        "LessOrEqual": lambda m: m <= 1,
    }[test]
    good = {"Not": 0, "NotEqual": 1, "Equal": 1, "Greater": 4, "LessOrEqual": 0}[test]
    data["attention_mask"][:, 0] = good
    real = running.real_rows(keys(data["attention_mask"]), 9)
    assert real.any()
    assert running.largest_difference(running.Session(path)(data)["result"], running.Session(out)(data)["result"], real) < 2e-6


def test_nothing_matched(tmp_path: Path) -> None:
    path = running.save(builder.attention(Spelling(mask=None)), tmp_path)
    out = tmp_path / "out.onnx"
    report = rewrite(path, out)
    assert (report.ok, report.rewritten, report.output) == (False, 0, None)
    assert "0 of 1 attention site rewritten; nothing was changed" in report.as_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx"]
    assert rewrite(path, out, allow_no_match=True).output == out
    assert onnx.load(out).SerializeToString() == onnx.load(path).SerializeToString()


def test_the_report_names_every_site_once(tmp_path: Path) -> None:
    path = running.save(two_layers(Spelling(mask=builder.padding)), tmp_path)
    _, report = running.rewritten(path)
    rows = json.loads(report.as_json())["sites"]
    assert [(r["id"], r["status"]) for r in rows] == [("layers.0", "rewritten"), ("layers.1", "declined")]
    assert rows[0]["settings"]["alpha"] == 1.0
    assert rows[0]["mask"] == "causal+padding"
    assert rows[0]["evidence"][0] == "mask proved: kv <= past + q and attention_mask[b, kv] != 0."
    assert "not causal" in rows[1]["reason"]
    assert rows[1]["stopped_by"].startswith("Add l1_Add_")
    text = report.as_text()
    assert "layers.0" in text
    assert "declined layers.1 (softmax core): its mask is not causal" in text
    assert "kv <= past + q" in inspect(path).as_text(explain=True)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    path = running.save(builder.attention(), tmp_path)
    content = path.read_bytes()
    taken = tmp_path / "taken.onnx"
    taken.write_text("mine")
    for out, sentence in (
        (taken, "exists; choose another name, or pass --force"),
        (path, "is the model itself"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.onnx", "does not exist; make it"),
    ):
        with pytest.raises(GraphError, match=sentence):
            rewrite(path, out)
    with pytest.raises(GraphError, match="is the model itself"):
        rewrite(path, path, force=True)
    assert taken.read_text() == "mine"
    assert path.read_bytes() == content
    assert rewrite(path, taken, force=True).ok
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "taken.onnx"]


def test_a_wrong_config_stops_before_the_model_is_read(tmp_path: Path) -> None:
    config = tmp_path / "attention.yaml"
    config.write_text("version: 1\ndefaults: {alpha: 2}\n")
    with pytest.raises(GraphError, match=r"attention\.yaml, line 2, defaults: alpha is 2"):
        rewrite(tmp_path / "missing.onnx", tmp_path / "out.onnx", config)


def test_the_file_that_inspect_writes_is_taken(tmp_path: Path) -> None:
    path = running.save(two_layers(), tmp_path)
    defaults = Policy(policy="residue")
    config = write_config(tmp_path / "attention.yaml", inspect(path).sites, defaults, overrides={"layers.0": {"policy": "dense"}})
    assert [p.policy for p in rewrite(path, tmp_path / "out.onnx", config).policies.values()] == ["dense", "residue"]


@pytest.mark.parametrize("content", [b"", b"hello, this is text", os.urandom(4096), b"\x08\x07"])
def test_files_that_are_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"model\.onnx (cannot be read as an ONNX model|holds no ONNX graph)"):
        inspect(path)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="is not a file; give the path of an ONNX model"):
        inspect(tmp_path / "model.onnx")


def test_a_model_that_the_checker_refuses(tmp_path: Path) -> None:
    model = builder.attention()
    model.graph.node[-1].attribute.add(name="surprise", i=1, type=onnx.AttributeProto.INT)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="does not pass ONNX's checker as it is"):
        rewrite(path, tmp_path / "out.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx"]


def test_other_domains_survive(tmp_path: Path) -> None:
    model = builder.attention()
    model.graph.node.append(helper.make_node("QuickGelu", ["query"], ["activated"], domain="com.microsoft"))
    model.graph.output.append(helper.make_tensor_value_info("activated", TensorProto.FLOAT, [None] * 4))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    out, _ = running.rewritten(running.save(model, tmp_path))
    after = onnx.load(out)
    assert {o.domain: o.version for o in after.opset_import} == {"": 20, "com.microsoft": 1, DOMAIN: 1}
    running.Session(out)
