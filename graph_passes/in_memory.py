"""The verbs of `pipeline` on a graph in memory: the attentions of a graph are found, and sites replaced in place.

`pipeline` calls this with a file around it, polygraphy's plugin tools with a graph of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from graph_passes import op
from graph_passes.op import Policy
from graph_passes.passes.expand import Expander
from graph_passes.passes.remove_dead_nodes import remove_dead_nodes
from graph_passes.passes.replace_sites import replace_sites
from graph_passes.passes.reroute_shapes import reroute_shapes
from graph_passes.patterns.find import find
from graph_passes.site import AttentionSite, DeclinedSite
from graph_passes.symbolic.graph import SymbolicGraph

__all__ = ["Examined", "examine", "replace", "replace_site", "sites_of"]


@dataclass(frozen=True)
class Examined:
    """A graph, its fused operators taken apart, and what was found in it.

    Attributes:
        sites, declined: every candidate is in exactly one of them.
    """

    graph: gs.Graph
    symbolic: SymbolicGraph
    expander: Expander
    sites: tuple[AttentionSite, ...]
    declined: tuple[DeclinedSite, ...]


def examine(graph: gs.Graph, folder: Path | None = None, functions: Sequence[onnx.FunctionProto] = ()) -> Examined:
    """Finds the attentions of a graph; its fused operators lie in parts until `replace` puts them together again.

    Args:
        graph: nodes in topological order; changed in place.
        folder: folder that external data files are relative to; None when they must not be read.
        functions: the model-local functions that nodes may call.
    """
    expander = Expander()
    symbolic = SymbolicGraph(graph, folder, expander)
    sites, declined = find(symbolic, functions)
    return Examined(graph, symbolic, expander, tuple(sites), tuple(declined))


def replace(found: Examined, policies: Mapping[str, Policy], *, standard: bool = False) -> None:
    """Replaces, in place, each site that `policies` names (by id) by one node without a function body, and puts what was taken apart
    for nothing together again.

    Args:
        standard: operators that are not ONNX's stay in parts, where that can be done.
    """
    graph, symbolic, expander = found.graph, found.symbolic, found.expander
    chosen = [site for site in found.sites if site.id in policies]
    expander.settle_attention(symbolic, [symbolic.tensors[site.output].inputs[0] for site in chosen], keep_apart=standard)
    reroute_shapes(graph, symbolic, chosen)
    replace_sites(graph, chosen, policies)
    remove_dead_nodes(graph)
    expander.settle_others(graph, keep_apart=standard)
    remove_dead_nodes(graph)


def sites_of(graph: gs.Graph) -> tuple[AttentionSite, ...]:
    """The attention sites of a graph, as `pipeline.inspect` finds them. The graph stays as it is."""
    nodes = _remember(graph)
    found = examine(graph)
    _restore(graph, nodes)
    return found.sites


def replace_site(graph: gs.Graph, output: str, policy: Policy) -> bool:
    """Replaces, in place, the site that makes the tensor `output` by one SampleAttention node, as `pipeline.rewrite` does.

    The node has no function body: it is for TensorRT with the plugin.

    Returns:
        False when no site makes that tensor; the graph is then as it was.
    """
    nodes = _remember(graph)
    found = examine(graph)
    policies = {site.id: policy for site in found.sites if site.output == output}
    if not policies:
        _restore(graph, nodes)
        return False
    replace(found, policies)
    if op.DOMAIN not in {o.domain for o in graph.import_domains or ()}:
        graph.import_domains = [*(graph.import_domains or ()), onnx.helper.make_opsetid(op.DOMAIN, op.VERSION)]
    return True


_Nodes = list[tuple[gs.Node, list[gs.Tensor], list[gs.Tensor]]]


def _remember(graph: gs.Graph) -> _Nodes:
    return [(node, list(node.inputs), list(node.outputs)) for node in graph.nodes]


def _restore(graph: gs.Graph, nodes: _Nodes) -> None:
    for node in graph.nodes:
        node.inputs.clear()
        node.outputs.clear()
    for node, inputs, outputs in nodes:
        node.inputs, node.outputs = inputs, outputs
    graph.nodes[:] = [node for node, _, _ in nodes]
