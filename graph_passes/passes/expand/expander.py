"""Takes the fused operators of a graph apart, each in its place, such that each can be put together again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from graph_passes.passes.expand import dense
from graph_passes.passes.expand.maker import Maker
from graph_passes.passes.expand.rules import RULES
from graph_passes.passes.names import Names
from graph_passes.site import Refusal, label
from graph_passes.symbolic.graph import CORE_DOMAIN, MALFORMED, Stuck, SymbolicGraph, is_standard

__all__ = ["Expander", "Expansion"]

logger = logging.getLogger(__name__)


@dataclass
class Expansion:
    """One fused operator and the nodes that stand for it.

    Attributes:
        node: the operator; it reads and makes nothing while it is taken apart.
        inputs, outputs: what it reads and makes.
        new: the nodes that stand for it, in order.
        absorbed: nodes in front that went with it, with what they read and make.
    """

    node: gs.Node
    inputs: list[gs.Tensor]
    outputs: list[gs.Tensor]
    new: list[gs.Node]
    absorbed: list[tuple[gs.Node, list[gs.Tensor], list[gs.Tensor]]]

    @property
    def is_foreign(self) -> bool:
        """The operator is not one of ONNX."""
        return not is_standard(self.node) or self.node.op == "SimplifiedLayerNormalization"

    @property
    def core(self) -> gs.Node | None:
        """The attention among the nodes, when the operator is one and was not rewritten yet."""
        return next((n for n in self.new if n.domain == CORE_DOMAIN), None)


@dataclass
class Expander:
    """Takes operators apart while a symbolic graph is built (`SymbolicGraph(..., expand=...)`); why one that has a rule was left
    whole stands in `SymbolicGraph.left_whole`.

    Attributes:
        rules: the rule of each operator, by domain and name; one that makes no node leaves its operator whole.
        done: what was taken apart, in graph order.
    """

    rules: Mapping[tuple[str, str], Callable[[Maker], None]] = field(default_factory=lambda: RULES)
    done: list[Expansion] = field(default_factory=list)
    _names: Names | None = None

    def __call__(self, sg: SymbolicGraph, node: gs.Node) -> list[gs.Node]:
        """The nodes that stand in the place of a node: itself, when it has no rule or its rule refuses it."""
        rule = self.rules.get(("" if is_standard(node) else node.domain, node.op))
        if rule is None:
            return [node]
        if self._names is None:
            self._names = Names(sg.graph)
        inputs, outputs = list(node.inputs), list(node.outputs)
        maker = Maker(sg, node, inputs, outputs, self._names)
        try:
            rule(maker)
        except (Refusal, Stuck, *MALFORMED) as error:
            sg.left_whole[id(node)] = _refusal(error, node)
            maker.give_up()
            return [node]
        if not maker.made:
            return [node]
        absorbed = [(n, list(n.inputs), list(n.outputs)) for n in maker.absorbed]
        for gone in (node, *maker.absorbed):
            gone.inputs.clear()
            gone.outputs.clear()
        self.done.append(Expansion(node, inputs, outputs, maker.made, absorbed))
        logger.debug("%s is looked at as %d standard nodes", label(node), len(maker.made))
        return maker.made

    def settle_attention(self, sg: SymbolicGraph, rewritten: Sequence[gs.Node], *, keep_apart: bool = False) -> None:
        """Before sites are replaced: puts every attention together again that is not among those rewritten; or, with `keep_apart`,
        writes an operator that is not one of ONNX as standard ones where that can be done."""
        keep = {id(n) for n in rewritten}
        for expansion in list(self.done):
            core = expansion.core
            if (
                core is not None
                and id(core) not in keep
                and not (keep_apart and expansion.is_foreign and self._written_out(sg, expansion, core))
            ):
                self._undo(sg.graph, expansion)

    def _written_out(self, sg: SymbolicGraph, expansion: Expansion, core: gs.Node) -> bool:
        """Whether the core of an expansion could be put into standard operators."""
        assert self._names is not None
        maker = Maker(sg, core, core.inputs, core.outputs, self._names)
        try:
            dense.expand(maker)
        except (Refusal, Stuck, *MALFORMED):
            maker.give_up()
            return False
        at = next(i for i, n in enumerate(sg.graph.nodes) if n is core)
        sg.graph.nodes[at : at + 1] = maker.made
        expansion.new = [n for n in expansion.new if n is not core] + maker.made
        core.inputs.clear()
        core.outputs.clear()
        return True

    def settle_others(self, graph: gs.Graph, *, keep_apart: bool = False) -> None:
        """After sites were replaced: puts together what is no attention, unless a rewritten attention reads a tensor inside of it;
        with `keep_apart` only the operators of ONNX."""
        for expansion in list(self.done):
            inside = {id(n) for n in expansion.new}
            made = {id(t) for t in expansion.outputs}
            alive = any(t.inputs and id(t.inputs[0]) in inside for t in expansion.outputs)
            read = any(id(r) not in inside for n in expansion.new for t in n.outputs if id(t) not in made for r in t.outputs)
            attention = any(n.domain == CORE_DOMAIN for n in expansion.new)
            if alive and not read and not attention and not (keep_apart and expansion.is_foreign):
                self._undo(graph, expansion)

    def _undo(self, graph: gs.Graph, expansion: Expansion) -> None:
        """The operator makes its outputs again; its parts make unread tensors, so that they go with the dead nodes."""
        first = next((i for i, n in enumerate(graph.nodes) if any(n is m for m in expansion.new)), None)
        if first is None:
            return
        outputs = {id(t) for t in expansion.outputs}
        for node in expansion.new:
            node.outputs = [gs.Variable(f"{t.name}/unread") if id(t) in outputs else t for t in node.outputs]
        whole = [*expansion.absorbed, (expansion.node, expansion.inputs, expansion.outputs)]
        for node, inputs, made in whole:
            node.inputs, node.outputs = list(inputs), list(made)
            graph.nodes[:] = [n for n in graph.nodes if n is not node]
        first = next(i for i, n in enumerate(graph.nodes) if any(n is m for m in expansion.new))
        graph.nodes[first:first] = [node for node, _, _ in whole]
        self.done.remove(expansion)


def _refusal(error: BaseException, node: gs.Node) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Stuck):
        return Refusal(f"{error.why}.", label(error.node) or label(node))
    return Refusal("it breaks its operator's specification.", label(node))
