"""An exported causal LM with an explicit KV cache, driven through a polygraphy runner: prefill, chunks, decode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graph_passes import external_data
from sa_export.errors import UserError
from sa_export.hf.quiet import sentence_of

__all__ = ["DecoderInputs", "feed", "greedy", "open_session", "split_outputs"]

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class DecoderInputs:
    """The inputs of the model, as its file declares them.

    Attributes:
        names: all input names.
        past: name -> (heads, head size, numpy type) of the cache inputs [B, heads, P, head size].
    """

    names: tuple[str, ...]
    past: dict[str, tuple[int, int, Any]]

    @classmethod
    def from_model(cls, path: Path) -> DecoderInputs:
        """Reads the declarations only; no weight is loaded.

        Raises:
            UserError: the file cannot be read as ONNX or is not a causal LM with the inputs that `sa-export export` writes.
        """
        import onnx

        if not path.is_file():
            raise UserError(f"{path} does not exist; give an ONNX file written by `sa-export export` or `sa-export rewrite`.")
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:
            raise UserError(f"{path} cannot be read as ONNX ({type(error).__name__}); export the model again.") from None
        if external_data.is_pending(model):
            raise UserError(f"{path} has no weights yet; add them with `sa-export attach`.")
        graph = model.graph
        past = {}
        initializers = {i.name for i in graph.initializer}
        names = tuple(i.name for i in graph.input if i.name not in initializers)
        for value in graph.input:
            if _PAST.fullmatch(value.name):
                dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
                if len(dims) != 4 or not (dims[1] and dims[3]):
                    raise UserError(
                        f"{path}: {value.name} must have shape [batch, heads, past, head size] with fixed heads and head size, got {dims}."
                    )
                past[value.name] = (dims[1], dims[3], onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        outputs = {o.name for o in graph.output}
        if "input_ids" not in names or "logits" not in outputs:
            raise UserError(
                f"{path} is no causal LM as `sa-export export` writes it: it needs the input input_ids and the output logits, it has {', '.join(names)} -> {', '.join(sorted(outputs)[:4])}."
            )
        unknown = [n for n in names if n not in ("input_ids", "attention_mask", "position_ids") and n not in past]
        if unknown:
            raise UserError(
                f"{path} has inputs that check cannot fill: {', '.join(unknown)}; known are input_ids, attention_mask, position_ids, past_key_values.N.key/value."
            )
        return cls(names, past)


def open_session(model: Path | bytes, folder: Path | None = None) -> Any:
    """An ONNX Runtime CPU session; `folder` holds the external data of a model given as bytes.

    Raises:
        UserError: ONNX Runtime refuses the model (its first line is quoted).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = "the model" if isinstance(model, bytes) else model
        raise UserError(f"ONNX Runtime does not load {what}: {sentence_of(error)[:300]}") from None


def feed(
    inputs: DecoderInputs, ids: np.ndarray, mask: np.ndarray | None = None, past: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A feed of the model.

    Args:
        inputs: what the model declares.
        ids: [B, S] int64.
        mask: [B, P + S] int64, 1 = real token; None = all real.
        past: `past_key_values.*` -> [B, heads, P, head size]; None = empty cache.
    """
    B, S = ids.shape
    P = next(iter(past.values())).shape[2] if past else 0
    mask = np.ones((B, P + S), np.int64) if mask is None else mask.astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, P:]
    values = {"input_ids": ids.astype(np.int64), "attention_mask": mask, "position_ids": positions}
    out = {name: values[name] for name in inputs.names if name in values}
    for name, (heads, size, dtype) in inputs.past.items():
        out[name] = past[name] if past else np.zeros((B, heads, 0, size), dtype)
    return out


def split_outputs(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits [B, S, V] float32, cache by the names of the past inputs)."""
    past = {
        name.replace("present", "past_key_values", 1): np.asarray(value) for name, value in outputs.items() if name.startswith("present.")
    }
    return np.asarray(outputs["logits"]).astype(np.float32), past


def greedy(runner: Any, inputs: DecoderInputs, prompt: np.ndarray, tokens: int) -> list[int]:
    """Greedy continuation through the cache: one prefill of `prompt` [S], then one token at a time.

    Raises:
        UserError: the model has no cache inputs.
    """
    if not inputs.past:
        raise UserError("The model has no past_key_values inputs, so a continuation would recompute everything; export it with its cache.")
    logits, past = split_outputs(runner.infer(feed(inputs, prompt[None])))
    out = [int(logits[0, -1].argmax())]
    while len(out) < tokens:
        logits, past = split_outputs(runner.infer(feed(inputs, np.asarray([[out[-1]]]), past=past)))
        out.append(int(logits[0, -1].argmax()))
    return out
