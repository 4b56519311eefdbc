"""Raises a model of an older opset to the first one that this package works on, without its weights.

Definitions of standard operators that changed between opset 11 and 18 are of three kinds (ONNX's changelog of operators): most took
more element types, or got options whose default is the old meaning, and their nodes stay as they are to the letter; those in
`_CONVERTED` moved an attribute to an input or changed a default, and ONNX's own converter writes them; those in `_OTHER` changed in
ways that are not put right here.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import version_converter

from graph_passes.errors import GraphError

__all__ = ["BODIES", "LOWEST", "RAISED_TO", "opset_of", "raise_opset", "refusal_of"]

LOWEST, RAISED_TO = 11, 18
BODIES = range(RAISED_TO, 27)
"""Versions of the standard operators that bodies are written and tested for; ONNX Runtime 1.31 loads nothing newer."""

_CONVERTED = frozenset(
    [
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
        *("ReduceSum", "ReduceSumSquare", "Softmax", "LogSoftmax", "Split", "Squeeze", "Unsqueeze", "Dropout"),
    ]
)
_OTHER = frozenset({"BatchNormalization", "GRU", "Hardmax", "LSTM", "LpPool", "RNN", "Resize", "RoiAlign", "Upsample"})

_SMALL = 1024
"""Bytes up to which a constant goes through the converter, which infers shapes from it."""

_ASIDE = "aside"


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model imports, 0 when it imports none."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def refusal_of(version: int) -> GraphError:
    """What is said of a model of an opset that is not one of `BODIES`."""
    return GraphError(
        f"The model imports opset {version}; SampleAttention bodies are written for opsets {BODIES[0]} to {BODIES[-1]}, and older ones "
        f"are raised from {LOWEST} on, so export the model with one of these."
    )


def raise_opset(model: onnx.ModelProto) -> None:
    """Raises, in place, a model of opset 11 to 17 to 18; one of `BODIES` stays as it is. Tensors keep their names, and nodes that the
    newer opset defines alike are not touched.

    Raises:
        GraphError: the model is of another opset, or cannot be raised without changing what it computes; it is then as it was.
    """
    version = opset_of(model)
    if version in BODIES:
        return
    if not LOWEST <= version < RAISED_TO:
        raise refusal_of(version)
    advice = f"export the model again with opset {RAISED_TO} or newer."
    for node in _nodes(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in _OTHER and _since(node.op_type, version) != _since(node.op_type, RAISED_TO):
            where = node.name or next(iter(node.output), "")
            raise GraphError(f"{node.op_type} ({where}) of opset {version} is another operator in opset {RAISED_TO}; {advice}")
    if any(o.domain in ("", "ai.onnx") for f in model.functions for o in f.opset_import):
        raise GraphError(f"The model's functions are of opset {version}, and functions are not converted to {RAISED_TO}; {advice}")
    try:
        converted = version_converter.convert_version(_bare(model, version), RAISED_TO)
    except Exception as error:  # what the converter's C++ throws has no class of its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise GraphError(f"ONNX's converter cannot raise the model from opset {version} to {RAISED_TO} ({said}); {advice}") from None
    before = {o: n for n in model.graph.node for o in n.output if o}
    nodes = [_kept(node, next((before[o] for o in node.output if o in before), None)) for node in converted.graph.node]
    missing = before.keys() - {o for n in nodes for o in n.output}
    if missing or any(n.domain == _ASIDE for part in nodes for n in (part, *(x for g in _subgraphs(part) for x in _nodes(g)))):
        raise GraphError(f"ONNX's converter does not keep all of the model ({min(missing, default='an operator')}); {advice}")
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]  # clearing the graph takes the originals away
    del model.graph.node[:]
    model.graph.node.extend(kept)
    next(o for o in model.opset_import if o.domain in ("", "ai.onnx")).version = RAISED_TO
    model.ir_version = max(model.ir_version, 8)  # the first that may import opset 18


def _kept(node: onnx.NodeProto, twin: onnx.NodeProto | None) -> onnx.NodeProto:
    """The original of a node where that will do, else the converter's with the notes of the original."""
    if twin is None:
        return node
    if list(twin.input) == list(node.input) and list(twin.output) == list(node.output) and _is_untouched(twin):
        return twin
    if twin.op_type == node.op_type:
        node.doc_string = twin.doc_string
        node.metadata_props.extend(twin.metadata_props)
    return node


def _is_untouched(node: onnx.NodeProto) -> bool:
    """The node and the nodes inside of it mean the same in the newer opset."""
    inner = (n for g in _subgraphs(node) for n in _nodes(g))
    return not any(n.domain in ("", "ai.onnx") and n.op_type in _CONVERTED for n in (node, *inner))


def _bare(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """What the converter needs: the graph with inputs in the place of weights, and operators that ONNX does not know (ONNX Runtime's
    optimiser puts some into the standard domain) in a domain that it passes over."""
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    known = {i.name for i in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= _SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    aside = False
    for node in _nodes(graph):
        if node.domain in ("", "ai.onnx") and not _since(node.op_type, version):
            node.domain, aside = _ASIDE, True
    bare = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    bare.opset_import.extend(model.opset_import)
    if aside:
        bare.opset_import.append(onnx.helper.make_opsetid(_ASIDE, 1))
    return bare


def _since(op_type: str, version: int) -> int:
    """The version that brought the definition of a standard operator, 0 when there is none."""
    try:
        return onnx.defs.get_schema(op_type, version, "").since_version
    except onnx.defs.SchemaError:
        return 0


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for subgraph in _subgraphs(node):
            yield from _nodes(subgraph)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
