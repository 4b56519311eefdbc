"""What an export holds, and that it computes what the torch model computes. The comparisons here do not use `verify_export`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa_export.errors import UserError
from sa_export.hf.export import export_onnx
from tests.sa_export.hf.models import Session, save_checkpoint

Loaded = Callable[..., Any]
Exported = Callable[..., Any]

# The exports that the tests share, each with the ways in which it differs from the others.
FULL: dict[str, Any] = {}
HALF_LAST: dict[str, Any] = {"dtype": "float16", "logits": "last", "opset": 18}
EAGER_23: dict[str, Any] = {"attention": "eager", "opset": 23, "single_file": True, "name": "sliding"}
SAMPLE: dict[str, Any] = {"attention": "sample", "logits": "last", "opset": 23}
SAMPLE_SLIDING: dict[str, Any] = {"attention": "sample", "name": "sliding"}


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of whole sequences, without a cache, in float32 whatever the model's type."""
    import torch

    positions = torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0))
    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions, use_cache=False)
    return out.logits.float().numpy()


def scale_free(difference: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(difference).max() / np.abs(reference).max())


def padded(rng: np.random.Generator, lengths: tuple[int, ...], left: bool) -> tuple[np.ndarray, np.ndarray]:
    total = max(lengths)
    mask = np.array([[0] * (total - n) + [1] * n if left else [1] * n + [0] * (total - n) for n in lengths], np.int64)
    return rng.integers(3, 96, (len(lengths), total)), mask


