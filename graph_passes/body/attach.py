"""Gives every `SampleAttention` node of a model the function body of its variant."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from graph_passes import op
from graph_passes.body.assembly import PROBE_OP_TYPE, PROBE_OUTPUTS, function, probe_function
from graph_passes.body.guard import GUARD, guard
from graph_passes.errors import GraphError
from graph_passes.opset import BODIES, opset_of, refusal_of

__all__ = ["attach"]

_MIN_IR_VERSION = 10  # the first that tells functions apart by `overload`


def attach(model: onnx.ModelProto) -> None:
    """Adds, in place, the function bodies that the model's nodes need; doing it again changes nothing.

    Every `SampleAttention` and `SampleAttentionProbe` node (in subgraphs too) gets its `overload`; the model gets each function once,
    the import of the domain, and an IR version that knows overloads. A `guard` stands in front of the operator's bodies.

    Raises:
        GraphError: the model's opset is not one of `opset.BODIES`, or a node does not fit the contract of `op`.
    """
    nodes = [n for n in _nodes(model.graph) if n.domain == op.DOMAIN and n.op_type in (op.OP_TYPE, PROBE_OP_TYPE)]
    if not nodes:
        return
    opset = opset_of(model)
    if opset not in BODIES:
        raise refusal_of(opset)
    bodies: dict[tuple[str, tuple[str, bool, bool, bool]], onnx.FunctionProto] = {}
    for node in nodes:
        variant = _variant_of(node)
        if (node.op_type, variant) not in bodies:
            bodies[node.op_type, variant] = _body(node.op_type, *variant, opset)
        node.overload = bodies[node.op_type, variant].overload
    functions = {(body.name, body.overload): body for body in bodies.values()}
    kept = [f for f in model.functions if f.domain != op.DOMAIN or (f.name, f.overload) not in {*functions, (op.OP_TYPE, GUARD)}]
    twins = [f for f in (*kept, *functions.values()) if (f.domain, f.name) == (op.DOMAIN, op.OP_TYPE)]
    del model.functions[:]
    model.functions.extend([*([guard(twins[0])] if twins else []), *kept, *functions.values()])
    if op.DOMAIN not in {o.domain for o in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(op.DOMAIN, op.VERSION))
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)


def _body(op_type: str, policy: str, has_mask: bool, softcap: bool, certificate: bool, opset: int) -> onnx.FunctionProto:
    if op_type == PROBE_OP_TYPE:
        return probe_function(policy, has_mask=has_mask, softcap=softcap, opset=opset)
    return function(policy, has_mask=has_mask, softcap=softcap, certificate=certificate, opset=opset)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _variant_of(node: onnx.NodeProto) -> tuple[str, bool, bool, bool]:
    """policy, has_mask, softcap, certificate; checks the node against the contract."""
    where = f"node '{node.name or node.output[0]}' ({node.op_type})"
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    expected = [a.name for a in op.ATTRIBUTES]
    if missing := [name for name in expected if name not in values]:
        raise GraphError(f"{where} lacks the attributes {', '.join(missing)}; write all of op.node_attributes on it.")
    if unknown := [name for name in values if name not in expected]:
        raise GraphError(f"{where} has the attributes {', '.join(unknown)}; allowed are {', '.join(expected)}.")
    if not 3 <= len(node.input) <= len(op.INPUTS) or not all(node.input):
        raise GraphError(f"{where} has the inputs {list(node.input)}; allowed are 3 or 4, none of them empty.")
    outputs = PROBE_OUTPUTS if node.op_type == PROBE_OP_TYPE else op.OUTPUTS
    if not 1 <= len(node.output) <= len(outputs):
        raise GraphError(f"{where} has {len(node.output)} outputs; allowed are 1 to {len(outputs)}: {', '.join(outputs)}.")
    policy = op.policy_from_attributes(values)
    return policy.policy, len(node.input) == len(op.INPUTS), values["softcap"] > 0, len(node.output) > 1
