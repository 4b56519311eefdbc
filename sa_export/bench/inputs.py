"""Queries, keys and values to time attention on: planted structure with a seed, or captured from a model while it reads a prompt.

Noise is no test of a sparse method (nothing can be dropped), and a mask drawn at random hides the cost of finding it. Planted inputs have what is seen in trained
models (StreamingLLM, arXiv 2309.17453; MInference, arXiv 2407.02490; SampleAttention, arXiv 2406.15486): sinks, local attention, stripes (keys that every query
looks for), slashes (keys at a fixed distance) and heads that attend to everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_export.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Inputs", "captured", "noise", "planted"]

KINDS = ("local", "stripes", "slashes", "stripes", "local", "sink", "slashes", "diffuse")
"""Kind of key/value head h of n: entry floor(8 h / n). One head in eight is diffuse."""

_WIDTH = 96.0  # tokens: the reach of local attention and of a slash
_PEAK = 14.0  # nats between a key that is looked for and the mean of the others
_SINK_TOKENS = 4
_STRIPE_TOKENS = 16  # a stripe is a short passage, not one token


@dataclass(frozen=True)
class Inputs:
    """query [B, Hq, N, D], key and value [B, Hkv, N, D] on one device, and in words where they come from."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    source: str


def noise(length: int, *, heads: int, kv_heads: int, head_size: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Independent normal numbers: attention without structure, the worst case of any sparse method."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(batch, count, length, head_size, generator=generator, device=device, dtype=dtype)

    return Inputs(draw(heads), draw(kv_heads), draw(kv_heads), f"noise, seed {seed}")


def planted(
    length: int,
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
    stripe_share: float = 0.03,
) -> Inputs:
    """Planted structure; scores are meant for the scale 1/sqrt(head_size).

    Positions enter through random Fourier features: with frequencies of standard deviation 1/w, `phi(i) . phi(j)` falls like exp(-(i - j)^2 / 2 w^2), so a query
    `phi(i - u)` looks for the keys about u tokens back (u = 0: local). Content enters through one direction a head, which stripe keys carry. Every head looks for the
    first tokens, whose values are small, as in trained models. Heads of one group share their key/value head's kind, with strengths of their own.

    Args:
        stripe_share: share of the key blocks (of 64) that carry a stripe, in heads of that kind.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    kind = [KINDS[8 * h // kv_heads] for h in range(kv_heads)]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    group, half = heads // kv_heads, head_size // 2
    amplitude = (_PEAK * head_size**0.5) ** 0.5  # so that amplitude^2 * scale = _PEAK
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    query = torch.empty(batch, heads, length, head_size, device=device, dtype=dtype)
    key = torch.empty(batch, kv_heads, length, head_size, device=device, dtype=dtype)
    value = torch.empty_like(key)
    for h in range(kv_heads):
        frequency = normal(half) / _WIDTH
        phase = torch.rand(half, generator=generator, device=device) * 6.2832

        def features(at: torch.Tensor, frequency: torch.Tensor = frequency, phase: torch.Tensor = phase) -> torch.Tensor:
            angle = at * frequency + phase
            return torch.cat([angle.cos(), angle.sin()], -1) / half**0.5

        direction = torch.nn.functional.normalize(normal(head_size), dim=0)
        count = max(4, round(stripe_share * length / 64))
        # Spread over the prompt, at random within each part: rows before the first stripe would have nothing to look for.
        stripes = (
            (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) * (length // 64) / count
        ).long() * 64
        stripes = (stripes[:, None] + torch.arange(_STRIPE_TOKENS, device=device)).flatten()
        distances = (0.02 + 0.9 * torch.rand(2, generator=generator, device=device)) * length
        for b in range(batch):
            k = 0.3 * normal(length, head_size)
            if kind[h] in ("local", "slashes", "sink"):
                k += amplitude * features(position)
            if kind[h] == "stripes":
                k[stripes] += amplitude * direction
            k[:_SINK_TOKENS] += 1.2 * amplitude * direction
            v = normal(length, head_size)
            v[:_SINK_TOKENS] *= 0.1
            key[b, h], value[b, h] = k, v
            for g in range(group):
                strength = 0.85 + 0.3 * torch.rand((), generator=generator, device=device)
                q = 0.3 * normal(length, head_size) + 0.8 * amplitude * direction
                if kind[h] == "stripes":
                    q += 0.2 * amplitude * direction
                elif kind[h] in ("local", "sink"):
                    q += (1.0 if kind[h] == "local" else 0.7) * amplitude * features(position)
                elif kind[h] == "slashes":
                    q += amplitude * (features(position) + features(position - distances[g % 2])) / 1.2
                elif kind[h] == "diffuse":
                    q = normal(length, head_size)
                query[b, h * group + g] = strength * q
    return Inputs(query, key, value, f"planted, seed {seed}, stripes in {stripe_share:.1%} of the blocks")


def captured(model: Path, length: int, *, layer: int | None, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """What one layer of a transformers checkpoint hands to its attention while it reads a prompt of `length` tokens (batch 1).

    Args:
        layer: index of the layer; None takes the middle one.

    Raises:
        UserError: the model does not load, has no such layer, or does not reach its attention through transformers' AttentionInterface.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function

    from sa_export.check.prompts import make_prompts
    from sa_export.hf.load import load_checkpoint

    checkpoint = load_checkpoint(model, dtype=str(dtype).removeprefix("torch."))
    if checkpoint.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, which is needed to make a prompt; give a folder with tokenizer.json.")
    network = checkpoint.model.to(device)
    count = int(network.config.num_hidden_layers)
    layer = count // 2 if layer is None else layer
    if not 0 <= layer < count:
        raise UserError(f"--layer is {layer}; allowed is 0 to {count - 1}, as {model} has {count} layers.")
    tokenizer = checkpoint.tokenizer
    prompt = make_prompts(
        lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids),
        length=length,
        count=1,
        needles=min(8, length // 256),
        seed=seed,
    )[0]
    kept: dict[int, tuple[Any, Any, Any, float]] = {}

    def attention(module: Any, q: Any, k: Any, v: Any, _mask: Any, scaling: float | None = None, **_kwargs: Any) -> Any:
        if int(module.layer_idx) == layer:
            kept[layer] = (q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sa_export_capture", attention)

    def mask(*_args: Any, mask_function: Any = causal_mask_function, local_size: Any = None, **_kwargs: Any) -> None:
        if mask_function is not causal_mask_function or local_size is not None:
            raise UserError(f"{model} has windowed, chunked or packed attention; capture from a model whose layers are all fully causal.")

    AttentionMaskInterface.register("sa_export_capture", mask)
    network.config._attn_implementation = "sa_export_capture"
    with torch.no_grad():
        network(input_ids=torch.from_numpy(prompt.ids)[None].to(device), use_cache=False, logits_to_keep=1)
    if layer not in kept:
        raise UserError(f"Layer {layer} of {model} does not reach its attention through transformers' AttentionInterface; capture another.")
    q, k, v, scale = kept[layer]
    # The kernels and the baselines scale by 1/sqrt(D): another scale goes into the queries.
    q = (q.float() * (scale * q.shape[-1] ** 0.5)).to(dtype)
    return Inputs(q.contiguous(), k.to(dtype).contiguous(), v.to(dtype).contiguous(), f"{model.name}, layer {layer}, prompt seed {seed}")
