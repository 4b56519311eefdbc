"""What `load_checkpoint` accepts, and the sentence for each thing that it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sa_export.errors import UserError
from sa_export.hf.load import load_checkpoint
from tests.sa_export.hf.models import save_checkpoint


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama checkpoint to break."""
    return Path(shutil.copytree(llama, tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(source, **options)  # type: ignore[arg-type]
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "!"))
    return sentence


def test_loads_model_tokenizer_and_dtype(llama: Path) -> None:
    import torch

    stages: list[str] = []
    checkpoint = load_checkpoint(llama, dtype="fp16", progress=lambda stage, _: stages.append(stage))
    assert checkpoint.dtype == "float16"
    assert checkpoint.model.dtype == torch.float16
    assert not checkpoint.model.training
    assert checkpoint.tokenizer is not None
    assert checkpoint.notes == ()
    assert set(stages) == {"load"}
    assert load_checkpoint(llama).dtype == "float32", "without a dtype the checkpoint's own is kept"


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert "is a file" in refusal(file)
    assert "GGUF" in refusal(file)
    assert "does not exist" in refusal(tmp_path / "missing")


def test_config_that_is_not_json(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": ')
    assert "not valid JSON" in refusal(broken)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda data: data[:-1000], "is truncated"),
        (lambda data: data[:100], "is truncated"),
        (lambda data: b"", "no safetensors header length"),
        (lambda data: data[:8] + b"?" + data[9:], "header is not readable"),
        (lambda data: data + b"more", "is corrupt"),
    ],
    ids=["tensors cut", "header cut", "empty", "header overwritten", "bytes added"],
)
def test_safetensors_that_is_not_whole(broken: Path, keep: Any, words: str) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(keep(path.read_bytes()))
    sentence = refusal(broken)
    assert words in sentence
    assert "model.safetensors" in sentence


def test_shards(broken: Path, llama: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (broken / "model.safetensors").unlink()
    model.save_pretrained(broken, max_shard_size="50KB")
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_checkpoint(broken).model.num_parameters() == model.num_parameters()
    (broken / "moved").write_bytes(shards[1].read_bytes())
    shards[1].unlink()
    assert f"lacks the weight shard {shards[1].name}" in refusal(broken)
    shutil.copyfile(shards[0], shards[1])
    assert "lacks the tensor" in refusal(broken)


def test_truncated_pickle(broken: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    assert load_checkpoint(broken).dtype == "float32"
    data = (broken / "pytorch_model.bin").read_bytes()
    (broken / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    assert "pytorch_model.bin is truncated or corrupt" in refusal(broken)


def test_missing_weights_and_missing_tensors(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = broken / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    sentence = refusal(broken)
    assert "lacks 1 of the tensors" in sentence
    assert name in sentence
    path.unlink()
    assert "no weights" in refusal(broken)


def test_weights_of_another_shape(broken: Path) -> None:
    change_config(broken, intermediate_size=72)
    assert "checkpoint" in refusal(broken)


def test_unknown_architecture(broken: Path) -> None:
    change_config(broken, model_type="hovercraft", architectures=["HovercraftForCausalLM"])
    assert "model_type 'hovercraft', which the installed transformers does not know" in refusal(broken)


def test_own_code_needs_permission(broken: Path) -> None:
    change_config(broken, model_type="hovercraft", auto_map={"AutoModelForCausalLM": "modeling_hovercraft.Hovercraft"})
    assert "--trust-remote-code" in refusal(broken)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is an encoder"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "no causal language-model head"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "is an encoder"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized with gptq"),
    ],
    ids=["bert", "t5", "classifier", "bidirectional gemma", "quantized"],
)
def test_models_of_another_kind(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in refusal(tmp_path)


def test_bert_as_a_decoder_is_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "bert", "BertConfig", is_decoder=True, tokenizer=False)
    assert type(load_checkpoint(folder).model).__name__ == "BertLMHeadModel"


def test_arguments(llama: Path) -> None:
    assert "allowed is float32, float16, bfloat16" in refusal(llama, dtype="int8")
    assert "--random-weights" in refusal(llama, num_layers=1)
    assert "from 1 to 2" in refusal(llama, random_weights=True, num_layers=3)


def test_random_weights_need_the_configuration_alone(broken: Path) -> None:
    import torch

    (broken / "model.safetensors").unlink()
    models = [load_checkpoint(broken, random_weights=True, num_layers=1, seed=seed, dtype="bfloat16").model for seed in (3, 3, 4)]
    first, again, other = (model.get_input_embeddings().weight for model in models)
    assert models[0].config.num_hidden_layers == 1
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_weights_cut_lists_of_layers(sliding: Path) -> None:
    config = load_checkpoint(sliding, random_weights=True, num_layers=2).config
    assert list(config.layer_types) == ["full_attention", "sliding_attention"]


def test_a_broken_tokenizer_is_a_note(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    checkpoint = load_checkpoint(broken)
    assert checkpoint.tokenizer is None
    assert "tokenizer" in checkpoint.notes[0]


def test_hub_id_without_network(tmp_path: Path) -> None:
    code = (
        "from sa_export.errors import UserError\n"
        "from sa_export.hf.source import resolve_source\n"
        "try:\n    resolve_source('some-org/some-model')\n"
        "except UserError as error:\n    print(error)\n"
    )
    # Port 9 of this machine answers nobody.
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "some-org/some-model is no folder here, and the Hugging Face hub cannot be reached" in done.stdout


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that serves the Llama checkpoint as `org/llama`; the names of the files that were asked for."""
    import huggingface_hub

    served: list[str] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        assert (hub_id, options["revision"], options["token"]) == ("org/llama", "main", "secret")
        (tmp_path / "hub").mkdir(exist_ok=True)
        extra = {"modeling_own.py": b"", "onnx/model.onnx.json": b"", "consolidated.safetensors": b"", "readme.md": b""}
        names = {path.name: path.read_bytes() for path in llama.iterdir()} | extra
        for name, data in names.items():
            wanted = any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns)
            if wanted and not (tmp_path / "hub" / name).exists():
                (tmp_path / "hub" / name).write_bytes(data)
                served.append(name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return served


def test_hub_id(hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    stages: list[str] = []
    options: dict[str, Any] = {"revision": "main", "token": "secret", "progress": lambda stage, _: stages.append(stage)}
    assert load_checkpoint("org/llama", random_weights=True, **options).source == "org/llama"
    assert "config.json" in hub
    assert "model.safetensors" not in hub, "random weights need no download"
    assert load_checkpoint("org/llama", **options).tokenizer is not None
    assert "model.safetensors" in hub
    assert not {"modeling_own.py", "onnx/model.onnx.json", "consolidated.safetensors", "readme.md"} & set(hub)
    assert list(dict.fromkeys(stages)) == ["download", "load"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "licence"),
        ("RevisionNotFoundError", "not the revision 'v9'"),
        ("RepositoryNotFoundError", "no such model"),
        ("HfHubHTTPError", "cannot be reached"),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, words: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None, status_code=403, url="http://hub")

    def snapshot_download(*_: object, **__: object) -> str:
        raise getattr(errors, error)("no", response=response)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert words in refusal("org/model", revision="v9")


def test_a_folder_never_asks_the_network(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_checkpoint(llama).tokenizer is not None
