"""What each layer of a frozen graph truly is, judged from the model's configuration and from what the exporter is known to drop."""

from __future__ import annotations

from tests.data.families import FAMILIES, FULL
from tests.data.routes.handwritten import MODELS

__all__ = ["CHANGED", "REASONS", "holds", "layers"]

REASONS: dict[str, tuple[str, ...]] = {
    "window": ("window",),
    "sinks": ("sink",),
    "alibi": ("bias", "alibi"),
    "bias": ("bias",),
    "difference": ("probabilities are read by",),
    "selected": ("depends on the values",),
    "chunks": ("chunks",),
    "not causal": ("not causal",),
    "paged": ("paged", "pages"),
}
"""What a layer is -> words of which the sentence that declines it must hold one."""

CHANGED: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("genai", "mistral-window"): ((FULL, FULL), "the builder writes local_window_size = -1: the window is lost"),
    ("genai-fp16-cpu", "gemma2"): ((FULL, FULL), "MultiHeadAttention with a causal bias: window and soft-cap are lost"),
    ("genai-fp16-cpu", "gpt-oss"): ((FULL, FULL), "MultiHeadAttention with a causal bias: window and sinks are lost"),
}
"""(Beginning of a route, family) -> what its layers are in the graph, and how the exporter changed the model. The graph counts."""


def layers(route: str, family: str) -> tuple[str, ...]:
    """What each attention of a graph is: `full` must be rewritten; anything else (parts joined by +) declined for that reason."""
    if route == "handwritten":
        return MODELS[family][1]
    if route == "genai-paged":
        return ("paged",) * len(FAMILIES[family].layers)
    changed = [v[0] for (start, name), v in CHANGED.items() if route.startswith(start) and name == family]
    return changed[-1] if changed else FAMILIES[family].layers


def holds(reason: str, kind: str) -> bool:
    """Whether a sentence that declines a layer names something that the layer truly is."""
    return any(word in reason.lower() for part in kind.split("+") for word in REASONS[part])
