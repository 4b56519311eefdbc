"""Puts one `SampleAttention` node in the place of each site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes import op
from graph_passes.op import Policy
from graph_passes.passes.key_mask import KeyMaskBuilder
from graph_passes.passes.names import Names
from graph_passes.site import AttentionSite, Operand

__all__ = ["replace_sites"]

logger = logging.getLogger(__name__)


def replace_sites(graph: gs.Graph, sites: Sequence[AttentionSite], policies: Mapping[str, Policy]) -> int:
    """Replaces sites in place; nodes that nothing reads any more stay for `remove_dead_nodes`.

    1. A site that is a `SampleAttention` node already gets new attributes, and a key mask of type bool if it has another one.
    2. Any other site gets a new node that makes the same output tensor, put where the old maker of that tensor stands, so that
       the order of the graph stays topological. Operands that lie in another layout get a Transpose in front.

    Args:
        graph: changed in place.
        sites: sites of this graph.
        policies: policy of each site to replace, by site id; other sites are left alone.

    Returns:
        The number of sites replaced.
    """
    tensors = graph.tensors()
    names = Names(graph)
    masks = KeyMaskBuilder(graph, tensors, names)
    done = 0
    for site in sites:
        if site.id not in policies:
            continue
        attributes = op.node_attributes(policies[site.id].for_heads(site.heads), scale=site.scale, softcap=site.softcap)
        output = tensors[site.output]
        old = output.inputs[0]
        new: list[gs.Node] = []
        position = next(i for i, node in enumerate(graph.nodes) if node is old)
        if old.op == op.OP_TYPE and old.domain == op.DOMAIN:
            old.attrs.clear()
            old.attrs.update(attributes)
            if site.mask.keys is not None:
                old.inputs[3] = masks.tensor(site, site.mask.keys, new)
        else:
            inputs = [_in_layout(site, o, tensors, names, new) for o in (site.query, site.key, site.value)]
            if site.mask.keys is not None:
                inputs.append(masks.tensor(site, site.mask.keys, new))
            old.outputs.clear()
            name = names.new(f"{site.id}/{op.OP_TYPE}")
            made = gs.Variable(f"{name}_out") if site.lead or site.cast else output
            new.append(gs.Node(op.OP_TYPE, name, attributes, inputs, [made], domain=op.DOMAIN))
            if made is not output:
                new += _as_expected(site, made, output, names)
        graph.nodes[position:position] = new
        done += 1
        logger.debug("%s: %s is now one %s node", site.id, site.node, op.OP_TYPE)
    return done


def _in_layout(site: AttentionSite, operand: Operand, tensors: dict[str, gs.Tensor], names: Names, new: list[gs.Node]) -> gs.Tensor:
    tensor = tensors[operand.tensor]
    if operand.perm is None:
        return tensor
    name = names.new(f"{site.id}/{operand.tensor}/Transpose")
    out = gs.Variable(f"{name}_out", dtype=tensor.dtype)
    new.append(gs.Node("Transpose", name, {"perm": list(operand.perm)}, [tensor], [out]))
    return out


def _as_expected(site: AttentionSite, made: gs.Tensor, output: gs.Tensor, names: Names) -> list[gs.Node]:
    """[B, Hq, S, Dv] with the element type, and with batch and heads in the axes, that the rest of the graph expects."""
    new: list[gs.Node] = []
    if site.cast:
        cast = names.new(f"{site.id}/output/Cast")
        wide = gs.Variable(f"{cast}_out") if site.lead else output
        new.append(gs.Node("Cast", cast, {"to": site.cast}, [made], [wide]))
        made = wide
    if not site.lead:
        return new
    shape, concat, reshape = (names.new(f"{site.id}/output/{what}") for what in ("Shape", "Concat", "Reshape"))
    last = gs.Variable(f"{shape}_out", dtype=np.dtype(np.int64))
    lengths = gs.Variable(f"{concat}_out", dtype=np.dtype(np.int64))
    lead = gs.Constant(names.new(f"{site.id}/output/lead"), np.array(site.lead, dtype=np.int64))
    return [
        *new,
        gs.Node("Shape", shape, {"start": 2, "end": 4}, [made], [last]),
        gs.Node("Concat", concat, {"axis": 0}, [lead, last], [lengths]),
        gs.Node("Reshape", reshape, {}, [made, lengths], [output]),
    ]
