"""Dense attention to compare with, through PyTorch: cuDNN (the strongest on Hopper) and FlashAttention-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BASELINES", "dense"]

BASELINES = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}


def dense(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """A call of causal attention on that backend alone, or None when it refuses these inputs (it is tried once).

    Args:
        name: a key of `BASELINES`.
        query: [B, Hq, N, D]; key, value: [B, Hkv, N, D].
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, BASELINES[name])

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
            )

    try:
        run()
    except RuntimeError:
        return None
    return run
