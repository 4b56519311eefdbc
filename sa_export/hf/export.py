"""A checkpoint as an ONNX folder: traced, written, verified against the torch model, and only then put in place."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.folder import FORMAT, MANIFEST, check_replaceable, check_space, staged_folder
from sa_export.hf.load import Checkpoint
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import quiet_libraries
from sa_export.hf.step import LOGITS, TensorSpec, input_specs, output_specs, probe
from sa_export.hf.trace import ATTENTIONS, DATA_FILE, MODEL_FILE, attention_implementation, release, trace, traceable_experts, write
from sa_export.hf.verify import Verification, verify_export
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
_PACKAGES = ("sa-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportResult:
    """What an export made and how it was proved."""

    folder: Path
    model_path: Path
    data_path: Path | None
    """The weights, None when they are inside `model_path`."""
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
    force: bool = False,
    may_replace: Sequence[str] = (),
    verify: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> ExportResult:
    """Exports a checkpoint into a new folder: `model.onnx`, `model.onnx.data`, configuration, tokenizer and `export.json`.

    Graph (B batch, S new tokens, P tokens before them, all free, P may be 0): `input_ids` [B, S], `attention_mask` [B, P + S] and
    `position_ids` [B, S], int64; `past_key_values.N.key` / `.value` [B, Hkv, P, D] -> `logits` [B, S, V] or [B, 1, V] and
    `present.N.key` / `.value` [B, Hkv, P + S, D]. The element type is the checkpoint's `dtype`.

    Memory: while tracing and writing, the weights are held once (the graph refers to the torch tensors; a checkpoint that is stored in
    `dtype` is mapped from its file and can be paged out). Verification in float32 maps the written file; in float16 and bfloat16 it holds,
    besides, the weights in float32: first in torch, in place of the others, then in ONNX Runtime (three times the weight bytes in all).

    Args:
        checkpoint: from `load_checkpoint`.
        output: the folder to make. It appears only when everything has succeeded.
        opset: version of the standard operators, 18 to 24.
        attention: "sdpa" or "eager" as transformers writes them; "sample": a `SampleAttention` node (policy dense, every attribute on the
            node, key mask bool) for each full causal layer, the ordinary operators for sliding windows, soft-caps and sinks.
        logits: "all", or "last": one row an item, its last attended new token, chosen before the projection to the vocabulary.
        single_file: puts the weights into `model.onnx` (below 2 GiB only).
        force: replaces an earlier export in `output`, after success.
        may_replace: patterns of further files in an earlier export that `force` may discard.
        verify: compares the graph with the torch model (`verify_export`); without it nothing proves the export.
        seed: of the tokens that it is compared on.
        progress: stages "probe", "trace", "write", "verify".

    Raises:
        UserError: wrong arguments, a model that cannot be exported or differs once exported, an output folder that may not be replaced,
            no space. `output` is then what it was before.
    """
    check_options(opset, attention, logits)
    output = Path(output).expanduser().absolute()
    check_replaceable(output, force=force, may_replace=may_replace)
    model = checkpoint.model
    parameters, weight_bytes = _sizes(model)
    if single_file and weight_bytes > _SINGLE_FILE_BYTES:
        raise UserError(f"The weights take {weight_bytes / 2**30:.1f} GiB and one ONNX file holds less than 2; leave out --single-file.")
    notes = list(checkpoint.notes)
    with quiet_libraries(), staged_folder(output, force=force, may_replace=may_replace) as stage:
        check_space(stage.parent, weight_bytes)
        progress("probe", None)
        layers = probe(model)
        inputs = input_specs(layers, checkpoint.dtype)
        outputs = output_specs(layers, checkpoint.dtype, _vocabulary(model), logits)
        with attention_implementation(model, attention) as runs, traceable_experts(model) as has_experts:
            progress("trace", None)
            graph_model = trace(model, layers, inputs, outputs, opset=opset, logits=logits)
        if has_experts:
            notes.append("Expert layers gather their weights once a token in this graph: long prompts need much memory.")
        if runs != attention:
            notes.append(f"{type(model).__name__} has no {attention} attention; the graph holds its {runs} attention.")
        sites = write(graph_model, stage, single_file=single_file, progress=progress)
        if attention == "sample" and sites == 0:
            raise UserError(
                f"{type(model).__name__} has no layer that is full causal without window, soft-cap and sinks; "
                f"export it with attention 'sdpa'."
            )
        release(graph_model)
        del graph_model
        gc.collect()  # so that verification, which swaps the torch tensors for others, does not keep both
        _copy_sidecars(checkpoint, stage)
        verification = verify_export(stage / MODEL_FILE, checkpoint, seed=seed, progress=progress) if verify else None
        result = ExportResult(
            folder=output,
            model_path=output / MODEL_FILE,
            data_path=None if single_file else output / DATA_FILE,
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
        _write_manifest(stage, checkpoint, result)
    return result


def check_options(opset: int, attention: str, logits: str) -> None:
    """Raises UserError for arguments that `export_onnx` does not take."""
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise UserError(f"opset is {opset!r}; allowed is {OPSETS[0]} to {OPSETS[-1]}.")
    for name, value, allowed in (("attention", attention, ATTENTIONS), ("logits", logits, LOGITS)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; allowed is {', '.join(allowed)}.")


def _sizes(model: Any) -> tuple[int, int]:
    """Parameters, and the bytes of parameters and buffers (tied ones once)."""
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(p.numel() for p in model.parameters()), sum(t.numel() * t.element_size() for t in held.values())


def _vocabulary(model: Any) -> int:
    projection = model.get_output_embeddings()
    return int(projection.weight.shape[0] if projection is not None else model.config.get_text_config(decoder=True).vocab_size)


def _limits(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.text_config
    names = ("max_position_embeddings", "vocab_size", "sliding_window", "num_hidden_layers")
    return {name: getattr(config, name, None) for name in names}


def _copy_sidecars(checkpoint: Checkpoint, stage: Path) -> None:
    checkpoint.model.config.save_pretrained(stage)
    generation = checkpoint.folder / "generation_config.json"
    patterns = (*_TOKENIZER_FILES, *(("*.py",) if checkpoint.trust_remote_code else ()))
    for path in (*([generation] if generation.is_file() else []), *(p for pattern in patterns for p in checkpoint.folder.glob(pattern))):
        target = stage / path.relative_to(checkpoint.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if not generation.is_file() and getattr(checkpoint.model, "generation_config", None) is not None:
        checkpoint.model.generation_config.save_pretrained(stage)


def _write_manifest(stage: Path, checkpoint: Checkpoint, result: ExportResult) -> None:
    files = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
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
        "limits": result.limits,
        "inputs": [asdict(spec) for spec in result.inputs],
        "outputs": [asdict(spec) for spec in result.outputs],
        "verification": result.verification.as_dict() if result.verification else None,
        "notes": list(result.notes),
        "versions": versions(_PACKAGES),
    }
    (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
