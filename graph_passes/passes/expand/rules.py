"""Which rule takes which operator apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graph_passes.passes.expand import (
    activations,
    einsum,
    fused_matmul,
    group_query_attention,
    multi_head_attention,
    norms,
    onnx_attention,
    packed_attention,
    rotary,
    softmax_flattened,
    softmax_in_parts,
)
from graph_passes.passes.expand.maker import Maker

__all__ = ["MICROSOFT", "RULES"]

MICROSOFT = "com.microsoft"

RULES: Mapping[tuple[str, str], Callable[[Maker], None]] = {
    ("", "Attention"): onnx_attention.expand,
    ("", "Div"): softmax_in_parts.expand_share,
    ("", "Einsum"): einsum.expand,
    ("", "Exp"): softmax_in_parts.expand_exp,
    ("", "Mul"): softmax_in_parts.expand_share,
    ("", "Reshape"): softmax_flattened.expand,
    ("", "SimplifiedLayerNormalization"): norms.expand_rms,
    (MICROSOFT, "Attention"): packed_attention.expand,
    (MICROSOFT, "BiasGelu"): activations.expand_gelu,
    (MICROSOFT, "FastGelu"): activations.expand_fast_gelu,
    (MICROSOFT, "FusedMatMul"): fused_matmul.expand,
    (MICROSOFT, "Gelu"): activations.expand_gelu,
    (MICROSOFT, "GroupQueryAttention"): group_query_attention.expand,
    (MICROSOFT, "MultiHeadAttention"): multi_head_attention.expand,
    (MICROSOFT, "QuickGelu"): activations.expand_quick_gelu,
    (MICROSOFT, "RotaryEmbedding"): rotary.expand,
    (MICROSOFT, "SimplifiedLayerNormalization"): norms.expand_rms,
    (MICROSOFT, "SkipLayerNormalization"): norms.expand_skip_layer,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): norms.expand_skip_rms,
}
