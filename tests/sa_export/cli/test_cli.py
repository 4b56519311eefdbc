"""The command line as a user meets it: help at once, one sentence for bad input, exit status, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sa_export.check.result import CheckResult
from sa_export.cli.main import VERBS, main
from tests.sa_export.conftest import SAMPLE, Converted


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)"""
    capsys.readouterr()
    try:
        status = main([str(a) for a in argv])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 2) -> str:
    """The one sentence that a refused command ends with."""
    got, _, err = run(capsys, *argv)
    assert got == status, err
    assert "Traceback" not in err
    lines = [line for line in err.strip().splitlines() if not line.startswith("...")]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"sa-export {argv[0]}: ")
    return lines[0]


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "sa_export", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 0.3


def test_every_verb_has_help_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sa_export.cli.main import build_parser\nbuild_parser()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'polygraphy', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[0] == 2
    assert run(capsys, "frobnicate")[0] == 2
    assert run(capsys, "export", "--model", "x")[0] == 2  # no output
    assert run(capsys, "--version")[0] == 0


def test_underscores_and_hyphens_are_one(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path) -> None:
    for spelling in ("--min-length", "--min_length"):
        status, _, err = run(capsys, "rewrite", converted.full, "-o", converted.folder / "spelled.onnx", spelling, "300", "--force")
        assert status == 0, err
        model = onnx.load(converted.folder / "spelled.onnx", load_external_data=False)
        (converted.folder / "spelled.onnx").unlink()
        node = next(n for n in model.graph.node if n.op_type == "SampleAttention")
        assert next(a.i for a in node.attribute if a.name == "min_length") == 300


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["packages"]["onnxruntime"]["version"]
    assert found["packages"]["tensorrt"]["get"].startswith("pip install")
    assert "onnxruntime" in run(capsys, "doctor")[1]


def test_convert_makes_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["convert", "--model", SAMPLE, "--dtype", "fp32", "--output", out, "--no-verify", "--min-length", 256, "--alpha", 0.95]
    command += ["--lengths", 768, "--prompts", 1, "--needles", 4, "--greedy-tokens", 4, "--max-loss", 0.5, "--max-kl", 1, "--min-top1", 0.5]
    status, text, err = run(capsys, *command)
    assert status == 0, err
    assert "6 of 6 attention sites rewritten" in text
    assert "768" in text
    assert f"report: {out / 'check' / 'report.html'}" in text
    assert {p.name for p in out.iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "model.sa.onnx",
        "attention.yaml",
        "rewrite.json",
        "check",
        "tokenizer.json",
    }
    assert json.loads((out / "check" / "check.json").read_text())["candidates"][0]["settings"]["layers.0/SampleAttention"]["alpha"] == 0.95
    # A second run needs --force, and with it replaces all of the first.
    before = (out / "model.onnx").stat().st_mtime_ns
    assert "--force" in refused(capsys, *command)
    assert (out / "model.onnx").stat().st_mtime_ns == before
    status, text, err = run(capsys, *command, "--force", "--no-check", "--json")
    assert status == 0, err
    assert json.loads(text)["rewrite"]["sites"][0]["status"] == "rewritten"
    assert not (out / "check").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_inspect_edit_rewrite(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path) -> None:
    yaml = tmp_path / "attention.yaml"
    status, text, err = run(capsys, "inspect", converted.full, "-o", yaml, "--policy", "residue", "--alpha", 0.8)
    assert status == 0, err
    assert "6 sites can be rewritten" in text
    assert "policy: residue" in yaml.read_text()
    assert "attention.yaml" in refused(capsys, "inspect", converted.full, "-o", yaml)  # exists
    yaml.write_text(yaml.read_text().replace("id: layers.2", "id: layers.2\n    policy: dense", 1))
    out = converted.folder / "edited.sa.onnx"
    try:
        status, text, err = run(capsys, "rewrite", converted.full, "-o", out, "--config", yaml, "--json")
        assert status == 0, err
        policies = {
            n.name: next(a.s for a in n.attribute if a.name == "policy")
            for n in onnx.load(out, load_external_data=False).graph.node
            if n.op_type == "SampleAttention"
        }
        assert policies["layers.2/SampleAttention"] == b"dense"
        assert policies["layers.3/SampleAttention"] == b"residue"
        assert "edited.sa.onnx" in refused(capsys, "rewrite", converted.full, "-o", out)  # exists
    finally:
        out.unlink(missing_ok=True)


