"""What is said of a model by the table, by NVIDIA's parser, and that both agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes.body.guard import GUARD
from sa_export.cli.main import main
from sa_export.tensorrt.accepted import ELEMENT_TYPES, NO_IMPORTER, OBSERVED_WITH
from sa_export.tensorrt.child import run_task
from sa_export.tensorrt.lint import Finding, Lint, lint, lint_text
from tests.tensorrt.engines import SITES, exported, needs_rtx, rewritten


@needs_rtx
@pytest.mark.parametrize("path", [rewritten, exported], ids=["rewritten", "original"])
def test_the_parser_takes_the_sample_model(path: object) -> None:
    found = lint(path())  # type: ignore[operator]
    assert found.ok
    assert found.findings == []
    assert any(p.startswith("tensorrt_rtx ") for p in found.parsers)
    assert "nothing that it refuses" in lint_text(found)


@needs_rtx
def test_table_and_parser_agree_on_operators() -> None:
    """Every standard operator; run again for the version that the table was observed with."""
    names = sorted({s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""})
    answer = run_task("tensorrt_rtx", "operators", {"names": names})
    if f"tensorrt_rtx {answer.result['version']}" != OBSERVED_WITH:
        pytest.skip(f"tensorrt_rtx {answer.result['version']} is not {OBSERVED_WITH}: the table was not compared")
    assert set(names) - set(answer.result["supported"]) == set(NO_IMPORTER) & set(names)


@needs_rtx
@pytest.mark.parametrize("kind", ["DOUBLE", "BFLOAT16", "INT16", "UINT32", "STRING", "FLOAT8E5M2"])
def test_table_and_parser_agree_on_element_types(kind: str, tmp_path: Path) -> None:
    number = TensorProto.DataType.Value(kind)
    value = [helper.make_tensor_value_info(n, number, [4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    answer = run_task("tensorrt_rtx", "parse", {"model": str(path), "plugin": None})
    assert answer.result["ok"] == (kind in ELEMENT_TYPES)


@needs_rtx
@pytest.mark.parametrize(
    ("graph", "refused"),
    [
        ("dynamo-sdpa-20-raw/llama", {"ReduceMean"}),
        ("genai-fp16-cpu/llama", {"RotaryEmbedding"}),
        ("genai-fp32-cpu/llama", {"GroupQueryAttention"}),
        ("genai-int4-cpu/llama", {"GroupQueryAttention", "MatMulNBits"}),
        ("hf-exporter-webgpu/gpt-oss", {"SkipSimplifiedLayerNormalization"}),
        ("optimum/cohere", {"NonZero"}),
        ("optimum/deepseek-v3", {"NonZero"}),
        ("optimum/glm", {"NonZero"}),
        ("optimum/qwen3-moe", {"NonZero"}),
        ("ort-transformers/llama", set()),
        ("ort-transformers/gemma2", {"FastGelu"}),
        ("sa-export-sample-20/deepseek-v3", set()),
    ],
)
def test_table_and_parser_agree_on_frozen_graphs(graph: str, refused: set[str], tmp_path: Path) -> None:
    """The parser names the first operator that it refuses, sometimes more; each of them is in the table, and none is without cause."""
    path = frozen_graph(graph, tmp_path)
    table = lint(path, ask=False)
    assert {f.op for f in table.findings if f.fatal or f.refused_by == "tensorrt_rtx"} == refused
    # The guard is there to be refused without the plugin; the operators beside it are compared.
    model = onnx.load(path)
    for guard in [f for f in model.functions if f.overload == GUARD]:
        model.functions.remove(guard)
    bare = path.with_name("bare.onnx")
    bare.write_bytes(model.SerializeToString())
    answer = run_task("tensorrt_rtx", "parse", {"model": str(bare), "plugin": None})
    version = answer.result.get("version", OBSERVED_WITH.split()[1])
    if f"tensorrt_rtx {version}" != OBSERVED_WITH:
        pytest.skip(f"tensorrt_rtx {version} is not {OBSERVED_WITH}: the table was not compared")
    said = {e["op"] for e in answer.result.get("errors", ())}
    assert said <= refused
    assert bool(said or answer.error) == bool(refused)
    assert lint(path).taken_by("tensorrt_rtx") == (not refused)


def test_the_table_says_what_standard_would_do(tmp_path: Path) -> None:
    """The hint is true: after a rewrite with --standard the nodes that it names are gone, and only those."""
    from graph_passes.pipeline import rewrite

    path = frozen_graph("genai-fp16-cpu/gpt-oss", tmp_path)
    before = lint(path, ask=False)
    hinted = {f.node for f in before.findings if "add --standard" in f.text}
    others = {f.node for f in before.findings if "no rule" in f.text}
    assert {f.op for f in before.findings if f.node in others} == {"MoE"}
    assert len(hinted) >= 8
    assert not before.taken_by("tensorrt")
    rewrite(path, tmp_path / "standard.onnx", standard=True, allow_no_match=True)
    left = {n.name for n in onnx.load(tmp_path / "standard.onnx").graph.node if n.domain == "com.microsoft"}
    assert left == others


def frozen_graph(name: str, folder: Path) -> Path:
    from tests.data.frozen import GRAPHS, thaw

    path = folder / "model.onnx"
    path.write_bytes(thaw(GRAPHS / f"{name}.onnx.xz"))
    return path


def changed(tmp_path: Path, *nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> Path:
    """The sample model with more nodes, none of which another node reads."""
    model = onnx.load(rewritten(), load_external_data=False)
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    model.functions.extend(functions)
    path = rewritten().with_name(f"{tmp_path.name}.onnx")
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("BitwiseNot", ["input_ids"], ["n"], name="twiddle"), "TensorRT has no such operator"),
        (helper.make_node("Attention", ["q", "k", "v"], ["o"], name="twiddle", softcap=5.0), "softcap is not taken"),
        (helper.make_node("Attention", ["q", "k", "v", "m"], ["o"], name="twiddle", is_causal=1), "a mask together with is_causal"),
        (helper.make_node("Attention", ["q", "k", "v", "", "p", "r"], ["o", "s", "t"], name="twiddle"), "past and present keys"),
        (helper.make_node("QuickGelu", ["input_ids"], ["n"], name="twiddle", domain="com.microsoft"), "an operator of ONNX Runtime alone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_table_names_the_node(node: onnx.NodeProto, words: str, tmp_path: Path) -> None:
    found = lint(changed(tmp_path, node), ask=False)
    assert not found.ok
    assert [f.node for f in found.findings if words in f.text] == ["twiddle"]
    assert "refused" in lint_text(found)
    assert "twiddle" in lint_text(found)


@needs_rtx
def test_the_parser_is_quoted_where_the_table_is_silent(tmp_path: Path) -> None:
    bad = helper.make_node("Conv", ["input_ids", "input_ids"], ["n"], name="odd")
    found = lint(changed(tmp_path, bad))
    assert [f.node for f in found.findings if f.fatal and f.source != "table"][:1] == ["odd"]


def two_variants() -> tuple[onnx.ModelProto, Path]:
    """The sample model with one dense node, and where it can be written beside its weights."""
    from graph_passes import body

    model = onnx.load(rewritten(), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SampleAttention")
    next(a for a in node.attribute if a.name == "policy").s = b"dense"
    body.attach(model)
    return model, rewritten().with_name("two.sa.onnx")


def test_two_bodies_without_a_guard_are_remarked_upon() -> None:
    model, path = two_variants()
    path.write_bytes(model.SerializeToString())
    assert lint(path, ask=False).findings == []
    assert model.functions[0].overload == "tensorrt_needs_the_plugin"
    del model.functions[0]
    path.write_bytes(model.SerializeToString())
    found = lint(path, ask=False)
    assert found.ok
    assert [f.text[:47] for f in found.findings] == ["the file has 2 bodies of SampleAttention (dense"]


@needs_rtx
def test_the_parser_stops_at_the_guard_without_the_plugin(plugin_library: Path) -> None:
    """Two variants: refused by name without the plugin, one plugin layer a site with it, and ONNX Runtime runs them."""
    from sa_export.check.decoder import DecoderInputs, feed, open_session

    model, path = two_variants()
    path.write_bytes(model.SerializeToString())
    refused = run_task("tensorrt_rtx", "parse", {"model": str(path), "plugin": None}).result
    assert not refused["ok"]
    assert len(refused["errors"]) == SITES
    assert all(e["node"].startswith("SampleAttention needs its plugin: load libsample_attention_trt.so") for e in refused["errors"])
    taken = run_task("tensorrt_rtx", "parse", {"model": str(path), "plugin": str(plugin_library)}).result
    assert taken["ok"]
    assert taken["plugin_layers"] == SITES
    values = feed(DecoderInputs.from_model(path), np.ones((1, 5), np.int64))
    assert np.isfinite(open_session(path).run(["logits"], values)[0]).all()


def test_a_site_that_the_plugin_cannot_take(tmp_path: Path) -> None:
    model = onnx.load(rewritten(), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SampleAttention")
    next(a for a in node.attribute if a.name == "block_q").i = 96
    path = rewritten().with_name("odd.sa.onnx")
    path.write_bytes(model.SerializeToString())
    assert [(f.node, f.op) for f in lint(path, ask=False).findings] == [("layers.0/SampleAttention", "SampleAttention")]


def test_alike_findings_are_one_line() -> None:
    text = lint_text(Lint([Finding(f"n{i}", "Unique", "TensorRT has no such operator.") for i in range(30)], ["tensorrt 11.1"]))
    assert text.splitlines() == [
        "TensorRT's parser (tensorrt 11.1): it refuses this model",
        "  refused: Unique: TensorRT has no such operator. (n0 and 29 more)",
    ]


def test_rewrite_prints_what_the_parser_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It never fails the rewrite, and is left out where no TensorRT is installed or with --no-lint."""
    target = exported().with_name("cli.sa.onnx")
    arguments = ["rewrite", str(exported()), "-o", str(target), "--force"]
    monkeypatch.setattr("sa_export.tensorrt.runtime.installed_runtimes", list)
    assert main(arguments) == 0
    assert "TensorRT" not in capsys.readouterr().out
    monkeypatch.setattr("sa_export.tensorrt.runtime.installed_runtimes", lambda: ["one"])

    def broken(_path: Path) -> Lint:
        raise RuntimeError("it fell over")

    monkeypatch.setattr("sa_export.tensorrt.lint.lint", broken)
    assert main(arguments) == 0
    assert "could not be asked (RuntimeError: it fell over)" in capsys.readouterr().out
    monkeypatch.setattr("sa_export.tensorrt.lint.lint", lambda _path: Lint([Finding("n", "Unique", "no.")], ["tensorrt 11.1"]))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensorrt"]["ok"] is False
    assert main([*arguments, "--no-lint"]) == 0
    assert "TensorRT" not in capsys.readouterr().out
