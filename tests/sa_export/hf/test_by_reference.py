"""Exports that neither read nor copy weights: by reference, from a configuration alone, and weights that are attached later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graph_passes import external_data
from graph_passes.errors import GraphError
from graph_passes.pipeline import inspect, rewrite
from sa_export.cli.main import main
from sa_export.errors import UserError
from sa_export.hf.attach import attach_weights
from sa_export.hf.export import export_onnx
from sa_export.hf.load import load_checkpoint
from tests.sa_export.hf.models import Session, save_checkpoint

IDS = np.random.default_rng(5).integers(3, 96, (2, 21))
MASK = np.ones_like(IDS)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint in several files, its embedding tied to its output projection."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = save_checkpoint(tmp_path_factory.mktemp("tied") / "checkpoint", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint"
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def pending(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export of `sharded`'s configuration alone."""
    folder = tmp_path_factory.mktemp("pending") / "out"
    result = export_onnx(load_checkpoint(sharded, from_config=True), folder)
    assert (result.verification, result.weights.how, result.data_path) == (None, "none", None)
    return folder


def torch_logits(folder: Path, dtype: str = "float32") -> np.ndarray:
    import torch

    model = load_checkpoint(folder, dtype=dtype).model
    with torch.no_grad():
        return model(torch.from_numpy(IDS), use_cache=False).logits.float().numpy()


def stamps(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino, p.read_bytes()) for p in folder.glob("*") if p.is_file()}


def test_by_reference_in_the_checkpoints_folder(sharded: Path, pending: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(sharded, folder)
    before = stamps(folder)
    result = export_onnx(load_checkpoint(folder, deferred=True), folder)
    after = stamps(folder)
    assert {name: after[name] for name in before} == before, "the checkpoint is left as it was"
    assert set(after) - set(before) == {"model.onnx", "export.json"}
    assert (result.weights.how, result.weights.written, result.weights.converted) == ("reference", 0, 0)
    assert result.weights.referenced == result.weight_bytes - 2 * 6 * 4, "all but two copies of six rotary frequencies"
    assert result.verification is not None
    onnx.checker.check_model(str(result.model_path))
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    loaded = onnx.load(result.model_path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in loaded.graph.initializer if t.name in stored}
    assert set(weights) == set(stored)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, stored[name])
    got = Session(result.model_path).step(IDS, MASK)
    want = torch_logits(folder)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()

    # The same graph comes from the configuration alone: all but the place of the weights is equal.
    ours, theirs = (onnx.load(p / "model.onnx", load_external_data=False) for p in (folder, pending))
    for model in (ours, theirs):
        del model.metadata_props[:]
        for item in external_data.external_tensors(model):
            del item.tensor.external_data[:]
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)

    # A second export refuses, replaces when told to, and leaves the first in place when it fails.
    first = (folder / "model.onnx").read_bytes()
    with pytest.raises(UserError, match="holds an export"):
        export_onnx(load_checkpoint(folder, deferred=True), folder)
    checkpoint = load_checkpoint(folder, deferred=True)
    checkpoint.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        export_onnx(checkpoint, folder, force=True, verify=False)
    assert (folder / "model.onnx").read_bytes() == first
    assert stamps(folder).keys() == after.keys()


