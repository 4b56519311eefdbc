"""A checkpoint as an ONNX folder: traced without its weights, given them, verified against the torch model, and only then put in place."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.folder import FORMAT, MANIFEST, check_beside, check_replaceable, staged_beside, staged_folder
from sa_export.hf.load import Checkpoint, in_dtype
from sa_export.hf.origin import origins
from sa_export.hf.placement import HARDLINK_BYTES, WEIGHTS, Placement, place
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import quiet_libraries
from sa_export.hf.skeleton import build_skeleton, retype
from sa_export.hf.step import LOGITS, TensorSpec, input_specs, output_specs, probe
from sa_export.hf.trace import (
    ATTENTIONS,
    DATA_FILE,
    MODEL_FILE,
    attention_implementation,
    sample_attention_nodes,
    to_proto,
    trace,
    traceable_experts,
)
from sa_export.hf.verify import Verification, memory_shortage, verify_export
from sa_export.versions import versions

OPSETS = range(18, 25)
"""Opset versions that can be asked for."""

_SINGLE_FILE_BYTES = 2**31 - 2**26
"""A protobuf ends at 2 GiB; the graph itself needs some of it."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_BESIDE = (MODEL_FILE, DATA_FILE, MANIFEST)
"""What an export makes in the checkpoint's own folder."""
_PACKAGES = ("sa-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportResult:
    """What an export made and how it was proved."""

    folder: Path
    model_path: Path
    data_path: Path | None
    """The weights that the export wrote, None when there are none or they are inside `model_path`."""
    weights: Placement
    """Where the weights are."""
    dtype: str
    opset: int
    attention: str
    """What the graph holds: "sdpa", "eager" or "sample" (another than asked for where the model has no other: see `notes`)."""
    logits: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    weight_bytes: int
    sample_attention_nodes: int
    limits: dict[str, Any]
    """max_position_embeddings, vocab_size, sliding_window, num_hidden_layers; None where the model has no such limit."""
    verification: Verification | None
    """None when it was not asked for."""
    notes: tuple[str, ...]


def export_onnx(
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    opset: int = 20,
    attention: str = "sdpa",
    logits: str = "all",
    single_file: bool = False,
    weights: str = "auto",
    force: bool = False,
    may_replace: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> ExportResult:
    """Exports a checkpoint into a folder: `model.onnx`, configuration, tokenizer, `export.json`, and the weights or the way to them.

    Graph (B batch, S new tokens, P tokens before them, all free, P may be 0): `input_ids` [B, S], `attention_mask` [B, P + S] and
    `position_ids` [B, S], int64; `past_key_values.N.key` / `.value` [B, Hkv, P, D] -> `logits` [B, S, V] or [B, 1, V] and
    `present.N.key` / `.value` [B, Hkv, P + S, D]. The element type is the checkpoint's `dtype`.

    Memory: the graph is traced without weights. Weights that keep their type and layout stay in the checkpoint's files (`weights`);
    others are converted one bounded piece at a time. Verification needs the weights in memory (`memory_shortage`); where there is not
    enough it is left out, and `notes` say so.

    Args:
        checkpoint: from `load_checkpoint`; `deferred` where its weights are stored in another type.
        output: the folder to make; it appears only when everything has succeeded. The checkpoint's own folder may be given: the export is
            then written beside the weights and refers to them.
        opset: version of the standard operators, 18 to 24.
        attention: "sdpa" or "eager" as transformers writes them; "sample": a `SampleAttention` node (policy dense, every attribute on the
            node, key mask bool) for each full causal layer, the ordinary operators for sliding windows, soft-caps and sinks.
        logits: "all", or "last": one row an item, its last attended new token, chosen before the projection to the vocabulary.
        single_file: puts the weights into `model.onnx` (below 2 GiB only).
        weights: one of `placement.WEIGHTS`.
        force: replaces an earlier export in `output`, after success.
        may_replace: patterns of further files in an earlier export that `force` may discard.
        verify: compares the graph with the torch model (`verify_export`); without it nothing proves the export.
        seed: of the tokens that it is compared on.
        progress: stages "probe", "trace", "write", "verify".

    Raises:
        UserError: wrong arguments, a model that cannot be exported or differs once exported, an output folder that may not be replaced,
            no space. `output` is then what it was before.
    """
    check_options(opset, attention, logits, weights, single_file=single_file)
    output = Path(output).expanduser().absolute()
    beside = check_output(output, checkpoint.folder, force=force, may_replace=may_replace)
    if beside and checkpoint.loaded_dtype not in (None, checkpoint.dtype):
        raise UserError(
            f"{output} holds the weights and a configuration in {checkpoint.loaded_dtype}; choose another output folder for {checkpoint.dtype}."
        )
    notes = list(checkpoint.notes)
    has_weights = checkpoint.loaded_dtype is not None
    with quiet_libraries(), _stage(output, beside=beside, force=force, may_replace=may_replace) as stage:
        skeleton = _skeleton(checkpoint)
        parameters, weight_bytes = _sizes(skeleton)
        if single_file and (weight_bytes > _SINGLE_FILE_BYTES or not has_weights):
            raise UserError(
                f"The weights take {weight_bytes / 2**30:.1f} GiB and one ONNX file holds less than 2; leave out --single-file."
            )
        shortage = memory_shortage(parameters, checkpoint.dtype) if verify and has_weights else None
        if shortage is not None:
            notes.append(shortage)
        verify = verify and has_weights and shortage is None
        progress("probe", None)
        if verify:
            checkpoint = in_dtype(checkpoint)
            layers = probe(checkpoint.model)
        else:
            with traceable_experts(skeleton):
                layers = probe(skeleton)
        inputs = input_specs(layers, checkpoint.dtype)
        outputs = output_specs(layers, checkpoint.dtype, _vocabulary(skeleton), logits)
        with attention_implementation(skeleton, attention) as runs, traceable_experts(skeleton) as has_experts:
            progress("trace", None)
            traced = trace(skeleton, layers, inputs, outputs, opset=opset, logits=logits)
            model, constants = to_proto(traced, inline=not has_weights)
            del traced
        if has_experts:
            notes.append("Expert layers gather their weights once a token in this graph: long prompts need much memory.")
        if runs != attention:
            notes.append(f"{type(skeleton).__name__} has no {attention} attention; the graph holds its {runs} attention.")
        sites = sample_attention_nodes(model)
        if attention == "sample" and sites == 0:
            raise UserError(
                f"{type(skeleton).__name__} leaves no full causal layer without window, soft-cap and sinks to transformers' AttentionInterface; "
                f"export it with attention 'sdpa'."
            )
        progress("write", 0.0)
        placement = Placement("none")
        if has_weights:
            placement = give_weights(
                [model], checkpoint, stage, "inside" if single_file else weights, constants=constants, progress=progress
            )
            notes += placement_notes(placement, checkpoint)
        (stage / MODEL_FILE).write_bytes(model.SerializeToString())
        del model
        progress("write", 1.0)
        if not beside:
            _copy_sidecars(checkpoint, skeleton, stage)
        gc.collect()
        verification = verify_export(stage / MODEL_FILE, checkpoint, seed=seed, progress=progress) if verify else None
        result = ExportResult(
            folder=output,
            model_path=output / MODEL_FILE,
            data_path=output / DATA_FILE if DATA_FILE in placement.files else None,
            weights=placement,
            dtype=checkpoint.dtype,
            opset=opset,
            attention=runs,
            logits=logits,
            inputs=inputs,
            outputs=outputs,
            parameters=parameters,
            weight_bytes=weight_bytes,
            sample_attention_nodes=sites,
            limits=_limits(checkpoint),
            verification=verification,
            notes=tuple(notes),
        )
        _write_manifest(stage, checkpoint, result, _BESIDE if beside else None)
    return result


def check_output(output: Path, source: Path, *, force: bool, may_replace: Sequence[str] = ()) -> bool:
    """Whether an export goes into the checkpoint's own folder; refuses an output that may not be written.

    Raises:
        UserError: with the reason and what to do.
    """
    if output.is_dir() and source.is_dir() and output.samefile(source):
        check_beside(output, _BESIDE, force=force)
        return True
    check_replaceable(output, force=force, may_replace=may_replace)
    return False


def _stage(output: Path, *, beside: bool, force: bool, may_replace: Sequence[str]) -> AbstractContextManager[Path]:
    if beside:
        return staged_beside(output, _BESIDE, force=force, may_replace=may_replace)
    return staged_folder(output, force=force, may_replace=may_replace)


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model to trace: without weights, each parameter in the type that it has when the checkpoint is loaded in its `dtype`."""
    if checkpoint.loaded_dtype is None:
        return checkpoint.model
    skeleton = build_skeleton(checkpoint.config, checkpoint.source, checkpoint.dtype, trust_remote_code=checkpoint.trust_remote_code)
    if checkpoint.loaded_dtype == checkpoint.dtype:
        retype(skeleton, {name: tensor.dtype for name, tensor in held_tensors(checkpoint.model).items()})
    return skeleton


def held_tensors(model: Any) -> dict[str, Any]:
    """Parameters and buffers of a model by name, tied ones under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def give_weights(
    models: Sequence[Any],
    checkpoint: Checkpoint,
    folder: Path,
    how: str,
    *,
    constants: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Placement:
    """Gives pending models of one folder the weights of a checkpoint, in place (`placement.place`), and ends their waiting.

    Raises:
        UserError: as `placement.place`.
    """
    from graph_passes import external_data

    tensors = held_tensors(checkpoint.model)
    where = origins(tensors, checkpoint.files)
    placement = place(
        models,
        {**tensors, **(constants or {})},
        where,
        folder,
        DATA_FILE,
        how=how,
        checkpoint=checkpoint.folder,
        named=checkpoint.source,
        progress=progress,
    )
    for model in models:
        kept = [entry for entry in model.metadata_props if entry.key != external_data.PENDING]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
    return placement


def placement_notes(placement: Placement, checkpoint: Checkpoint) -> list[str]:
    """What a user should know of where the weights are."""
    notes = []
    if placement.how == "reference":
        notes.append(f"The weights stay in the files of the checkpoint ({_gigabytes(placement.referenced)}); keep them beside model.onnx.")
    elif placement.how == "hardlink":
        notes.append(
            f"The weights ({_gigabytes(placement.referenced)}) are hard links to the files of the checkpoint: ONNX Runtime reads them, "
            f"onnx.load and onnx.checker refuse hard links; --weights copy makes a folder of its own."
        )
    elif placement.how == "clone":
        notes.append(f"The weights ({_gigabytes(placement.referenced)}) share their blocks with the files of the checkpoint.")
    moved = placement.written - placement.converted
    if placement.how in ("reference", "hardlink", "clone") and placement.written:
        kinds = [
            f"{_gigabytes(n)} {what}" for n, what in ((moved, "rearranged by transformers"), (placement.converted, "in another type")) if n
        ]
        notes.append(f"Weights that differ from the files of the checkpoint were written to {DATA_FILE} ({', '.join(kinds)}).")
    elif placement.how == "copy" and checkpoint.files and moved > HARDLINK_BYTES:
        notes.append(f"{_gigabytes(placement.written)} of weights were written; -o {checkpoint.folder} would refer to them where they are.")
    return notes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def check_options(opset: int, attention: str, logits: str, weights: str = "auto", *, single_file: bool = False) -> None:
    """Raises UserError for arguments that `export_onnx` does not take."""
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise UserError(f"opset is {opset!r}; allowed is {OPSETS[0]} to {OPSETS[-1]}.")
    if single_file and weights != "auto":
        raise UserError(f"weights {weights} and a single file exclude each other; leave out --weights or --single-file.")
    for name, value, allowed in (("attention", attention, ATTENTIONS), ("logits", logits, LOGITS), ("weights", weights, WEIGHTS)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; allowed is {', '.join(allowed)}.")


def _sizes(model: Any) -> tuple[int, int]:
    """Parameters, and the bytes of parameters and buffers (tied ones once)."""
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(p.numel() for p in model.parameters()), sum(t.numel() * t.element_size() for t in held.values())


def _vocabulary(model: Any) -> int:
    projection = model.get_output_embeddings()
    return int(projection.weight.shape[0] if projection is not None else model.config.get_text_config(decoder=True).vocab_size)


def _limits(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.text_config
    names = ("max_position_embeddings", "vocab_size", "sliding_window", "num_hidden_layers")
    return {name: getattr(config, name, None) for name in names}


def _copy_sidecars(checkpoint: Checkpoint, model: Any, stage: Path) -> None:
    model.config.save_pretrained(stage)
    generation = checkpoint.folder / "generation_config.json"
    patterns = (*_TOKENIZER_FILES, *(("*.py",) if checkpoint.trust_remote_code else ()))
    for path in (*([generation] if generation.is_file() else []), *(p for pattern in patterns for p in checkpoint.folder.glob(pattern))):
        target = stage / path.relative_to(checkpoint.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if not generation.is_file() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(stage)


def _write_manifest(stage: Path, checkpoint: Checkpoint, result: ExportResult, names: Sequence[str] | None) -> None:
    """`names`: the files that an export may have made, where the folder holds others."""
    made = (path for path in stage.rglob("*") if path.is_file()) if names is None else (stage / n for n in names if (stage / n).exists())
    files = sorted(str(path.relative_to(stage)) for path in made)
    manifest = {
        "format": FORMAT,
        "files": [*files, MANIFEST],
        "source": checkpoint.source,
        "model_type": checkpoint.config.model_type,
        "architecture": type(checkpoint.model).__name__,
        "random_weights": checkpoint.random_weights,
        "dtype": result.dtype,
        "opset": result.opset,
        "attention": result.attention,
        "sample_attention_nodes": result.sample_attention_nodes,
        "logits": result.logits,
        "parameters": result.parameters,
        "weight_bytes": result.weight_bytes,
        "weights": result.weights.as_dict(),
        "limits": result.limits,
        "inputs": [asdict(spec) for spec in result.inputs],
        "outputs": [asdict(spec) for spec in result.outputs],
        "verification": result.verification.as_dict() if result.verification else None,
        "notes": list(result.notes),
        "versions": versions(_PACKAGES),
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
