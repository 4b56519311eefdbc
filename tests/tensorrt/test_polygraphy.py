"""polygraphy both ways: its tools on our files and folders, and our comparison through its Comparator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from sa_export.errors import UserError
from sa_export.tensorrt import POLYGRAPHY_PLUGINS
from sa_export.tensorrt.child import run_task
from sa_export.tensorrt.compare import compare, engine_runner, profile_for, result_text
from tests.tensorrt.engines import SITES, exported, needs_rtx, rewritten
from tests.tensorrt.one_node import one_node

ROOT = Path(__file__).resolve().parents[2]


def polygraphy(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The polygraphy of this Python."""
    code = "import sys; from polygraphy.tools._main import main; sys.exit(main())"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_plugin_list_match_replace(tmp_path: Path) -> None:
    """The sites of `inspect`, and after `replace` the nodes of `rewrite` to the attribute."""
    model = exported()
    listed = polygraphy("plugin", "list", str(model), "--plugin-dir", str(POLYGRAPHY_PLUGINS), cwd=tmp_path)
    assert "{'SampleAttention': 6}" in listed.stdout, listed.stdout + listed.stderr
    config = tmp_path / "config.yaml"
    matched = polygraphy("plugin", "match", str(model), "--plugin-dir", str(POLYGRAPHY_PLUGINS), "-o", str(config), cwd=tmp_path)
    assert matched.returncode == 0, matched.stderr
    (found,) = yaml.safe_load_all(config.read_text())
    assert found["name"] == found["op"] == "SampleAttention"
    assert len(found["instances"]) == SITES
    found["instances"][1]["attributes"]["alpha"] = [0.5]
    config.write_text(yaml.safe_dump(found))
    replaced = tmp_path / "replaced.onnx"
    done = polygraphy(
        "plugin", "replace", str(model), "--plugin-dir", str(POLYGRAPHY_PLUGINS), "--config", str(config), "-o", str(replaced), cwd=tmp_path
    )
    assert f"replaced {SITES} instances" in done.stdout, done.stdout + done.stderr
    ours, theirs = (onnx.load(path, load_external_data=False).graph for path in (rewritten(), replaced))
    assert Counter(n.op_type for n in theirs.node) - Counter(n.op_type for n in ours.node) <= Counter(Cast=SITES, Constant=SITES)

    def nodes(graph: onnx.GraphProto) -> list[dict[str, Any]]:
        made = [n for n in graph.node if n.op_type == "SampleAttention"]
        assert {n.domain for n in made} == {"sample_attention"}
        return [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} | {"output": n.output[0]} for n in made]

    expected = nodes(ours)
    expected[1]["alpha"] = [0.5]
    assert nodes(theirs) == expected


@needs_rtx
def test_replaced_model_parses_with_the_plugin(plugin_library: Path, tmp_path: Path) -> None:
    import onnx_graphsurgeon as gs

    from graph_passes.in_memory import replace_site, sites_of
    from graph_passes.op import Policy

    model = onnx.load(exported())
    for site in sites_of(gs.import_onnx(model)):
        graph = gs.import_onnx(model)
        assert replace_site(graph, site.output, Policy())
        model = gs.export_onnx(graph)
    path = tmp_path / "replaced.onnx"
    onnx.save(model, path)
    answer = run_task("tensorrt_rtx", "parse", {"model": str(path), "plugin": str(plugin_library)})
    assert answer.result["ok"]
    assert answer.result["plugin_layers"] == SITES