def test_rewrite_standard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Operators of ONNX Runtime stay without the option, which the lint names, and go with it."""
    from tests.data.frozen import GRAPHS, thaw

    path = tmp_path / "model.onnx"
    path.write_bytes(thaw(GRAPHS / "genai-fp16-cpu" / "llama.onnx.xz"))
    for options, left in (([], True), (["--standard"], False)):
        out = tmp_path / f"{left}.onnx"
        status, text, err = run(capsys, "rewrite", path, "-o", out, *options)
        assert status == 0, err
        nodes = onnx.load(out).graph.node
        assert any(n.domain == "com.microsoft" for n in nodes) == left
        assert sum(n.op_type == "SampleAttention" for n in nodes) == 2
        if "TensorRT's parser" in text:
            assert ("add --standard" in text) == left


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("version: 1\ndefaults:\n  alhpa: 0.9\n", "alpha"),
        ("version: 1\ndefaults:\n  alpha: much\n", "alpha is 'much'"),
        ("version: 1\ndefaults:\n  alpha: 1.5\n", "alpha is 1.5"),
        ("version: 1\ndefaults:\n  alpha: 0\n", "alpha is 0"),
        ("version: 1\nsites:\n  - id: layers.77\n", "layers.77"),
        ("version: 9\n", "version"),
        ("version: [", "attention.yaml"),
    ],
)
def test_a_bad_attention_yaml(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "attention.yaml").write_text(text)
    line = refused(capsys, "rewrite", converted.full, "-o", tmp_path / "x.onnx", "--config", tmp_path / "attention.yaml")
    assert sentence in line
    assert "attention.yaml" in line
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("alpha", ["0", "-0.5", "1.01", "nan"])
def test_alpha_outside_its_range(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path, alpha: str) -> None:
    assert "in (0, 1]" in refused(capsys, "rewrite", converted.full, "-o", tmp_path / "x.onnx", "--alpha", alpha)


def test_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, "export", "--model", tmp_path / "empty", "-o", tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(SAMPLE, broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(5_000_000)
    line = refused(capsys, "export", "--model", broken, "-o", tmp_path / "out")
    assert "model.safetensors" in line
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "architectures": ["BertModel"],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 32,
                "vocab_size": 50,
            }
        )
    )
    assert "decoder" in refused(capsys, "export", "--model", encoder, "-o", tmp_path / "out", "--random-weights")
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "empty", "encoder"]


def test_missing_external_data(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path) -> None:
    shutil.copy(converted.full, tmp_path / "model.onnx")
    for verb in ("inspect", "rewrite"):
        assert "model.onnx.data" in refused(capsys, verb, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    (tmp_path / "text.onnx").write_text("this is no model")
    assert "text.onnx" in refused(capsys, "inspect", tmp_path / "text.onnx")
    assert "no.onnx" in refused(capsys, "inspect", tmp_path / "no.onnx")


def bidirectional(path: Path) -> None:
    """softmax(q k^T) v with nothing masked."""
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], name="encoder_softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4, "T", 16]) for n in "qkv"]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4, "T", 16])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def test_an_encoder_graph_is_declined_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bidirectional(tmp_path / "encoder.onnx")
    status, text, _ = run(capsys, "inspect", tmp_path / "encoder.onnx")
    assert status == 1
    assert "encoder_softmax" in text
    assert "mask" in text
    status, text, err = run(capsys, "rewrite", tmp_path / "encoder.onnx")
    assert status == 1
    assert "no attention site was rewritten" in err
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]


def test_sliding_windows_and_sinks_stay_dense(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A model with windowed and full layers: the full ones are rewritten, the others are declined and still right."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config |= {
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    status, _, err = run(
        capsys,
        "convert",
        "--model",
        folder,
        "--random-weights",
        "--dtype",
        "fp32",
        "-o",
        out,
        "--no-check",
        "--min-length",
        64,
        "--no-verify",
    )
    assert status == 0, err
    sites = json.loads((out / "rewrite.json").read_text())["sites"]
    assert sorted(s["status"] for s in sites) == ["declined", "rewritten"]
    reason = next(s["reason"] for s in sites if s["status"] == "declined")
    assert "window" in reason or "causal" in reason
    import onnxruntime as ort

    from sa_export.check.decoder import DecoderInputs, feed
    from sa_export.check.exactness import with_alpha_one

    ids = np.random.default_rng(0).integers(1, 128, (2, 200))
    values = feed(DecoderInputs.from_model(out / "model.onnx"), ids)
    full = ort.InferenceSession(str(out / "model.onnx")).run(["logits"], values)[0]
    (out / "one.onnx").write_bytes(with_alpha_one(out / "model.sa.onnx"))
    np.testing.assert_allclose(
        ort.InferenceSession(str(out / "one.onnx")).run(["logits"], values)[0], full, rtol=0, atol=1e-4 * np.abs(full).max()
    )


def test_convert_refuses_before_it_exports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "8704" in refused(capsys, "convert", "--model", SAMPLE, "-o", tmp_path / "out", "--lengths", 20000)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(SAMPLE / "config.json", bare)
    assert "tokenizer" in refused(capsys, "convert", "--model", bare, "-o", tmp_path / "out", "--random-weights")
    assert not (tmp_path / "out").exists()


def test_convert_keeps_the_overrides_of_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    yaml = tmp_path / "attention.yaml"
    yaml.write_text("version: 1\ndefaults:\n  alpha: 0.8\nsites:\n  - id: layers.1\n    policy: dense\n  - id: layers.2\n    skip: true\n")
    command = ["convert", "--model", SAMPLE, "--dtype", "fp32", "-o", tmp_path / "out", "--no-verify", "--no-check", "--config", yaml]
    status, _, err = run(capsys, *command)
    assert status == 0, err
    from graph_passes.config import load_config

    config = load_config(tmp_path / "out" / "attention.yaml")
    assert config.defaults.alpha == (0.8,)
    entries = {e.id: e for e in config.entries}
    assert entries["layers.1"].overrides["policy"] == "dense"
    assert entries["layers.2"].skip
    sites = json.loads((tmp_path / "out" / "rewrite.json").read_text())["sites"]
    assert [s["status"] for s in sites].count("rewritten") == 5


def test_a_prompt_longer_than_the_model(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path) -> None:
    line = refused(capsys, "check", converted.full, converted.rewritten, "-o", tmp_path / "check", "--lengths", 9000)
    assert "8704" in line
    assert not (tmp_path / "check").exists()


def test_an_output_folder_that_exists(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for argv in (
        ("export", "--model", SAMPLE, "-o", tmp_path / "mine", "--force"),
        ("convert", "--model", SAMPLE, "-o", tmp_path / "mine", "--force"),
        ("check", converted.full, converted.rewritten, "-o", tmp_path / "mine", "--force"),
    ):
        refused(capsys, *argv)
        assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_full_disk(capsys: pytest.CaptureFixture[str], converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(CheckResult, "write", full)
        line = refused(
            capsys,
            "check",
            converted.full,
            converted.rewritten,
            "-o",
            tmp_path / "check",
            "--lengths",
            512,
            "--prompts",
            1,
            "--needles",
            1,
            "--greedy-tokens",
            0,
        )
    assert "space" in line
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 0))  # type: ignore[attr-defined]
        assert "free" in refused(capsys, "export", "--model", SAMPLE, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "check.json" in refused(capsys, "plot", tmp_path)
