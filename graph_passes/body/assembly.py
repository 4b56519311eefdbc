"""The function bodies, put together from their parts."""

from __future__ import annotations

import onnx
from onnx import helper

from graph_passes import op
from graph_passes.body.attention import attend, retained
from graph_passes.body.builder import PREFIX, Builder
from graph_passes.body.filtering import block_mask, certificate, dense_block_mask, full_heads
from graph_passes.body.geometry import geometry
from graph_passes.body.policies import sample

__all__ = ["PROBE_OP_TYPE", "PROBE_OUTPUTS", "function", "probe_function"]

PROBE_OP_TYPE = "SampleAttentionProbe"
PROBE_OUTPUTS = (*op.OUTPUTS, "block_mask", "row_cra")


def function(policy: str, *, has_mask: bool, softcap: bool, certificate: bool, opset: int) -> onnx.FunctionProto:
    """The body of one variant of `SampleAttention`.

    Args:
        policy: one of `op.POLICIES`.
        has_mask: the node has the input `key_mask`.
        softcap: the node's attribute `softcap` is above 0.
        certificate: the node has the output `certificate`.
        opset: version of the standard operators that the model imports, one of `opset.BODIES`.
    """
    outputs = op.OUTPUTS[: 1 + certificate]
    return _assemble(op.OP_TYPE, policy, has_mask, softcap, outputs, opset)


def probe_function(policy: str, *, has_mask: bool, softcap: bool, opset: int) -> onnx.FunctionProto:
    """The body of `SampleAttentionProbe`: the same inputs and attributes, and what a check needs to see.

    Outputs: `output`, `certificate` as `SampleAttention`; `block_mask` bool [B, Hq, nQ, nK], the blocks that were read; `row_cra` float
    [B, Hq, S], the exact probability that each row retains over all its allowed keys (1 for full heads, 0 for a row with no allowed key).
    """
    return _assemble(PROBE_OP_TYPE, policy, has_mask, softcap, PROBE_OUTPUTS, opset)


def _assemble(op_type: str, policy: str, has_mask: bool, softcap: bool, outputs: tuple[str, ...], opset: int) -> onnx.FunctionProto:
    g = Builder()
    geo = geometry(g, has_mask=has_mask, softcap=softcap)
    full = None
    if policy == "dense":
        kept = dense_block_mask(geo)
    else:
        full = full_heads(g, geo, policy)
        sampled = sample(g, geo, policy)
        kept = block_mask(g, geo, policy, sampled, full)
    query, value = g.formal("query", "t"), g.formal("value", "t")
    # The last reshape shows the rank of the output to the rest of the model (see Builder.of_hidden_rank).
    shape = g.node("Shape", query, kind="i", end=3), g.node("Shape", value, kind="i", start=3)
    g.output(g.node("CastLike", attend(g, geo, kept).reshape(*shape), query, kind="t"), "output")
    if "certificate" in outputs:
        ones = g.constant(1.0, "f").expand(geo.b, geo.h, 2)
        g.output(ones if full is None else certificate(g, geo, sampled, kept, full), "certificate")
    if "block_mask" in outputs:
        g.output(kept, "block_mask")
        g.output(retained(g, geo, dense_block_mask(geo), kept), "row_cra")
    return helper.make_function(
        op.DOMAIN,
        op_type,
        [PREFIX + name for name in op.INPUTS[: 3 + has_mask]],
        [PREFIX + name for name in outputs],
        g.nodes,
        [helper.make_opsetid("", opset)],
        [attribute.name for attribute in op.ATTRIBUTES],
        overload=op.variant(policy, has_mask=has_mask, softcap=float(softcap), certificate="certificate" in outputs),
    )
