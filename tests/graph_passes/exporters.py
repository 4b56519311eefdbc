"""Tiny models with random weights, as torch.onnx exports them today."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXPORTS", "Export", "export", "key"]

HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY, LAYERS = 4, 2, 16, 97, 2


@dataclass(frozen=True)
class Export:
    """One export.

    Attributes:
        family: `llama`, `qwen2`, `qwen2-window` (the second layer slides over 4096 keys) or `bert`.
        attention: `sdpa`, `eager` or `sample` (one SampleAttention node a layer).
        with_mask: the model takes an attention_mask.
    """

    family: str
    attention: str
    opset: int
    past: bool = True
    with_mask: bool = True
    dynamo: bool = True


EXPORTS = {
    "llama sdpa 20": Export("llama", "sdpa", 20),
    "llama eager 18": Export("llama", "eager", 18),
    "qwen2 sdpa 23": Export("qwen2", "sdpa", 23),
    "llama sdpa 20, no past": Export("llama", "sdpa", 20, past=False),
    "llama sdpa 20, no past, no mask": Export("llama", "sdpa", 20, past=False, with_mask=False),
    "llama sample 20": Export("llama", "sample", 20),
    "llama sdpa 18, torchscript": Export("llama", "sdpa", 18, dynamo=False),
    "llama eager 18, torchscript": Export("llama", "eager", 18, dynamo=False),
    "qwen2 window sdpa 18, torchscript": Export("qwen2-window", "sdpa", 18, dynamo=False),
    "bert eager 18, torchscript": Export("bert", "eager", 18, past=False, dynamo=False),
}


def key(spec: Export) -> str:
    """Changes when the export could come out otherwise."""
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
    parts = [repr(asdict(spec)), *(importlib.metadata.version(p) for p in packages), Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def export(spec: Export, path: Path) -> None:
    """Writes the export to `path`, its weights inside."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = _model(spec)
    b, s, p = 2, 5, 3 if spec.past else 0
    wrapper = _wrapper(spec)(model)
    batch, sequence = {0: "batch"}, {0: "batch", 1: "seq"}
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, VOCABULARY, (b, s))}
    shapes: dict[str, Any] = {"input_ids": sequence}
    if spec.with_mask:
        inputs["attention_mask"] = torch.ones(b, s + p, dtype=torch.int64)
        shapes["attention_mask"] = {0: "batch", 1: "past + seq" if spec.past else "seq"}
    if spec.family != "bert":
        inputs["position_ids"] = torch.arange(p, p + s)[None].repeat(b, 1)
        shapes["position_ids"] = sequence
    names, outputs = list(inputs), ["logits"]
    if spec.past:
        inputs["past"] = [tuple(torch.randn(b, KV_HEADS, p, HEAD_SIZE) for _ in range(2)) for _ in range(LAYERS)]
        shapes["past"] = [({**batch, 2: "past"}, {**batch, 2: "past"})] * LAYERS
        names += [f"past_key_values.{i}.{k}" for i in range(LAYERS) for k in ("key", "value")]
        outputs += [f"present.{i}.{k}" for i in range(LAYERS) for k in ("key", "value")]
    temporary = path.with_suffix(f".{os.getpid()}.part")
    if not spec.dynamo:
        _torchscript(spec, wrapper, inputs, names, outputs, temporary)
        temporary.rename(path)
        return
    dims = {name: torch.export.Dim(name) for name in ("batch", "seq", "past")}
    dims["past + seq"] = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        wrapper,
        (),
        kwargs=inputs,
        dynamo=True,
        opset_version=spec.opset,
        dynamic_shapes=_with_dims(shapes, dims),
        input_names=names,
        output_names=outputs,
        verbose=False,
        optimize=True,
    )
    program.save(str(temporary))
    temporary.rename(path)


def _torchscript(spec: Export, model: Any, inputs: dict[str, Any], names: list[str], outputs: list[str], path: Path) -> None:
    """The older exporter; it names only the lengths that it is told, and the columns of the mask otherwise than those of the keys."""
    import torch

    axes = {n: {0: "batch", 2: "past"} for n in names if n.startswith("past")}
    axes |= {n: {0: "batch", 1: "total" if spec.past and n == "attention_mask" else "seq"} for n in names if n not in axes}

    class Flat(torch.nn.Module):
        """Takes everything as positional tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            named = dict(zip(names, tensors, strict=True))
            cache = [named.pop(n) for n in names if n.startswith("past")]
            past = {"past": list(zip(cache[::2], cache[1::2], strict=True))} if cache else {}
            return self.model(**named, **past)

    flat = (*(inputs[n] for n in names if n in inputs), *(x for layer in inputs.get("past", ()) for x in layer))
    torch.onnx.export(
        Flat(), flat, str(path), dynamo=False, opset_version=spec.opset, dynamic_axes=axes, input_names=names, output_names=outputs
    )


def _with_dims(shapes: Any, dims: dict[str, Any]) -> Any:
    if isinstance(shapes, str):
        return dims[shapes]
    if isinstance(shapes, dict):
        return {k: _with_dims(v, dims) for k, v in shapes.items()}
    return type(shapes)(_with_dims(v, dims) for v in shapes)


def _model(spec: Export) -> Any:
    import transformers

    common = {
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "attn_implementation": spec.attention if spec.attention != "sample" else _register_sample(),
    }
    if spec.family == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**common)).eval()
    common["num_key_value_heads"] = KV_HEADS
    if spec.family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)).eval()
    if spec.family == "qwen2-window":
        common |= {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common)).eval()


def _wrapper(spec: Export) -> Any:
    import torch
    from transformers.cache_utils import DynamicCache

    class Decoder(torch.nn.Module):
        """A causal model with its cache as flat tensors."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, position_ids: Any, past: Any = None, attention_mask: Any = None) -> Any:
            cache = DynamicCache(past) if past is not None else None
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=past is not None,
            )
            if past is None:
                return out.logits
            return (out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)))

    class Encoder(torch.nn.Module):
        """A bidirectional model."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    return Encoder if spec.family == "bert" else Decoder


def _register_sample() -> str:
    """An attention implementation that leaves one bare SampleAttention node a layer in the graph."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, scaling: float | None = None, **_: Any) -> Any:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.onnx.ops.symbolic(
            "sample_attention::SampleAttention",
            (q, k, v, attention_mask.to(torch.bool)),
            {"scale": float(scale), "is_causal": 1, "policy": "dense"},
            dtype=q.dtype,
            shape=(*q.shape[:3], v.shape[3]),
            version=1,
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_sample", attend)
    AttentionMaskInterface.register("test_sample", lambda *args, attention_mask=None, **kwargs: attention_mask)
    return "test_sample"
