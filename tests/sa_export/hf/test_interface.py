"""What transformers' models hand to the attention that stands in for their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sa_export.errors import UserError
from sa_export.hf import interface


class Layer(torch.nn.Module):
    is_causal = True


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that an export would hold."""
    made: list[str] = []

    def symbolic(name: str, inputs: Any, attrs: Any, *, dtype: Any, shape: Any, version: int) -> torch.Tensor:
        made.append(name)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(interface, "_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx.ops, "symbolic", symbolic)
    return made


def call(mask: torch.Tensor, **keywords: Any) -> torch.Tensor:
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 4, 5, 8)
    return interface.attention(Layer(), q, k, k, mask, **keywords)[0]


PADDING = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "keywords", [{}, {"output_router_logits": False, "block_indices": None}, {"position_ids": torch.zeros(2, 3)}], ids=str
)
def test_keywords_without_effect(nodes: list[str], keywords: dict[str, Any]) -> None:
    assert call(PADDING, **keywords).shape == (2, 3, 4, 8)
    assert len(nodes) == 1


@pytest.mark.parametrize("keywords", [{"sliding_window": 4}, {"is_causal": False}, {"unheard_of": 3}], ids=str)
def test_keywords_that_keep_a_layer_as_it_is(nodes: list[str], keywords: dict[str, Any]) -> None:
    assert call(PADDING, **keywords).shape == (2, 3, 4, 8)
    assert nodes == []


def test_a_tensor_that_nothing_is_known_of(nodes: list[str]) -> None:
    """Falling back to sdpa would leave it out unseen."""
    with pytest.raises(UserError, match="gives its attention block_indices, of which nothing is known"):
        call(PADDING, block_indices=torch.zeros(2, 3, dtype=torch.int64))
    assert nodes == []
