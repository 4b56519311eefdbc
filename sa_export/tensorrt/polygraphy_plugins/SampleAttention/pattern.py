"""What `polygraphy plugin list|match|replace --plugin-dir` calls: the sites that `sa-export inspect` finds, and the node that
`sa-export rewrite` writes. `attributes` in the config.yaml of match are those of docs/op.md and may be edited before replace."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from graph_passes import op
from graph_passes.in_memory import replace_site, sites_of


def get_plugin_metadata() -> dict[str, str]:
    """The folder's name, and the operator of the nodes that replace writes."""
    return {"name": "SampleAttention", "op": op.OP_TYPE}


def get_matching_subgraphs(graph: gs.Graph) -> list[dict[str, Any]]:
    """One entry a site: names of the tensors that it reads and makes, and the attributes of its node with the default policy."""
    found = []
    for site in sites_of(graph):
        inputs = [site.query.tensor, site.key.tensor, site.value.tensor]
        inputs += [] if site.mask.keys is None else [site.mask.keys.tensor]
        attributes = op.node_attributes(op.Policy().for_heads(site.heads), scale=site.scale, softcap=site.softcap)
        found.append({"inputs": inputs, "outputs": [site.output], "attributes": attributes})
    return found


def replace_with_plugin(graph: gs.Graph, input_tensors: list, output_tensors: list, attrs: dict[str, Any] | None, op: str) -> bool:
    """Replaces the site that makes the output. Scale and soft-cap are the graph's own, whatever the attributes say."""
    from graph_passes.op import policy_from_attributes

    return replace_site(graph, output_tensors[0].name, policy_from_attributes(attrs or {}))
