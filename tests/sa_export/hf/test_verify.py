"""That `verify_export` refuses graphs that are wrong, each in one way, and says by how much."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa_export.errors import UserError
from sa_export.hf import export as export_module
from sa_export.hf.cases import cases
from sa_export.hf.export import export_onnx
from sa_export.hf.verify import verify_export

Loaded = Callable[..., Any]
Exported = Callable[..., Any]


@pytest.fixture
def edited(exported: Exported, tmp_path: Path) -> Callable[..., Path]:
    """`edited(change, **options)`: the model file of an export after `change(model proto)`."""
    import onnx

    def get(change: Callable[[Any], None], **options: Any) -> Path:
        folder = Path(shutil.copytree(exported(**options).folder, tmp_path / "edited"))
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder / "model.onnx"

    return get


def scale_weight(path: Path, index: int, factor: float) -> None:
    """Multiplies one weight matrix in the data file of an export."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = [t for t in model.graph.initializer if len(t.dims) == 2 and t.external_data]
    place = {entry.key: entry.value for entry in weights[index].external_data}
    element = onnx.helper.tensor_dtype_to_np_dtype(weights[index].data_type)
    data = np.memmap(path.with_name("model.onnx.data"), element, "r+", int(place["offset"]), (int(place["length"]) // element.itemsize,))
    data *= np.asarray(factor, element)
    data.flush()


def refused(path: Path, checkpoint: Any) -> str:
    with pytest.raises(UserError) as caught:
        verify_export(path, checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_passes_and_repeats(exported: Exported, loaded: Loaded) -> None:
    result = exported()
    first, again, other = (verify_export(result.model_path, loaded(), seed=seed) for seed in (0, 0, 5))
    assert first == again == result.verification
    assert [case.absolute for case in other.cases] != [case.absolute for case in first.cases]
    assert all(case.passed for case in other.cases)
    assert first.worst.relative < 1e-5


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("float16", 1.05), ("bfloat16", 1.1)])
def test_a_weight_that_is_off(exported: Exported, loaded: Loaded, tmp_path: Path, dtype: str, factor: float) -> None:
    options = {"dtype": "float16", "logits": "last", "opset": 18} if dtype == "float16" else {"dtype": dtype}
    folder = Path(shutil.copytree(exported(**options).folder, tmp_path / "edited"))
    scale_weight(folder / "model.onnx", 4, factor)
    sentence = refused(folder / "model.onnx", loaded(dtype))
    assert "differs from" in sentence
    assert "(allowed " in sentence


def test_padding_that_is_ignored(edited: Callable[..., Path], loaded: Loaded) -> None:
    import onnx

    def ignore(model: Any) -> None:
        # attention_mask >= 0 everywhere: a mask of ones.
        zero = onnx.numpy_helper.from_array(np.int64(0), "zero")
        model.graph.initializer.append(zero)
        node = onnx.helper.make_node("GreaterOrEqual", ["attention_mask", "zero"], ["all_real"])
        casts = [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] == "attention_mask"]
        for cast in casts:
            cast.input[0] = "all_real"
        assert casts
        model.graph.node.insert(0, node)

    sentence = refused(edited(ignore), loaded())
    # After right padding only a later token can see the padding: prefill is right, decode is not.
    assert "in 3 of 6 cases" in sentence
    for name in ("prefill, batch of 3, left padding", "decode, batch of 3, left padding", "decode, batch of 3, right padding"):
        assert name in sentence


def test_rows_chosen_by_place_instead_of_attention(edited: Callable[..., Path], loaded: Loaded) -> None:
    import onnx

    def take_the_last(model: Any) -> None:
        # Attended is what differs from 0; everything differs from 5.
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(5), "five"))
        [maximum] = [n for n in model.graph.node if n.op_type == "ReduceMax"]
        producers = {output: n for n in model.graph.node for output in n.output}
        equal = producers[producers[producers[maximum.input[0]].input[0]].input[0]]
        assert equal.op_type == "Equal"
        equal.input[1] = "five"

    sentence = refused(edited(take_the_last, dtype="float16", logits="last", opset=18), loaded("float16"))
    assert "right padding" in sentence


def test_positions_that_restart_in_every_chunk(edited: Callable[..., Path], loaded: Loaded) -> None:
    import onnx

    def restart(model: Any) -> None:
        shape = onnx.helper.make_node("Shape", ["input_ids"], ["new_shape"], start=1, end=2)
        count = onnx.helper.make_node("Squeeze", ["new_shape"], ["new_count"])
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(0), "zero"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.int64(1), "one"))
        positions = onnx.helper.make_node("Range", ["zero", "new_count", "one"], ["restarted"])
        expand = onnx.helper.make_node("Expand", ["restarted", "ids_shape"], ["restarted_ids"])
        ids_shape = onnx.helper.make_node("Shape", ["input_ids"], ["ids_shape"])
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == "position_ids":
                    node.input[i] = "restarted_ids"
        for node in reversed((shape, count, positions, ids_shape, expand)):
            model.graph.node.insert(0, node)

    assert "chunked prefill" in refused(edited(restart), loaded())


def test_a_graph_that_does_not_load(edited: Callable[..., Path], loaded: Loaded) -> None:
    def break_it(model: Any) -> None:
        next(n for n in model.graph.node if n.op_type == "MatMul").op_type = "MatMulNot"

    assert "refuses the exported graph" in refused(edited(break_it), loaded())


def test_a_wrong_export_is_not_kept(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil_and_verify(path: Path, *args: Any, **options: Any) -> Any:
        scale_weight(path, 4, 1.01)
        return verify_export(path, *args, **options)

    monkeypatch.setattr(export_module, "verify_export", spoil_and_verify)
    with pytest.raises(UserError, match=r"differs from .* in \d of 6 cases .*; it is not kept"):
        export_onnx(loaded(), tmp_path / "made" / "out")
    assert not any(tmp_path.iterdir())


def test_logits_that_overflow(llama: Path, loaded: Loaded, exported: Exported) -> None:
    from dataclasses import replace

    import torch

    from sa_export.hf.load import load_checkpoint

    checkpoint = load_checkpoint(llama, dtype="float16")
    with torch.no_grad():
        checkpoint.model.get_output_embeddings().weight.mul_(60000)
    with pytest.raises(UserError, match="not finite in float16; choose another --dtype"):
        verify_export(exported().model_path, replace(checkpoint, source="llama"))


def test_cases_cover_what_generation_does() -> None:
    made = {case.name: case for case in cases(np.arange(3, 96), 4096, 0)}
    chunks = made["chunked prefill"]
    assert len(chunks.cuts) == 4
    for side, first, last in (("left", 0, 1), ("right", 1, 0)):
        case = made[f"decode, batch of 3, {side} padding"]
        prompt = case.cuts[1]
        assert case.cuts[2:] == (prompt + 1, prompt + 2, prompt + 3)
        assert (case.mask[1:, 0] == first).all()
        assert (case.mask[1:, prompt - 1] == last).all()
        assert case.mask[:, prompt:].all()
        assert (case.mask.sum(-1) > 3).all()
    assert all(case.ids.min() >= 3 for case in made.values())


@pytest.mark.parametrize("longest", [1, 2, 3, 7, 20])
def test_cases_stay_below_the_limit_of_the_model(longest: int) -> None:
    for case in cases(np.arange(8), longest, 0):
        assert case.ids.shape[1] <= longest
        assert case.cuts[0] == 0
        assert case.cuts[-1] == case.ids.shape[1]
        assert (case.mask.sum(-1) > 0).all()