@pytest.mark.parametrize("frozen", ["", "ort-transformers/llama"])
def test_a_tensor_that_is_no_site_changes_nothing(frozen: str) -> None:
    """Fused operators, which are taken apart to be looked at, included; finding the sites changes nothing either."""
    import onnx_graphsurgeon as gs

    from graph_passes.in_memory import replace_site, sites_of
    from graph_passes.op import Policy
    from tests.data.frozen import GRAPHS, thaw

    model = onnx.load(exported(), load_external_data=False)
    if frozen:
        model = onnx.load_from_string(thaw(GRAPHS / f"{frozen}.onnx.xz"))
    graph = gs.import_onnx(model)
    before = gs.export_onnx(graph, do_type_check=False).SerializeToString()
    assert sites_of(graph)
    assert gs.export_onnx(graph, do_type_check=False).SerializeToString() == before
    assert not replace_site(graph, "logits", Policy())
    assert gs.export_onnx(graph, do_type_check=False).SerializeToString() == before


def test_pluginref_against_the_function_body(tmp_path: Path) -> None:
    """`polygraphy run --pluginref --onnxrt` on one node; polygraphy finds the reference through the entry point of pyproject.toml."""
    model, feeds = one_node()
    onnx.save(model, tmp_path / "one.onnx")
    from polygraphy.json import save_json

    save_json([feeds], str(tmp_path / "inputs.json"))
    arguments = ["run", "one.onnx", "--pluginref", "--onnxrt", "--load-inputs", "inputs.json", "--atol", "1e-5", "--rtol", "1e-4"]
    without = polygraphy(*arguments, cwd=tmp_path) if not _entry_point_is_installed() else None
    if without is not None:
        assert "does not have a reference implementation registered" in without.stdout + without.stderr
    done = polygraphy(*arguments, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), str(_entry_point(tmp_path))]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def _entry_point_is_installed() -> bool:
    from importlib import metadata

    return bool(metadata.entry_points(group="polygraphy.run.plugins"))


def _entry_point(tmp_path: Path) -> Path:
    """Metadata of a package with the entry point that pyproject.toml declares, as an installation writes it."""
    folder = tmp_path / "site" / "sa_export_entry-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sa-export-entry\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("[polygraphy.run.plugins]\nsample_attention = sa_export.tensorrt.pluginref:extension\n")
    return folder.parent


@needs_rtx
def test_polygraphy_convert_takes_the_plugin_as_it_is(plugin_library: Path, tmp_path: Path) -> None:
    """`--plugins` is a plain dlopen; the library registers itself."""
    from sa_export.tensorrt.runtime import environment

    model, _ = one_node(dtype=onnx.TensorProto.FLOAT16)
    onnx.save(model, tmp_path / "one.onnx")
    shapes = [f"{n}:[1,{h},{{}},32]" for n, h in (("query", 4), ("key", 2), ("value", 2))]
    arguments = ["convert", "one.onnx", "--convert-to", "trt", "-o", "one.plan", "--compute-capabilities", "8.6", "-v"]
    for flag, length in (("min", 1), ("opt", 300), ("max", 512)):
        arguments += [f"--trt-{flag}-shapes", *(s.format(length) for s in shapes)]
    with environment("tensorrt_rtx") as variables:
        done = polygraphy(
            *arguments,
            "--plugins",
            str(plugin_library),
            cwd=tmp_path,
            **{k: variables[k] for k in ("LD_LIBRARY_PATH", "POLYGRAPHY_USE_TENSORRT_RTX")},
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "one.plan").stat().st_size > 1000


@pytest.fixture
def described(tmp_path: Path) -> Callable[[str, Path], Path]:
    """Makes an "engine": its description beside an empty file. A runner of ONNX Runtime stands in for TensorRT's in these tests."""
    from sa_export.tensorrt.profiles import Limits, profiles_of

    def make(name: str, model: Path) -> Path:
        engine = tmp_path / f"{name}.plan"
        engine.write_bytes(b"")
        profiles = json.loads(json.dumps([p.as_dict() for p in profiles_of(model, Limits(max_seq=512))]))
        value = {"schema": 1, "model": str(model), "runtime": "tensorrt", "plugin": None, "sites": [], "profiles": profiles}
        Path(f"{engine}.json").write_text(json.dumps(value))
        return engine

    return make


