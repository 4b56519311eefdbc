"""Engines from the real builder of TensorRT for RTX, and everything that is refused before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from sa_export.errors import UserError
from sa_export.tensorrt.build import build_engine, capabilities_of, make_plan, read_description
from sa_export.tensorrt.library import VARIABLE, find_plugin
from sa_export.tensorrt.profiles import Limits, profiles_of
from tests.tensorrt.engines import SITES, exported, needs_rtx, rewritten

LIMITS = Limits(max_batch=2, max_seq=1024)


@pytest.fixture
def plugin_file(tmp_path: Path) -> Path:
    """Stands for a plugin library where none is opened."""
    path = tmp_path / "libsample_attention_trt.so"
    path.write_bytes(b"")
    return path


@needs_rtx
@pytest.mark.parametrize(
    ("dtype", "capability"), [("float16", (8, 0)), ("float16", (8, 6)), ("float32", (8, 9)), ("bfloat16", (12, 0))], ids=str
)
def test_rewritten_model_builds_with_one_plugin_layer_a_site(
    dtype: str, capability: tuple[int, int], plugin_library: Path, tmp_path: Path
) -> None:
    model = rewritten(dtype)
    plan = make_plan(model, tmp_path / "m.plan", LIMITS, runtime="tensorrt_rtx", plugin=plugin_library, capabilities=[capability])
    heard: list[tuple[str, float | None]] = []
    built = build_engine(plan, progress=lambda *event: heard.append(event))
    assert built["plugin_layers"] == [f"layers.{i}/SampleAttention" for i in range(SITES)]
    assert (tmp_path / "m.plan").stat().st_size == built["bytes"] > 2**20
    assert read_description(tmp_path / "m.plan") == json.loads(json.dumps(built))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.plan", "m.plan.json"]
    types = {"float16": "HALF", "float32": "FLOAT", "bfloat16": "BF16"}
    assert {t["dtype"] for t in built["tensors"] if t["name"].startswith(("past", "present"))} == {types[dtype]}
    shares = [share for what, share in heard if what.startswith("build: ") and share is not None]
    assert len(shares) > 5
    assert all(0 <= share <= 1 for share in shares)


@needs_rtx
@pytest.mark.parametrize("form", ["native", "decomposed"])
def test_dense_engines_of_the_same_file(form: str, tmp_path: Path) -> None:
    plan = make_plan(rewritten(), tmp_path / "d.plan", LIMITS, runtime="tensorrt_rtx", dense=form, capabilities=[(8, 6)])
    built = build_engine(plan)
    assert built["plugin"] is None
    assert built["plugin_layers"] == []
    assert built["bytes"] > 2**20


@needs_rtx
def test_a_library_that_is_no_plugin_leaves_nothing(plugin_file: Path, tmp_path: Path) -> None:
    engine = tmp_path / "new" / "m.plan"
    plan = make_plan(rewritten(), engine, LIMITS, runtime="tensorrt_rtx", plugin=plugin_file)
    with pytest.raises(UserError, match="does not register the plugin SampleAttention version 1"):
        build_engine(plan)
    assert not engine.parent.exists()


@needs_rtx
def test_too_little_workspace_is_named_as_the_cause(plugin_library: Path, tmp_path: Path) -> None:
    plan = make_plan(
        rewritten(),
        tmp_path / "m.plan",
        Limits(max_seq=65536),
        runtime="tensorrt_rtx",
        plugin=plugin_library,
        capabilities=[(8, 6)],
        workspace_mib=1,
    )
    with pytest.raises(UserError, match="within --workspace 1 MiB, which the attention layers may exceed: raise it or leave it out"):
        build_engine(plan)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_the_parser_names_an_operator_that_it_does_not_have(tmp_path: Path) -> None:
    model = onnx.load(exported(), load_external_data=False)
    model.graph.node.insert(0, onnx.helper.make_node("BitwiseNot", ["input_ids"], ["inverted"], name="twiddle"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("inverted", onnx.TensorProto.INT64, ["batch", "sequence"]))
    path = exported().with_name("twiddled.onnx")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"parser refuses the model.*twiddle"):
        build_engine(make_plan(path, tmp_path / "m.plan", LIMITS, runtime="tensorrt_rtx"))
    assert not list(tmp_path.iterdir())


def test_profiles() -> None:
    prefill, chunk, decode = profiles_of(rewritten(), Limits(max_batch=4, max_seq=1000, max_chunk=300, opt_batch=2))
    assert [p.name for p in (prefill, chunk, decode)] == ["prefill", "chunk", "decode"]
    assert prefill.most["input_ids"] == (4, 1000)
    assert prefill.most["past_key_values.3.value"] == (4, 2, 0, 64)
    assert chunk.most == chunk.most | {"input_ids": (4, 300), "attention_mask": (4, 1299), "past_key_values.0.key": (4, 2, 999, 64)}
    assert decode.least["position_ids"] == decode.usual["position_ids"][-1:] * 2 == (1, 1)
    assert decode.most["attention_mask"] == (4, 1000)
    for profile in (prefill, chunk, decode):
        for low, mid, high in zip(profile.least.values(), profile.usual.values(), profile.most.values(), strict=True):
            assert all(a <= b <= c for a, b, c in zip(low, mid, high, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "--max-batch-size is 0"),
        ({"max_seq": 0}, "--max-seq-len is 0"),
        ({"max_seq": 100, "opt_seq": 101}, "--opt-seq-len is 101; allowed is an integer from 1 to 100"),
        ({"max_chunk": 5000}, "--max-chunk-len is 5000; allowed is an integer from 1 to 4096"),
        ({"opt_batch": 2}, "--opt-batch-size is 2; allowed is an integer from 1 to 1"),
    ],
)
def test_limits_that_make_no_sense(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Limits(**options)


def test_a_fixed_length_that_does_not_fit() -> None:
    model = onnx.load(exported(), load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 128
    path = exported().with_name("fixed.onnx")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="input_ids has the fixed length 128 where 1 is asked for"):
        profiles_of(path, LIMITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": onnx.TensorProto.DOUBLE}, "layers.0/SampleAttention: its queries are double; allowed are float16"),
        ({"block_k": 48}, "layers.0/SampleAttention: block_k is 48; allowed is one of 16, 32, 64, 128, 256"),
        ({"alpha": [0.5, 0.5, 0.5]}, "alpha has 3 values, but the site has 4 query heads"),
        ({"sample_rows": 0}, "sample_rows is 0"),
        ({"window": None}, "it lacks the attribute window"),
        ({"outputs": 2}, "it makes a certificate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_site_that_the_plugin_cannot_take(change: dict[str, object], words: str, plugin_file: Path, tmp_path: Path) -> None:
    model = onnx.load(rewritten(), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SampleAttention")
    (name, value), *_ = change.items()
    if name == "dtype":
        cast = onnx.helper.make_node("Cast", [node.input[0]], ["wide"], to=value)
        model.graph.node.insert(list(model.graph.node).index(node), cast)
        node.input[0] = "wide"
    elif name == "outputs":
        node.output.append("certificate")
    else:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [onnx.helper.make_attribute(name, value)])])
    path = rewritten().with_name("changed.sa.onnx")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=words):
        make_plan(path, tmp_path / "m.plan", LIMITS, runtime="tensorrt_rtx", plugin=plugin_file)


def test_what_is_asked_of_the_wrong_model_or_runtime(plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "m.plan"
    with pytest.raises(UserError, match="is dense as it stands"):
        make_plan(exported(), engine, LIMITS, dense="native")
    monkeypatch.setattr("sa_export.tensorrt.runtime.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"tensorrt is not installed: pip install 'sa-export\[tensorrt\]'"):
        make_plan(rewritten(), engine, LIMITS, plugin=plugin_file)
    monkeypatch.setattr("sa_export.tensorrt.runtime.util.find_spec", lambda _name: object())
    monkeypatch.setattr("sa_export.tensorrt.runtime.installed", lambda _name: "10.9.0.34")
    with pytest.raises(UserError, match=r"tensorrt is version 10\.9\.0\.34; allowed is 10\.15 or newer"):
        make_plan(rewritten(), engine, LIMITS, plugin=plugin_file)
    monkeypatch.setattr("sa_export.tensorrt.runtime.installed", lambda _name: "11.1.0.106")
    with pytest.raises(UserError, match="--compute-capability is for --runtime tensorrt_rtx"):
        make_plan(rewritten(), engine, LIMITS, plugin=plugin_file, capabilities=[(8, 6)])
    monkeypatch.setattr("sa_export.tensorrt.runtime.installed", lambda _name: "1.7.1.116")
    with pytest.raises(UserError, match=r"--compute-capability is 7\.0; allowed are 7\.5 and newer"):
        make_plan(rewritten(), engine, LIMITS, runtime="tensorrt_rtx", plugin=plugin_file, capabilities=[(7, 0)])
    with pytest.raises(UserError, match=r"--timing-cache .*/none/t: the folder .* does not exist"):
        make_plan(rewritten(), engine, LIMITS, runtime="tensorrt_rtx", plugin=plugin_file, timing_cache=tmp_path / "none/t")
    with pytest.raises(UserError, match="--workspace is 0; allowed is an integer >= 1"):
        make_plan(rewritten(), engine, LIMITS, runtime="tensorrt_rtx", plugin=plugin_file, workspace_mib=0)


def test_compute_capabilities() -> None:
    assert capabilities_of(["8.6", "89", "sm_120"]) == ((8, 6), (8, 9), (12, 0))
    with pytest.raises(UserError, match="is 'Ada'"):
        capabilities_of(["Ada"])


def test_where_the_plugin_is(plugin_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sa_export.tensorrt.library.__file__", str(tmp_path / "sa_export/tensorrt/library.py"))
    with pytest.raises(UserError, match="The TensorRT plugin is not built"):
        find_plugin()
    (tmp_path / "sa_export/lib").mkdir(parents=True)
    installed = plugin_file.rename(tmp_path / "sa_export/lib/libsample_attention_trt.so")
    assert find_plugin() == installed
    other = tmp_path / "other.so"
    monkeypatch.setenv(VARIABLE, str(other))
    with pytest.raises(UserError, match=rf"{VARIABLE} is .* not a file"):
        find_plugin()
    other.write_bytes(b"")
    assert find_plugin() == other
    assert find_plugin(installed) == installed


def test_an_engine_is_not_overwritten(plugin_file: Path, tmp_path: Path) -> None:
    (tmp_path / "m.plan.json").write_text("mine")
    with pytest.raises(UserError, match=r"m\.plan\.json exists; choose another name, or replace it with --force"):
        build_engine(make_plan(exported(), tmp_path / "m.plan", LIMITS, runtime=_any_runtime()))
    assert (tmp_path / "m.plan.json").read_text() == "mine"


def _any_runtime() -> str:
    from sa_export.tensorrt.runtime import installed_runtimes

    found = installed_runtimes()
    if not found:
        pytest.skip("no TensorRT is installed: the builder was not reached; pip install tensorrt-rtx==1.7.1.116")
    return found[0].name
