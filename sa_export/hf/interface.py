"""transformers' own door for attention: full causal layers become one `SampleAttention` node each while a model is exported.

transformers lets a model's attention and its mask builder be replaced by name (`AttentionInterface`, `AttentionMaskInterface`). Both
are replaced here, since with the attention alone transformers builds no mask at all and padding and windows would vanish unseen.
"""

from __future__ import annotations

import sys
from typing import Any

from graph_passes import op
from sa_export.errors import UserError

NAME = "sample_attention"
"""The name under which transformers finds this implementation."""

_NEUTRAL_KEYWORDS = frozenset(
    {"dropout", "scaling", "softcap", "s_aux", "sinks", "sliding_window", "position_ids", "is_causal", "use_cache", "output_router_logits"}
)
"""Keywords whose effect is known here; `position_ids`, `use_cache` and `output_router_logits` have none on attention over a padding mask."""


def register() -> None:
    """Makes `NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    **keywords: Any,
) -> Any:
    """What an attention layer receives as its mask.

    A mask that is causal and padding, nothing more, stays the padding mask [B, T] (bool); `attention` recognises it by its two
    dimensions. Any other (sliding, chunked, packed, block-wise) becomes the usual [B, 1, S, T] (bool).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function and local_size is None and keywords.get("kv_offset", 0) == 0
    if plain and attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask
    keywords["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **keywords,
    )


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[Any, None]:
    """One attention layer.

    Args:
        module: the layer.
        query: [B, Hq, S, D] after RoPE and QK-norm.
        key, value: [B, Hkv, T, D] and [B, Hkv, T, Dv], the past in front, heads not repeated.
        attention_mask: from `mask`.
        scaling: factor of the scores; None is 1/sqrt(D).

    Returns:
        [B, S, Hq, Dv], and None in place of the probabilities.
    """
    _refuse_unknown_tensors(module, keywords)
    sinks = next((keywords[name] for name in ("s_aux", "sinks") if keywords.get(name) is not None), None)
    if softcap or sinks is not None:
        # Only the model's own code knows how it caps scores or weighs sinks.
        return _eager(module, query, key, value, attention_mask, scaling, dropout, softcap, keywords)
    if not _is_full_causal(module, attention_mask, keywords) or not _exporting():
        return _sdpa(module, query, key, value, attention_mask, scaling, dropout, keywords)
    import torch

    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.onnx.ops.symbolic(
        f"{op.DOMAIN}::{op.OP_TYPE}",
        (query, key, value, attention_mask),
        op.node_attributes(op.Policy(policy="dense"), scale=float(factor)),
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=op.VERSION,
    )
    return out.transpose(1, 2).contiguous(), None


def _is_full_causal(module: Any, attention_mask: Any, keywords: dict[str, Any]) -> bool:
    return (
        attention_mask is not None
        and attention_mask.ndim == 2
        and keywords.get("sliding_window") is None
        and keywords.get("is_causal", True) is not False
        and getattr(module, "is_causal", True)
        and not _unknown(keywords)
    )


def _unknown(keywords: dict[str, Any]) -> list[str]:
    """Keywords that are given and of which nothing is known here."""
    return [name for name, value in keywords.items() if value is not None and name not in _NEUTRAL_KEYWORDS]


def _refuse_unknown_tensors(module: Any, keywords: dict[str, Any]) -> None:
    """A model may leave to its attention what it does by itself for sdpa alone: blocks of keys that an index chose, say.

    Raises:
        UserError: a tensor comes with the call of which nothing is known.
    """
    import torch

    name = next((n for n in _unknown(keywords) if isinstance(keywords[n], torch.Tensor)), None)
    if name is not None and _exporting():
        raise UserError(f"{type(module).__name__} gives its attention {name}, of which nothing is known; export it with attention 'sdpa'.")


def _exporting() -> bool:
    import torch

    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _four_dimensional(attention_mask: Any, query: Any, key: Any) -> Any:
    """[B, T] padding as the [B, 1, S, T] causal mask that `op.md` describes: query row i stands at position T - S + i."""
    import torch

    if attention_mask is None or attention_mask.ndim == 4:
        return attention_mask
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(rows, device=query.device)[:, None] + (keys - rows)
    causal = torch.arange(keys, device=query.device)[None, :] <= position
    return causal[None, None] & attention_mask[:, None, None, :].bool()


def _sdpa(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any, dropout: float, keywords: dict[str, Any]
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    full = _four_dimensional(attention_mask, query, key)
    return sdpa_attention_forward(module, query, key, value, full, dropout=dropout, scaling=scaling, **keywords)


def _eager(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any, dropout: float, softcap: Any, keywords: dict[str, Any]
) -> Any:
    import torch

    keep = _four_dimensional(attention_mask, query, key)
    bias = None if keep is None else torch.where(keep, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    own = sys.modules[type(module).__module__].eager_attention_forward
    extra = {"softcap": softcap} if softcap else {}
    return own(module, query, key, value, bias, scaling=scaling, dropout=dropout, **extra, **keywords)
