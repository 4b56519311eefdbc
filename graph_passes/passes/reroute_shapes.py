"""Lets nothing live only for its shape: readers of the shape of a tensor that a site no longer needs get the same lengths from
what the site reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.passes.names import Names
from graph_passes.site import AttentionSite
from graph_passes.symbolic.arguments import shape_window
from graph_passes.symbolic.graph import SymbolicGraph, is_standard
from graph_passes.symbolic.poly import Poly

__all__ = ["reroute_shapes"]

logger = logging.getLogger(__name__)


def reroute_shapes(graph: gs.Graph, symbolic: SymbolicGraph, sites: Sequence[AttentionSite]) -> int:
    """Replaces, in place, Shape nodes that read a tensor between the operands of a site and its output.

    TorchScript asks the repeated keys for their batch size, for example; without this the repetition would stay, and be
    computed for every call. A shape is replaced only when each of its lengths is a number or equal to a length of the query,
    key or value that the new node reads.

    Args:
        graph: changed in place, before or after the sites were replaced.
        symbolic: the lengths of the tensors of `graph`.
        sites: the sites that are replaced.

    Returns:
        The number of Shape nodes replaced.
    """
    names = Names(graph)
    inside = {name: site for site in sites for name in site.between}
    position = {id(node): i for i, node in enumerate(graph.nodes)}
    inserted: list[tuple[int, list[gs.Node]]] = []
    for node in graph.nodes:
        if node.op != "Shape" or not is_standard(node) or node.inputs[0].name not in inside:
            continue
        site = inside[node.inputs[0].name]
        lengths = symbolic.known_shape(node.inputs[0])[shape_window(node)]
        new = _lengths(site, lengths, symbolic, names)
        if new is None or any(
            position[id(t.inputs[0])] > position[id(node)] for t in _read(new) if t.inputs and id(t.inputs[0]) in position
        ):
            continue
        output = node.outputs[0]
        node.outputs.clear()
        new[-1].outputs = [output]
        inserted.append((position[id(node)], new))
    for at, new in reversed(inserted):
        graph.nodes[at:at] = new
    return len(inserted)


def _lengths(site: AttentionSite, lengths: Sequence[Poly], symbolic: SymbolicGraph, names: Names) -> list[gs.Node] | None:
    """Nodes that make the lengths as one tensor, the last one without its output; None when a length is found nowhere."""
    new: list[gs.Node] = []
    parts: list[gs.Tensor] = []
    for length in lengths:
        if length.value is not None:
            parts.append(gs.Constant(names.new(f"{site.id}/length"), np.array([length.value], dtype=np.int64)))
            continue
        found = next(
            ((t, axis) for t in _operands(site, symbolic) for axis, n in enumerate(symbolic.known_shape(t)) if n == length),
            None,
        )
        if found is None:
            return None
        name = names.new(f"{site.id}/Shape")
        out = gs.Variable(f"{name}_out", dtype=np.dtype(np.int64))
        new.append(gs.Node("Shape", name, {"start": found[1], "end": found[1] + 1}, [found[0]], [out]))
        parts.append(out)
    new.append(gs.Node("Concat", names.new(f"{site.id}/Concat"), {"axis": 0}, parts, []))
    return new


def _operands(site: AttentionSite, symbolic: SymbolicGraph) -> list[gs.Tensor]:
    return [symbolic.tensors[o.tensor] for o in (site.query, site.key, site.value)]


def _read(new: Sequence[gs.Node]) -> list[gs.Tensor]:
    return [t for node in new if node.op == "Shape" for t in node.inputs]
