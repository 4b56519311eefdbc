"""Removes what nothing reads any more."""

from __future__ import annotations

import logging

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

__all__ = ["remove_dead_nodes"]

logger = logging.getLogger(__name__)


def remove_dead_nodes(graph: gs.Graph) -> int:
    """Removes, in place, nodes that no graph output depends on; a mask that other sites still read therefore stays.

    Graph inputs stay even when unused: callers feed them by name.

    Returns:
        The number of nodes removed.
    """
    before = len(graph.nodes)
    with G_LOGGER.suppress():
        graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False)
    removed = before - len(graph.nodes)
    logger.info("removed %d nodes that nothing reads", removed)
    return removed
