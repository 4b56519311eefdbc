"""Finds every candidate of a graph and gives each exactly one fate: a site, or a refusal with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from graph_passes import op
from graph_passes.patterns import canonical, fused, never_rewritten, softmax_core
from graph_passes.site import AttentionSite, DeclinedSite, Refusal, label
from graph_passes.symbolic.graph import MALFORMED, Stuck, SymbolicGraph

__all__ = ["FAMILIES", "Family", "find"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """One way in which graphs spell attention.

    Attributes:
        pattern: the name of a candidate's spelling in reports.
        matches: whether a node is a candidate.
        is_attention: whether a candidate is the core of an attention at all; others are listed, but not counted as layers.
        site: the site of a candidate, or `Refusal`.
    """

    pattern: Callable[[gs.Node], str]
    matches: Callable[[gs.Node], bool]
    is_attention: Callable[[SymbolicGraph, gs.Node], bool]
    site: Callable[[SymbolicGraph, gs.Node, str], AttentionSite]


FAMILIES: tuple[Family, ...] = tuple(
    Family(module.pattern, module.matches, module.is_attention, module.site) for module in (softmax_core, fused, canonical, never_rewritten)
)


def find(
    sg: SymbolicGraph, functions: Sequence[onnx.FunctionProto] = (), families: Sequence[Family] = FAMILIES
) -> tuple[list[AttentionSite], list[DeclinedSite]]:
    """All candidates of a graph in its order, as sites and as refusals; every candidate is in exactly one of the lists.

    Attention cores are named `layers.0`, `layers.1`, ... whatever becomes of them, other candidates `other.0`, ... Candidates
    inside of subgraphs (If, Loop, Scan) and of model-local functions are listed as refusals.
    """
    sites: list[AttentionSite] = []
    declined: list[DeclinedSite] = []
    layers = others = 0
    bodies = {(f.domain, f.name): f for f in functions}
    for node in sg.graph.nodes:
        for pattern, where in _inside(node, families, bodies, ()):
            reason = f"it lies inside of {where}; only the top-level graph is rewritten."
            declined.append(DeclinedSite(f"other.{others}", node.name or node.outputs[0].name, pattern, reason, label(node)))
            others += 1
        family = next((f for f in families if f.matches(node)), None)
        if family is None:
            continue
        if _is_attention(family, sg, node):
            name, layers = f"layers.{layers}", layers + 1
        else:
            name, others = f"other.{others}", others + 1
        try:
            if id(node) not in sg.live:
                raise Refusal("no output of the graph depends on it.", label(node))
            sites.append(family.site(sg, node, name))
            logger.debug("%s: %s is an attention site", name, label(node))
        except (Refusal, Stuck, *MALFORMED) as error:
            reason, stopped_by = _reason(error, node)
            declined.append(DeclinedSite(name, node.name or node.outputs[0].name, family.pattern(node), reason, stopped_by))
            logger.debug("%s: declined, %s", name, reason)
    return sites, declined


def _is_attention(family: Family, sg: SymbolicGraph, node: gs.Node) -> bool:
    try:
        return family.is_attention(sg, node)
    except MALFORMED:
        return False


def _inside(
    node: gs.Node, families: Sequence[Family], bodies: Mapping[tuple[str, str], onnx.FunctionProto], above: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Pattern and place of the candidates in the subgraphs of a node and in the function that it calls."""
    where = " in ".join((*above, label(node)))
    for value in node.attrs.values():
        for graph in value if isinstance(value, list) else [value]:
            if isinstance(graph, gs.Graph):
                for inner in graph.nodes:
                    yield from ((f.pattern(inner), where) for f in families if f.matches(inner))
                    yield from _inside(inner, families, bodies, (*above, label(node)))
    function = bodies.get((node.domain or "", node.op))
    if function is not None and node.op != op.OP_TYPE and len(above) < 16:
        for inner in gs.import_onnx(_as_model(function)).nodes:
            yield from ((f.pattern(inner), where) for f in families if f.matches(inner))
            yield from _inside(inner, families, bodies, (*above, label(node)))


def _as_model(function: onnx.FunctionProto) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        list(function.node),
        function.name,
        [onnx.helper.make_empty_tensor_value_info(n) for n in function.input],
        [onnx.helper.make_empty_tensor_value_info(n) for n in function.output],
    )
    return onnx.helper.make_model(graph, opset_imports=list(function.opset_import))


def _reason(error: Exception, node: gs.Node) -> tuple[str, str]:
    if isinstance(error, Refusal):
        return error.reason, error.node or label(node)
    if isinstance(error, Stuck):
        return f"a value cannot be followed: {error.why}.", label(error.node or node)
    return f"the nodes around it are not well formed ({type(error).__name__}: {error}).", label(node)