def test_rewritten_and_attached_later(sharded: Path, pending: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(pending, folder)
    model, rewritten = folder / "model.onnx", folder / "model.sa.onnx"
    assert not (folder / "model.onnx.data").exists()
    assert len(inspect(model).sites) == 2
    assert rewrite(model, rewritten).rewritten == 2
    with pytest.raises(GraphError, match="has no weights yet; write the output into the same folder"):
        rewrite(model, tmp_path / "elsewhere.onnx")
    before = {path: path.read_bytes() for path in (model, rewritten)}

    other = save_checkpoint(tmp_path / "other", intermediate_size=80, tokenizer=False)
    with pytest.raises(UserError, match=r"has model\.layers\.0\.mlp\.\S+ with the shape .* the graph needs"):
        attach_weights([model, rewritten], other)
    assert {path: path.read_bytes() for path in before} == before
    assert not (folder / "model.onnx.data").exists()

    result = attach_weights([model, rewritten], sharded, weights="hardlink")
    assert result.placement.how == "hardlink"
    assert result.verification is not None
    assert {p.stat().st_ino for p in folder.glob("*.safetensors")} == {p.stat().st_ino for p in sharded.glob("*.safetensors")}
    want = torch_logits(sharded)
    for path in (model, rewritten):
        got = Session(path).step(IDS, MASK)
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    with pytest.raises(UserError, match="has its weights already"):
        attach_weights([model], sharded)
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["weights"]["how"] == "hardlink"
    assert set(manifest["files"]) >= {p.name for p in sharded.glob("*.safetensors")}


@pytest.mark.parametrize(("how", "dtype"), [("copy", "float16"), ("auto", "bfloat16"), ("hardlink", "float32")])
def test_weights_of_another_type_are_converted_in_pieces(
    how: str, dtype: str, sharded: Path, pending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is that of the configuration, with its weights declared in the type: what is tested is the data, not the graph."""
    import torch

    from sa_export.hf import placement
    from sa_export.hf.export import give_weights

    monkeypatch.setattr(placement, "_CHUNK", 1000)  # smaller than a tensor, no multiple of a row
    model = onnx.load(pending / "model.onnx", load_external_data=False)
    number = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16, "float32": onnx.TensorProto.FLOAT}[dtype]
    for item in external_data.external_tensors(model):
        item.tensor.data_type = number
    folder = tmp_path / "out"
    folder.mkdir()
    checkpoint = load_checkpoint(sharded, dtype=dtype, deferred=True)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}, "nothing was converted in memory"
    placed = give_weights([model], checkpoint, folder, how)
    count = sum(p.numel() for p in checkpoint.model.parameters())
    size = getattr(torch, dtype).itemsize
    same = dtype == "float32"
    assert (placed.converted, placed.referenced) == (0 if same else count * size, count * size if same else 0)
    assert not external_data.is_pending(model)
    assert external_data.verify(model, folder)
    for item in external_data.external_tensors(model):
        raw = (folder / item.location).read_bytes()[item.offset : item.offset + item.length]
        got = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(list(item.tensor.dims))
        assert torch.equal(got, checkpoint.model.get_parameter(item.tensor.name).to(getattr(torch, dtype))), item.tensor.name


def test_reference_needs_the_folder_of_the_checkpoint(sharded: Path, pending: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(pending, folder)
    with pytest.raises(UserError, match=r"cannot be referenced from another folder.*give .* as the output"):
        attach_weights([folder / "model.onnx"], sharded, weights="reference")
    links = tmp_path / "links"
    links.mkdir()
    for path in sharded.iterdir():
        (links / path.name).symlink_to(path)
    shutil.copy(pending / "model.onnx", links / "model.onnx")
    with pytest.raises(UserError, match="is a link, as in the cache of the hub"):
        attach_weights([links / "model.onnx"], links)
    checkpoint = load_checkpoint(sharded, dtype="float16", deferred=True)
    with pytest.raises(UserError, match="holds the weights and a configuration in float32; choose another output folder for float16"):
        export_onnx(checkpoint, sharded)


def test_a_tensor_that_was_written_to_is_no_longer_its_file(sharded: Path) -> None:
    import torch

    from sa_export.hf.origin import origins

    checkpoint = load_checkpoint(sharded)
    tensors = dict(checkpoint.model.named_parameters())
    found = origins(tensors, checkpoint.files)
    assert set(found) == set(tensors)
    for name, origin in found.items():
        raw = origin.path.read_bytes()[origin.offset : origin.offset + origin.length]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), tensors[name].reshape(-1)), name
    changed = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        tensors[changed][0, 0] += 1
    left = origins(tensors, checkpoint.files)
    assert changed not in left
    assert left, "only the file that was written to is given up"
    assert origins(tensors, []) == {}


def test_too_little_memory_is_said_and_not_tried(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sa_export.hf import verify

    assert verify.memory_shortage(10**6, "float32") is None
    sentence = verify.memory_shortage(10**13, "bfloat16")
    assert sentence is not None
    assert sentence.startswith("Not compared with the torch model: that takes about ")
    monkeypatch.setattr(verify, "_available_bytes", lambda: None)
    assert verify.memory_shortage(10**13, "bfloat16") is None


def test_a_model_of_671_billion_parameters_takes_no_memory() -> None:
    code = """
import re
import transformers
from pathlib import Path
from sa_export.hf.skeleton import build_skeleton
from sa_export.hf.step import probe
from sa_export.hf.trace import traceable_experts
config = transformers.AutoConfig.for_model("deepseek_v3")
model = build_skeleton(config, "it", "bfloat16")
assert sum(p.numel() for p in model.parameters()) > 600e9
with traceable_experts(model):
    assert len(probe(model)) == config.num_hidden_layers
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) < 1024, "MiB"


def sparse_checkpoint(folder: Path, *, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> Path:
    """A Llama checkpoint in bfloat16 in two files of holes: it has its size and takes no space."""
    head = hidden // heads
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for i in range(layers):
        rows = {
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [kv_heads * head, hidden],
            "self_attn.v_proj": [kv_heads * head, hidden],
        }
        rows |= {
            "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        rows |= {"input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in rows.items()}
    folder.mkdir()
    where = {}
    names = list(shapes)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in part:
            size = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
            where[name] = f"model-{number + 1:05d}-of-00002.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / where[part[0]]).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "tie_word_embeddings": False}))
    return folder


MEASURE = """
import re, sys
from pathlib import Path
from sa_export.cli.main import main
def io(): return dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
import torch, transformers, onnxscript, onnxruntime
before = io()
assert main(["export", "-m", sys.argv[1], "-o", sys.argv[1], "--attention", "sample", "--no-verify", "-q"]) == 0
assert main(["rewrite", sys.argv[1] + "/model.onnx", "-q"]) == 0
after = io()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
print(peak, *(int(after[k]) - int(before[k]) for k in ("rchar", "wchar", "read_bytes")))
"""


def test_no_byte_of_seven_gigabytes_is_read_or_copied(tmp_path: Path) -> None:
    """Two layers in the sizes of Llama 3.1 70B; time grows with layers, memory and input do not."""
    folder = sparse_checkpoint(tmp_path / "m", layers=2, hidden=8192, inner=28672, heads=64, kv_heads=8, vocabulary=128256)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 7e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    peak, read, written, _ = map(int, done.stdout.splitlines()[-1].split())
    assert peak < 1024, "MiB"
    assert read < 200e6, "bytes: Python modules and headers"
    assert written < 4e6, "bytes: two graphs"
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 4e6, "the holes were filled"
    for name in ("model.onnx", "model.sa.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        placed = {(item.location, item.offset): item.length for item in external_data.external_tensors(model)}
        assert sum(placed.values()) == sum(path.stat().st_size for path in folder.glob("*.safetensors")) - headers(folder)
    assert os.listdir(tmp_path) == ["m"]


def headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in folder.glob("*.safetensors"))


def test_command_line(sharded: Path, pending: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    shutil.copytree(pending, folder)
    model = str(folder / "model.onnx")
    assert main(["check", model, model, "-o", str(tmp_path / "check")]) == 2
    assert "has no weights yet; add them with `sa-export attach`" in capsys.readouterr().err
    assert main(["convert", "-m", str(sharded), "-o", str(tmp_path / "new"), "--from-config"]) == 2
    assert "--from-config leaves nothing to check" in capsys.readouterr().err
    assert main(["export", "-m", str(sharded), "-o", str(tmp_path / "new"), "--from-config", "--random-weights"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["export", "-m", str(sharded), "-o", str(tmp_path / "new"), "--single-file", "--weights", "copy"]) == 2
    assert "leave out --weights or --single-file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["attach", model, "-m", str(sharded), "--no-verify", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["how"] in ("copy", "clone")
    onnx.checker.check_model(model)