def stand_in(name: str, engine: Path) -> Any:
    """Runs the ONNX file that an engine was built from."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    from sa_export.check.decoder import open_session
    from sa_export.tensorrt.build import read_description

    return OnnxrtRunner(lambda: open_session(Path(read_description(engine)["model"])), name=name)


def test_compare_saves_what_polygraphy_repeats(described: Callable[[str, Path], Path], tmp_path: Path) -> None:
    from sa_export.check.run import CheckOptions

    options = CheckOptions(lengths=(320,), prompts=2, needles=2, greedy_tokens=4)
    full = exported("float32")
    results = compare(
        full,
        [("same", described("same", rewritten("float32")))],
        tmp_path / "out",
        options,
        tokenizer_folder=full.parent,
        open_runner=stand_in,
    )
    (same,) = results
    assert same.ok
    assert same.top1 == 1
    assert same.kl_mean < 1e-6
    assert same.greedy_same == 4
    assert same.recalled == same.recalled_full
    assert same.needles == 4
    assert "ok" in result_text(results)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["engines.json", "full_outputs.json", "inputs.json", "polygraphy.sh"]
    assert json.loads((tmp_path / "out/engines.json").read_text())["results"][0]["ok"] is True
    # What was saved is what polygraphy loads: the same model passes, another one does not.
    saved = ["--load-inputs", "inputs.json", "--load-outputs", "full_outputs.json", "--check-error-stat", "median"]
    assert polygraphy("run", str(full), "--onnxrt", *saved, cwd=tmp_path / "out").returncode == 0
    other = _halved(full)
    assert polygraphy("run", str(other), "--onnxrt", *saved, cwd=tmp_path / "out").returncode == 1
    script = (tmp_path / "out/polygraphy.sh").read_text()
    assert "polygraphy" in script
    assert "../same.plan" in script
    assert "--load-outputs full_outputs.json" in script


def test_compare_misses_its_gates(described: Callable[[str, Path], Path], tmp_path: Path) -> None:
    from sa_export.check.run import CheckOptions

    full = exported("float32")
    options = CheckOptions(lengths=(320,), prompts=1, needles=0, greedy_tokens=0)
    engines = [("wrong", described("wrong", _halved(full)))]
    (wrong,) = compare(full, engines, tmp_path / "out", options, tokenizer_folder=full.parent, open_runner=stand_in)
    assert not wrong.ok
    assert "missed: " in result_text([wrong])


def _halved(full: Path) -> Path:
    """The model with logits of the wrong sign and half the size."""
    model = onnx.load(full, load_external_data=False)
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[0] = "right"
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["minus_half"], value_float=-0.5))
    model.graph.node.append(onnx.helper.make_node("Mul", ["right", "minus_half"], ["logits"]))
    path = full.with_name("halved.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def test_the_profile_of_a_call(described: Callable[[str, Path], Path]) -> None:
    from sa_export.check.decoder import DecoderInputs, feed
    from sa_export.tensorrt.build import read_description

    inputs = DecoderInputs.from_model(exported())
    description = read_description(described("m", exported()))

    def profile(tokens: int, cached: int) -> int:
        past = {n: np.zeros((1, heads, cached, size), kind) for n, (heads, size, kind) in inputs.past.items()}
        values = feed(inputs, np.ones((1, tokens), np.int64), past=past)
        return profile_for(description, {n: v.shape for n, v in values.items()})

    assert [profile(300, 0), profile(40, 200), profile(1, 300)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"has no profile for input_ids 1x600.*--max-seq-len"):
        profile(600, 0)


def test_an_engine_needs_its_runtime_and_a_gpu(described: Callable[[str, Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; give an engine that `sa-export build` wrote"):
        engine_runner("m", tmp_path / "none.plan")
    engine = described("m", exported())
    with pytest.raises(UserError, match=r"tensorrt is not installed|no NVIDIA driver"):
        engine_runner("m", engine)
    Path(f"{engine}.json").write_text("{}")
    with pytest.raises(UserError, match="is missing or of another version"):
        engine_runner("m", engine)
