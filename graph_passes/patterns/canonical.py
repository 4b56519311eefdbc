"""`SampleAttention` nodes that a model holds already: exported so, or rewritten before. They are sites as they stand; a rewrite
gives them new settings."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graph_passes import op
from graph_passes.site import AttentionSite, KeyMask, Mask, Operand, Refusal, label
from graph_passes.symbolic.graph import SymbolicGraph, inputs_of

__all__ = ["is_attention", "matches", "pattern", "site"]


def pattern(node: gs.Node) -> str:
    return op.OP_TYPE


def matches(node: gs.Node) -> bool:
    return node.op == op.OP_TYPE and node.domain == op.DOMAIN


def is_attention(sg: SymbolicGraph, node: gs.Node) -> bool:
    return True


def site(sg: SymbolicGraph, node: gs.Node, name: str) -> AttentionSite:
    """The site that a node is by the operator's own definition (docs/op.md).

    Raises:
        Refusal: the node breaks the definition.
    """
    query, key, value, mask, *_ = [*inputs_of(node), None, None, None, None]
    if query is None or key is None or value is None:
        raise Refusal("it lacks queries, keys or values.", label(node))
    if int(node.attrs.get("is_causal", 1)) != 1:
        raise Refusal("its is_causal is not 1, which the operator does not allow.", label(node))
    if "scale" not in node.attrs:
        raise Refusal("it has no scale; every attribute has to stand on the node.", label(node))
    if len(node.outputs) > 1 and node.outputs[1].name:
        raise Refusal("it makes a certificate; set the policy where it was made.", label(node))
    q, k, v = (sg.known_shape(t, node) for t in (query, key, value))
    if not len(q) == len(k) == len(v) == 4:
        raise Refusal(f"its queries have {len(q)} axes; [batch, heads, rows, head size] is needed.", label(node))
    heads, kv_heads, size, value_size = q[1].value, k[1].value, q[3].value, v[3].value
    if not heads or not kv_heads or not size or not value_size or heads % kv_heads:
        raise Refusal("its numbers of heads and its head sizes are not fixed, or do not divide.", label(node))
    return AttentionSite(
        id=name,
        node=node.name or node.outputs[0].name,
        pattern=op.OP_TYPE,
        query=Operand(query.name, heads),
        key=Operand(key.name, kv_heads),
        value=Operand(value.name, kv_heads),
        output=node.outputs[0].name,
        mask=Mask(None if mask is None else KeyMask(mask.name, boolean=sg.dtype(mask) == onnx.TensorProto.BOOL, length=str(k[2]))),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        value_size=value_size,
        scale=float(node.attrs["scale"]),
        softcap=float(node.attrs.get("softcap", 0.0)),
        opset=sg.opset,
        consumed=(label(node),),
        evidence=("the node is causal attention with a key mask by its definition (docs/op.md).",),
        attributes=dict(node.attrs),
    )
