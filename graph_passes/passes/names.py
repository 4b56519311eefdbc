"""Names for new nodes and tensors."""

from __future__ import annotations

import onnx_graphsurgeon as gs

__all__ = ["Names"]


class Names:
    """Gives names that no node and no tensor of a graph has; the same graph and wishes give the same names."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = {n.name for n in graph.nodes} | set(graph.tensors())

    def new(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, ... such that the name and `<name>_out` are free."""
        name, k = wanted, 1
        while name in self._taken or f"{name}_out" in self._taken:
            name, k = f"{wanted}_{k}", k + 1
        self._taken |= {name, f"{name}_out"}
        return name
