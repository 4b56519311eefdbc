"""The operator's NumPy reference for `polygraphy run --pluginref`, and the entry point through which polygraphy finds it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["extension", "reference", "register"]


def reference(attributes: dict[str, Any], query: Any, key: Any, value: Any, key_mask: Any = None) -> list[np.ndarray]:
    """`SampleAttention` of docs/op.md, one output, in float64 rounded to the type of the query.

    Args:
        attributes: of the node, all of them.
        query: [B, Hq, S, D]; key: [B, Hkv, T, D]; value: [B, Hkv, T, Dv]; key_mask: [B, T] bool or None.
    """
    from graph_passes.op import policy_from_attributes
    from graph_passes.reference import sample_attention

    q, k, v = (np.asarray(x) for x in (query, key, value))
    mask = None if key_mask is None else np.asarray(key_mask).astype(bool)
    output, _, _ = sample_attention(
        q, k, v, mask, policy_from_attributes(attributes), float(attributes["scale"]), float(attributes["softcap"])
    )
    return [output.astype(q.dtype)]


def register() -> None:
    """Registers the reference with polygraphy; doing it again changes nothing."""
    from polygraphy.backend.pluginref import references

    from graph_passes.op import OP_TYPE

    if OP_TYPE not in references.OP_REGISTRY:
        references.register(OP_TYPE)(reference)


def extension() -> list[Any]:
    """Entry point `polygraphy.run.plugins`: polygraphy calls it before it reads its command line; no option is added."""
    register()
    return []
