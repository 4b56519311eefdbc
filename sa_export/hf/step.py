"""One step of generation as a pure function of tensors: what is traced, and what its inputs and outputs are called.

Letters: B batch, S new tokens, P tokens in the cache (0 at first), V vocabulary, H heads of a cached layer, D and Dv their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.quiet import sentence_of
from sa_export.hf.skeleton import fake_mode

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
LOGITS = ("all", "last")


@dataclass(frozen=True)
class CacheLayer:
    """The sizes of one layer of the cache: keys [B, heads, T, key_size], values [B, heads, T, value_size]."""

    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: its name, element type and shape; a dimension is a number or the name of a free one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def input_specs(layers: tuple[CacheLayer, ...], dtype: str) -> tuple[TensorSpec, ...]:
    """The inputs of the exported graph, in order."""
    ids = (
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
    )
    return (*ids, *_cache_specs("past_key_values", PAST, layers, dtype))


def output_specs(layers: tuple[CacheLayer, ...], dtype: str, vocabulary: int, logits: str) -> tuple[TensorSpec, ...]:
    """The outputs of the exported graph, in order."""
    rows: int | str = 1 if logits == "last" else SEQUENCE
    return (TensorSpec("logits", dtype, (BATCH, rows, vocabulary)), *_cache_specs("present", TOTAL, layers, dtype))


def _cache_specs(prefix: str, length: str, layers: tuple[CacheLayer, ...], dtype: str) -> Iterator[TensorSpec]:
    for i, layer in enumerate(layers):
        yield TensorSpec(f"{prefix}.{i}.key", dtype, (BATCH, layer.heads, length, layer.key_size))
        yield TensorSpec(f"{prefix}.{i}.value", dtype, (BATCH, layer.heads, length, layer.value_size))


def new_cache(past: Any = None) -> Any:
    """A cache in which every layer keeps all its tokens, sliding layers too: their window is in the mask.

    So `past_key_values` has one length for all layers, and a prompt can be resumed at any chunk.
    """
    from transformers import DynamicCache

    return DynamicCache() if past is None else DynamicCache(past)


def cached_tensors(cache: Any) -> list[tuple[Any, Any]]:
    """(keys, values) of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def last_attended(attention_mask: Any, rows: int) -> Any:
    """The last attended position of each item among the newest `rows` tokens, counted from the first of them.

    Args:
        attention_mask: [B, P + rows], 1 = attended.

    Returns:
        [B, 1] int64. An item with no attended token among them gets 0; its logits mean nothing, as do those of any padding.
    """
    import torch

    newest = attention_mask[:, attention_mask.shape[1] - rows :]
    return torch.where(newest != 0, torch.arange(rows), 0).amax(-1, keepdim=True)


@contextmanager
def step_module(model: Any, logits: str) -> Iterator[Any]:
    """The module to trace: `(input_ids, attention_mask, position_ids, past)` -> `(logits, key 0, value 0, key 1, ...)`.

    With `logits="last"` the hidden states are reduced to one row an item *before* the vocabulary projection, so that no [B, S, V]
    tensor exists. This is done at the door of the projection: `logits_to_keep` of transformers keeps the last rows, which are padding in
    a right-padded item, and its per-item form cannot be traced with free lengths.

    Raises:
        UserError: the model has no module that projects to the vocabulary.
    """
    from torch import Tensor, nn, zeros

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.rows = zeros(0)

        def select(self, projection: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = arguments
            return (hidden.gather(1, self.rows[..., None].expand(-1, -1, hidden.shape[-1])), *rest)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
            if logits == "last":
                self.rows = last_attended(attention_mask, input_ids.shape[1])
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=new_cache(past),
                use_cache=True,
                return_dict=True,
            )
            return (out.logits, *(tensor for pair in cached_tensors(out.past_key_values) for tensor in pair))

    step = Step().eval()
    projection = model.get_output_embeddings()
    if logits == "last" and projection is None:
        raise UserError(f"{type(model).__name__} has no output projection to select rows at; export it with logits 'all'.")
    hook = projection.register_forward_pre_hook(step.select) if logits == "last" else None
    try:
        yield step
    finally:
        if hook is not None:
            hook.remove()


def probe(model: Any) -> tuple[CacheLayer, ...]:
    """The layers of the model's cache, found by running eight tokens; checks on the way that the model is what the export assumes.

    A skeleton (`skeleton.build_skeleton`) runs without values: then the layers are found, and its modules' own word is taken for their
    being causal.

    Raises:
        UserError: the model does not run, its logits depend on later tokens (it is bidirectional), or its state between steps is not
            one pair of [B, H, T, D] tensors a layer (recurrent and linear-attention models).
    """
    import torch

    mode = fake_mode(model)
    has_values = isinstance(mode, nullcontext)

    name = type(model).__name__
    tokens = 8
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(tokens)[None] % vocabulary
    other = ids.clone()
    other[0, -1] = (other[0, -1] + vocabulary // 2) % vocabulary
    logits = []
    try:
        with torch.no_grad(), mode:
            for given in (ids, other) if has_values else (ids,):
                cache = new_cache()
                arguments = {"input_ids": given, "attention_mask": torch.ones_like(given), "position_ids": torch.arange(tokens)[None]}
                out = model(**arguments, past_key_values=cache, use_cache=True, return_dict=True)
                logits.append(out.logits.float())
    except Exception as error:
        _refuse_other_states(model)
        raise UserError(f"{name} does not run as a causal language model with a key/value cache: {sentence_of(error)}") from error
    if not _is_causal(model, logits):
        raise UserError(
            f"{name} is bidirectional: an earlier token sees a later one; only decoder-only causal language models can be exported."
        )
    if getattr(out, "past_key_values", None) is None:
        _refuse_other_states(model)
        raise UserError(f"{name} gives no cache of keys and values back; only models that generate with one can be exported.")
    layers = getattr(out.past_key_values, "layers", ())
    pairs: list[tuple[Any, Any]] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or any(t is None or t.ndim != 4 or t.shape[2] != tokens for pair in pairs for t in pair):
        raise UserError(
            f"{name} keeps a state other than keys and values between steps (recurrent or linear attention); it cannot be exported."
        )
    return tuple(CacheLayer(k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs)


def _refuse_other_states(model: Any) -> None:
    """Raises UserError when transformers' own cache for the model has layers that are not keys and values alone."""
    from transformers import DynamicCache

    usual = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a configuration that says nothing of its layers
        return
    other = ", ".join(sorted({type(x).__name__ for x in layers} - usual))
    if other:
        raise UserError(f"{type(model).__name__} keeps a state other than keys and values between steps ({other}); it cannot be exported.")


def _is_causal(model: Any, logits: list[Any]) -> bool:
    """Whether two runs that differ in the last token alone agree on the others; without values, what the modules say."""
    import torch

    if len(logits) == 1:
        return getattr(model.config, "is_causal", True) is not False and all(
            getattr(module, "is_causal", True) is not False for module in model.modules()
        )
    scale = logits[0].abs().max().item()
    # The same row of the same call shape differs by rounding alone (experts regroup their tokens).
    noise = max(1e-5, 4 * torch.finfo(model.dtype).eps) * scale
    return bool((logits[0][:, :-1] - logits[1][:, :-1]).abs().max().item() <= noise)