@pytest.mark.parametrize("options", [FULL, HALF_LAST, EAGER_23, SAMPLE, SAMPLE_SLIDING], ids=str)
def test_names_shapes_and_dimensions(exported: Exported, options: dict[str, Any]) -> None:
    import onnx

    result = exported(**options)
    model = onnx.load(result.model_path, load_external_data=False)
    onnx.checker.check_model(str(result.model_path))
    batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    element = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[result.dtype]
    integer = onnx.TensorProto.INT64

    def described(values: Any) -> list[tuple[Any, ...]]:
        dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]
        return [(v.name, v.type.tensor_type.elem_type, *d) for v, d in zip(values, dims, strict=True)]

    def cache(prefix: str, length: str) -> list[tuple[Any, ...]]:
        return [(f"{prefix}.{i}.{kind}", element, batch, 2, length, 12) for i in range(2) for kind in ("key", "value")]

    rows = 1 if result.logits == "last" else new
    assert described(model.graph.input) == [
        ("input_ids", integer, batch, new),
        ("attention_mask", integer, batch, total),
        ("position_ids", integer, batch, new),
        *cache("past_key_values", past),
    ]
    assert described(model.graph.output) == [("logits", element, batch, rows, 96), *cache("present", total)]
    assert [spec.name for spec in result.inputs] == [value.name for value in model.graph.input]
    assert [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")] == [options.get("opset", 20)]
    free = {d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert not any(name.startswith("s") and name[1:].isdigit() for name in free), "torch's own symbols do not reach the file"


def test_folder_and_manifest(exported: Exported, llama: Path) -> None:
    result = exported(**FULL)
    manifest = json.loads((result.folder / "export.json").read_text())
    held = {path.name for path in result.folder.iterdir()}
    assert held == set(manifest["files"])
    assert held >= {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (result.folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert manifest["format"] == "sa-export/1"
    assert manifest["limits"]["max_position_embeddings"] == 256
    assert (manifest["dtype"], manifest["opset"], manifest["attention"], manifest["logits"]) == ("float32", 20, "sdpa", "all")
    assert manifest["versions"]["torch"]
    assert len(manifest["verification"]["cases"]) == 6
    assert all(case["passed"] for case in manifest["verification"]["cases"])
    assert result.data_path is not None
    assert result.data_path.stat().st_size >= 0.99 * result.weight_bytes
    assert json.loads((exported(**HALF_LAST).folder / "config.json").read_text())["dtype"] == "float16"


def test_single_file_has_its_weights_inside(exported: Exported) -> None:
    result = exported(**EAGER_23)
    assert result.data_path is None
    assert not (result.folder / "model.onnx.data").exists()
    assert result.model_path.stat().st_size >= 0.99 * result.weight_bytes


def test_the_file_names_no_path_of_this_machine(exported: Exported) -> None:
    import torch

    data = exported(**FULL).model_path.read_bytes()
    for path in (Path(torch.__file__).parent, Path(__file__).parents[3]):
        assert str(path).encode() not in data


@pytest.mark.parametrize("options", [FULL, EAGER_23, SAMPLE_SLIDING], ids=str)
@pytest.mark.parametrize("left", [True, False], ids=["left padding", "right padding"])
def test_float32_batch_prefill_then_decode(exported: Exported, loaded: Loaded, options: dict[str, Any], left: bool) -> None:
    rng = np.random.default_rng(7)
    ids, mask = padded(rng, (31, 17, 2), left)
    run = Session(exported(**options).model_path)
    given = [run.step(ids, mask)]
    for _ in range(3):
        ids = np.concatenate([ids, rng.integers(3, 96, (3, 1))], 1)
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
        given.append(run.step(ids[:, -1:], mask))
    want = torch_logits(loaded(name=options.get("name", "llama")).model, ids, mask)[mask > 0]
    got = np.concatenate(given, 1)[mask > 0]
    assert scale_free(got - want, want) < 1e-5


@pytest.mark.parametrize("options", [FULL, EAGER_23, SAMPLE_SLIDING], ids=str)
def test_float32_chunked_prefill(exported: Exported, loaded: Loaded, options: dict[str, Any]) -> None:
    ids, mask = padded(np.random.default_rng(8), (90, 90), True)
    run = Session(exported(**options).model_path)
    cuts = (0, 33, 34, 77, 90)
    got = np.concatenate([run.step(ids[:, a:b], mask[:, :b]) for a, b in itertools.pairwise(cuts)], 1)
    want = torch_logits(loaded(name=options.get("name", "llama")).model, ids, mask)
    assert scale_free(got - want, want) < 1e-5


@pytest.mark.parametrize("options", [FULL, EAGER_23, SAMPLE, SAMPLE_SLIDING], ids=str)
def test_one_token_at_a_time_from_the_first(exported: Exported, loaded: Loaded, options: dict[str, Any]) -> None:
    ids, mask = padded(np.random.default_rng(11), (12,), True)
    run = Session(exported(**options).model_path)
    got = np.concatenate([run.step(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(12)], 1)
    want = torch_logits(loaded(name=options.get("name", "llama")).model, ids, mask)
    assert scale_free(got - want, want) < 1e-5


@pytest.mark.parametrize("options", [HALF_LAST, SAMPLE], ids=str)
@pytest.mark.parametrize("left", [True, False], ids=["left padding", "right padding"])
def test_last_logits_are_those_of_the_last_attended_token(exported: Exported, loaded: Loaded, options: dict[str, Any], left: bool) -> None:
    ids, mask = padded(np.random.default_rng(9), (40, 23, 5), left)
    got = Session(exported(**options).model_path).step(ids, mask)
    assert got.shape == (3, 1, 96)
    last = np.array([39, 39, 39]) if left else np.array([39, 22, 4])
    want = torch_logits(loaded(options.get("dtype", "float32")).model, ids, mask)[np.arange(3), last]
    # float16: both sides round, each by less than this (a wrong row differs by the whole scale).
    assert scale_free(got[:, 0] - want, want) < (5e-3 if options is HALF_LAST else 1e-5)


def test_half_precision_errs_no_more_than_twice_torch(exported: Exported, loaded: Loaded) -> None:
    rng = np.random.default_rng(10)
    exact_model, half_model = loaded("float32").model, loaded("float16").model
    run = Session(exported(**HALF_LAST).model_path)
    ours, torchs = [], []
    for _ in range(8):
        ids, mask = padded(rng, (24, 24, 24, 24), True)
        run.past = {}
        exact = torch_logits(exact_model, ids, mask)[:, -1]
        ours.append(run.step(ids, mask)[:, 0] - exact)
        torchs.append(torch_logits(half_model, ids, mask)[:, -1] - exact)
    rms_ours, rms_torch = (float(np.sqrt(np.mean(np.square(d)))) for d in (ours, torchs))
    assert 0 < rms_ours <= 2 * rms_torch


def test_projection_comes_after_the_choice_of_rows(exported: Exported) -> None:
    import onnx

    model = onnx.load(exported(**SAMPLE).model_path, load_external_data=False)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    wide = [name for name, shape in shapes.items() if shape and shape[-1] == 96 and "sequence_length" in shape]
    assert wide == [], "no tensor of sequence x vocabulary"


@pytest.mark.parametrize(("options", "nodes"), [(SAMPLE, 2), (SAMPLE_SLIDING, 1), (FULL, 0)], ids=str)
def test_one_sample_attention_node_for_each_full_causal_layer(exported: Exported, options: dict[str, Any], nodes: int) -> None:
    import onnx

    from graph_passes import op

    result = exported(**options)
    model = onnx.load(result.model_path, load_external_data=False)
    sites = [node for node in model.graph.node if node.domain == op.DOMAIN]
    assert len(sites) == nodes == result.sample_attention_nodes
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in sites:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (node.op_type, node.overload, len(node.output)) == (op.OP_TYPE, op.variant("dense", has_mask=True), 1)
        assert set(values) == {attribute.name for attribute in op.ATTRIBUTES}
        assert values["policy"] == b"dense"
        assert values["scale"] == pytest.approx(12**-0.5, rel=1e-6)
        mask = producers[node.input[3]]
        assert mask.op_type == "Cast"
        assert onnx.helper.get_attribute_value(mask.attribute[0]) == onnx.TensorProto.BOOL
        assert list(mask.input) == ["attention_mask"]
        # Keys and values come with their own two heads and with the past in front, not repeated for the four query heads.
        assert {producers[name].op_type for name in node.input[1:3]} == {"Concat"}
    assert sum(f.domain == op.DOMAIN for f in model.functions) == 2 * bool(nodes)  # the body and its guard
    softmaxes = sum(node.op_type in ("Softmax", "Attention") for node in model.graph.node)
    assert softmaxes == 2 - nodes


def test_bfloat16_is_verified_as_float32_over_the_same_weights(exported: Exported) -> None:
    result = exported("bfloat16")
    assert "cast to float32" in result.verification.method
    assert all(case.rms < case.allowed_rms for case in result.verification.cases)
    assert {path.suffix for path in result.folder.glob("model*")} == {".onnx", ".data"}, "the float32 twin is gone"
    assert not list(result.folder.glob(".*"))


def test_progress_and_silence(exported: Exported, heard: dict[Path, Any]) -> None:
    for options in (FULL, HALF_LAST):
        ears = heard[exported(**options).folder]
        assert list(dict.fromkeys(stage for stage, _ in ears.progress)) == ["probe", "trace", "write", "verify"]
        for stage in ("write", "verify"):
            fractions = [fraction for at, fraction in ears.progress if at == stage and fraction is not None]
            assert fractions == sorted(fractions)
            assert fractions[-1] == 1.0
        assert ears.printed == b""
        assert ears.warnings == []


def test_silence_ends_with_the_export() -> None:
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    from sa_export.hf.quiet import quiet_libraries

    logger = logging.getLogger("torch.onnx")
    before = (logger.level, transformers_logging.is_progress_bar_enabled(), list(warnings.filters))

    def fail() -> None:
        with quiet_libraries():
            assert not logger.isEnabledFor(logging.CRITICAL)
            assert not logging.getLogger("torch.born_inside").isEnabledFor(logging.ERROR)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (logger.level, transformers_logging.is_progress_bar_enabled(), list(warnings.filters)) == before


def test_the_model_is_left_as_it_was(exported: Exported, loaded: Loaded) -> None:
    for options in (SAMPLE, HALF_LAST):
        exported(**options)
    assert loaded().model.config._attn_implementation == "sdpa"
    assert {str(p.dtype) for p in loaded("float16").model.parameters()} == {"torch.float16"}
    assert not loaded("float16").model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 17}, "opset is 17; allowed is 18 to 24"),
        ({"attention": "flash"}, "allowed is sdpa, eager, sample"),
        ({"logits": "first"}, "allowed is all, last"),
    ],
    ids=str,
)
def test_arguments(loaded: Loaded, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        export_onnx(loaded(), tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_models_that_cannot_be_exported_leave_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from sa_export.hf.load import load_checkpoint

    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for kind, changes, words in (
        ("MambaConfig", {"state_size": 4}, "a state other than keys and values"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, r"keys and values between steps \(LinearAttentionLayer\)"),
        ("OpenAIGPTConfig", {}, "gives no cache of keys and values back"),
        ("LlamaConfig", {"rope_parameters": dynamic, "num_hidden_layers": 1}, "torch.onnx cannot export LlamaForCausalLM"),
    ):
        checkpoint = load_checkpoint(save_checkpoint(tmp_path / kind, kind, tokenizer=False, **changes))
        capfd.readouterr()
        with pytest.raises(UserError, match=words):
            export_onnx(checkpoint, tmp_path / "made" / "out")
        assert capfd.readouterr() == ("", "")
        assert not (tmp_path / "made").exists()


def test_positions_from_a_table_as_long_as_the_context(tmp_path: Path) -> None:
    """torch exports such a model only with its lengths bounded by the table's."""
    from sa_export.hf.load import load_checkpoint

    checkpoint = load_checkpoint(save_checkpoint(tmp_path / "xglm", "XGLMConfig", tokenizer=False, ffn_dim=64), dtype="float32")
    result = export_onnx(checkpoint, tmp_path / "out")
    cases = json.loads((result.folder / "export.json").read_text())["verification"]["cases"]
    assert len(cases) == 6
    assert all(case["passed"] for case in cases)


def test_bidirectional_attention_is_found_by_running_it(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded().model
    monkeypatch.setattr(model.config, "is_causal", False, raising=False)
    with pytest.raises(UserError, match="is bidirectional: an earlier token sees a later one"):
        export_onnx(loaded(), tmp_path / "out")
    assert not any(tmp_path.iterdir())
