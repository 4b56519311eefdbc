"""torch.onnx, the way that users of plain PyTorch export: a wrapper with flat cache tensors, dynamo or TorchScript."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data import families

__all__ = ["VARIANTS", "Variant", "decoder", "example", "export"]

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class Variant:
    """One way to call torch.onnx."""

    attention: str
    opset: int
    past: bool = True
    dynamic: bool = True
    dtype: str = "float32"
    optimize: bool = True
    dynamo: bool = True


VARIANTS = {
    "dynamo-eager-18": Variant("eager", 18),
    "dynamo-sdpa-18": Variant("sdpa", 18),
    "dynamo-eager-20": Variant("eager", 20),
    "dynamo-sdpa-20": Variant("sdpa", 20),
    "dynamo-sdpa-23": Variant("sdpa", 23),
    "dynamo-eager-24": Variant("eager", 24),
    "dynamo-sdpa-24": Variant("sdpa", 24),
    "dynamo-eager-20-fp16": Variant("eager", 20, dtype="float16"),
    "dynamo-sdpa-20-fp16": Variant("sdpa", 20, dtype="float16"),
    "dynamo-sdpa-23-fp16": Variant("sdpa", 23, dtype="float16"),
    "dynamo-eager-20-nopast": Variant("eager", 20, past=False),
    "dynamo-sdpa-20-nopast": Variant("sdpa", 20, past=False),
    "dynamo-sdpa-20-static": Variant("sdpa", 20, dynamic=False),
    "dynamo-sdpa-20-raw": Variant("sdpa", 20, optimize=False),
    "torchscript-eager-18": Variant("eager", 18, dynamo=False),
    "torchscript-sdpa-18": Variant("sdpa", 18, dynamo=False),
    "torchscript-eager-18-nopast": Variant("eager", 18, past=False, dynamo=False),
    "torchscript-eager-11": Variant("eager", 11, dynamo=False),
    "torchscript-eager-14": Variant("eager", 14, dynamo=False),
    "torchscript-sdpa-17": Variant("sdpa", 17, dynamo=False),
    "torchscript-sdpa-18-fp16": Variant("sdpa", 18, dtype="float16", dynamo=False),
}

BATCH, ROWS, PAST = 2, 12, 5
"""Sizes of the example, all different; the prompt alone is longer than a tiny window."""


def decoder(model: Any, names: list[str]) -> Any:
    """A module of flat tensors, `names` in order: one step of the model, with its cache when the names hold one."""
    import torch
    from transformers.cache_utils import DynamicCache

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            named = dict(zip(names, tensors, strict=True))
            flat = [named.pop(n) for n in names if n.startswith("past_key_values")]
            cache = DynamicCache() if flat else None
            for layer, (keys, values) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
                cache.update(keys, values, layer)
            out = self.model(**named, past_key_values=cache, use_cache=cache is not None)
            if cache is None:
                return out.logits
            return (out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)))

    return Decoder().eval()


def example(model: Any, *, past: bool) -> dict[str, Any]:
    """Example inputs of a model by the names that they get in the graph."""
    import torch
    from transformers.cache_utils import DynamicCache

    p = PAST if past else 0
    out = {
        "input_ids": torch.arange(BATCH * ROWS).reshape(BATCH, ROWS) % (families.VOCABULARY - 3) + 3,
        "attention_mask": torch.ones(BATCH, p + ROWS, dtype=torch.int64),
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        out["position_ids"] = torch.arange(p, p + ROWS)[None].repeat(BATCH, 1)
    if past:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=out["input_ids"][:, :PAST], past_key_values=cache, use_cache=True)
        for i, layer in enumerate(cache.layers):
            out[f"past_key_values.{i}.key"], out[f"past_key_values.{i}.value"] = layer.keys, layer.values
    return out


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    import torch

    how = VARIANTS[variant]
    model = families.build(family, how.attention, how.dtype)
    inputs = example(model, past=how.past)
    names = list(inputs)
    outputs = ["logits", *(n.replace("past_key_values", "present") for n in names if n.startswith("past"))]
    step = decoder(model, names)
    with torch.no_grad():
        if how.dynamo:
            shapes = tuple(_lengths(n, how) for n in names) if how.dynamic else None
            program = torch.onnx.export(
                step,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=how.opset,
                dynamic_shapes=(shapes,) if shapes else None,
                input_names=names,
                output_names=outputs,
                optimize=how.optimize,
                verbose=False,
            )
            program.save(str(path))
            return
        axes = {n: _axes(n, how) for n in names}
        axes |= {n: {0: "batch", 2: "total"} if n.startswith("present") else {0: "batch", 1: "rows"} for n in outputs}
        torch.onnx.export(
            step,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=how.opset,
            dynamic_axes=axes if how.dynamic else None,
            input_names=names,
            output_names=outputs,
        )


def _axes(name: str, how: Variant) -> dict[int, str]:
    if name.startswith("past"):
        return {0: "batch", 2: "past"}
    return {0: "batch", 1: "total" if name == "attention_mask" and how.past else "rows"}


def _lengths(name: str, how: Variant) -> dict[int, Any]:
    """torch.export has no name for the sum of two free lengths: the mask's columns are free by themselves."""
    from torch.export import Dim

    return {axis: Dim.DYNAMIC if dim == "total" else Dim(dim) for axis, dim in _axes(name, how).items()}
