"""Why a candidate is no site: how far the pattern of attention was found, the node that stopped it, and the nodes around that.

This only looks at the graph as it is written; what decides is `patterns`. A cut-out of the graph can be saved for a viewer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from graph_passes import model_io
from graph_passes.errors import GraphError
from graph_passes.report import InspectReport
from graph_passes.site import DeclinedSite

__all__ = ["Explanation", "Step", "explain", "write_cut_out"]

_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "Einsum"})
_FARTHEST_BACK, _FARTHEST_ON = 14, 8
_AROUND = 2
_INLINE_BYTES = 4096
_MARKS = {"found": "+", "stopped": "x", "missing": "-"}


@dataclass(frozen=True)
class Step:
    """One part of the pattern: `found`, `stopped` (found, and the reason why it is no site) or `missing`."""

    state: str
    role: str
    node: str


@dataclass(frozen=True)
class Explanation:
    """A declined candidate.

    Attributes:
        site: what was declined, with the reason.
        steps: the best partial match, from the product of queries and keys to the product with the values.
        around: labels of the nodes of the cut-out, in graph order.
        lines: the same nodes with their tensors.
    """

    site: DeclinedSite
    steps: tuple[Step, ...]
    around: tuple[str, ...]
    lines: tuple[str, ...]

    def as_text(self) -> str:
        """A paragraph: + found, x stopped here, - not found."""
        width = max((len(s.role) for s in self.steps), default=0)
        return "\n".join(
            [
                f"{self.site.id} ({self.site.pattern}) is left as it is: {self.site.reason}",
                f"  stopped by {self.site.stopped_by or self.site.node}",
                "  best match (+ found, x stopped here, - not found):",
                *(f"    {_MARKS[s.state]} {s.role.ljust(width)}  {s.node}".rstrip() for s in self.steps),
                "  around it:",
                *(f"    {line}" for line in self.lines),
            ]
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values for reports."""
        steps = [{"state": s.state, "role": s.role, "node": s.node} for s in self.steps]
        return {**self.site.as_dict(), "best_match": steps, "around": list(self.lines)}


def explain(path: str | Path, report: InspectReport, site: str | None = None) -> tuple[Explanation, ...]:
    """Explanations of the declined candidates of a model.

    Args:
        path: the model that `report` is of.
        report: from `pipeline.inspect`.
        site: the id of one candidate; None for all.

    Raises:
        GraphError: there is no declined candidate of that id, or the model cannot be read.
    """
    chosen = [d for d in report.declined if site is None or d.id == site]
    if site is not None and not chosen:
        if any(s.id == site for s in report.sites):
            raise GraphError(f"{site} is a site that can be rewritten; only declined ones need explaining.")
        ids = ", ".join(d.id for d in report.declined[:8]) or "none"
        raise GraphError(f"{report.model.name} has no declined candidate {site!r}; declined are: {ids}.")
    wiring = _Wiring(_shaped(model_io.load(Path(path))).graph)
    return tuple(_explained(wiring, d) for d in chosen)


def write_cut_out(path: str | Path, explanation: Explanation, out: str | Path, *, force: bool = False) -> None:
    """Saves the nodes of an explanation as a model of their own, without weights, that ONNX's checker accepts.

    Tensors that cross the cut become inputs and outputs, and so do stored tensors above 4096 bytes or outside of the file.

    Raises:
        GraphError: the file exists and `force` is not given, cannot be written, or the nodes cannot stand alone.
    """
    out = Path(out)
    if out.exists() and not force:
        raise GraphError(f"{out} exists; choose another name, or pass --force to replace it.")
    model = _shaped(model_io.load(Path(path)))
    wiring = _Wiring(model.graph)
    names = set(explanation.around)
    nodes = [n for n in model.graph.node if _label(n) in names]
    made = {o for n in nodes for o in n.output if o}
    read = dict.fromkeys(i for n in nodes for i in (*n.input, *_captured(n)) if i)
    small = {t.name: t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL and t.ByteSize() <= _INLINE_BYTES}
    leaving = {o.name for o in model.graph.output} | {
        i for n in model.graph.node if _label(n) not in names for i in (*n.input, *_captured(n))
    }
    outputs = [o for n in nodes for o in n.output if o and (o in leaving or not wiring.readers(o))]
    graph = onnx.helper.make_graph(
        nodes,
        f"around {explanation.site.id}",
        [wiring.info(i) for i in read if i not in made and i not in small],
        [wiring.info(o) for o in outputs],
        [small[i] for i in read if i in small and i not in made],
        doc_string=f"{explanation.site.reason} Stopped by {explanation.site.stopped_by or explanation.site.node}.",
        value_info=[wiring.info(o) for o in made if o not in outputs and wiring.knows(o)],
    )
    cut = onnx.helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version)
    complaint = model_io.complaint(cut)
    if complaint is not None:
        raise GraphError(f"The nodes around {explanation.site.id} cannot stand as a model of their own: {complaint}")
    model_io.write(cut, out)


class _Wiring:
    """Who makes and who reads each tensor of a graph, and what is known of it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.maker = {o: n for n in graph.node for o in n.output if o}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys((*node.input, *_captured(node))):
                self._readers.setdefault(name, []).append(node)
        self._infos = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        self.stored = {t.name: t for t in graph.initializer}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return self._readers.get(name, [])

    def knows(self, name: str) -> bool:
        return name in self._infos and self._infos[name].type.tensor_type.elem_type != onnx.TensorProto.UNDEFINED

    def info(self, name: str) -> onnx.ValueInfoProto:
        """What is known of a tensor, as ONNX declares it; of an unknown one that it is float."""
        if name in self.stored:
            tensor = self.stored[name]
            return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        if self.knows(name):
            return self._infos[name]
        unknown = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        unknown.doc_string = "The element type is not known."
        return unknown

    def back(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [self.maker[i] for i in node.input if i in self.maker]

    def on(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [reader for o in node.output if o for reader in self.readers(o)]

    def line(self, node: onnx.NodeProto) -> str:
        def said(name: str) -> str:
            return f"{name}{self._shape(name)}" if name else "-"

        return f"{_label(node)}: {', '.join(map(said, node.input))} -> {', '.join(map(said, node.output))}"

    def _shape(self, name: str) -> str:
        if name in self.stored:
            return "[" + ",".join(map(str, self.stored[name].dims)) + "] stored"
        info = self._infos.get(name)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return ""
        return (
            "["
            + ",".join(d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in info.type.tensor_type.shape.dim)
            + "]"
        )


def _explained(wiring: _Wiring, site: DeclinedSite) -> Explanation:
    nodes = wiring.graph.node
    core = next((n for n in nodes if site.node in (n.name, n.output[0] if n.output else None)), None)
    stopped = next((n for n in nodes if _label(n) == site.stopped_by), None)
    if core is None:  # inside of a subgraph or a function: the node that holds it was named
        core = stopped
    if core is None:
        return Explanation(site, (Step("stopped", site.pattern, site.node),), (), ())
    steps, chain = _match(wiring, core, stopped)
    kept = {id(n) for n in chain} | _near(wiring, stopped if stopped is not None else core)
    around = [n for n in nodes if id(n) in kept]
    return Explanation(site, tuple(steps), tuple(_label(n) for n in around), tuple(wiring.line(n) for n in around))


def _match(wiring: _Wiring, core: onnx.NodeProto, stopped: onnx.NodeProto | None) -> tuple[list[Step], list[onnx.NodeProto]]:
    """The steps from the product of queries and keys to that with the values, and the nodes of them that are there."""
    before = _way(core, wiring.back, lambda n: _is_computed_product(wiring, n), _FARTHEST_BACK)
    after = _way(core, wiring.on, lambda n: n.op_type in _PRODUCTS, _FARTHEST_ON)
    chain = [*reversed(before or []), core, *(after or [])]

    def step(node: onnx.NodeProto, role: str) -> Step:
        return Step("stopped" if node is stopped else "found", role, _label(node))

    if core.op_type not in ("Softmax", "Div", "Mul", "Exp"):  # an operator that holds the whole attention, or a subgraph
        steps, chain = [step(core, "attention in one node")], [core]
    else:
        steps = [step(before[-1], "queries x keys")] if before else [Step("missing", "queries x keys", "")]
        steps += [step(n, _role(n)) for n in reversed((before or [])[:-1])]
        steps.append(step(core, "softmax"))
        steps += [step(n, "on the way to the values") for n in (after or [])[:-1]]
        steps.append(step(after[-1], "probabilities x values") if after else Step("missing", "probabilities x values", ""))
    if stopped is not None and all(n is not stopped for n in chain):
        steps.append(Step("stopped", "beside it", _label(stopped)))
    return steps, chain


def _way(
    start: onnx.NodeProto,
    step: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]],
    wanted: Callable[[onnx.NodeProto], bool],
    farthest: int,
) -> list[onnx.NodeProto] | None:
    """The shortest way from a node, without it, to a wanted one."""
    seen = {id(start)}
    queue: deque[list[onnx.NodeProto]] = deque([[start]])
    while queue:
        way = queue.popleft()
        for node in step(way[-1]):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if wanted(node):
                return [*way[1:], node]
            if len(way) < farthest:
                queue.append([*way, node])
    return None


def _is_computed_product(wiring: _Wiring, node: onnx.NodeProto) -> bool:
    """A product of two tensors neither of which is stored."""
    if node.op_type not in _PRODUCTS:
        return False
    return not any(name in wiring.stored or _is_weight(wiring, name) for name in list(node.input)[:2])


def _is_weight(wiring: _Wiring, name: str) -> bool:
    node = wiring.maker.get(name)
    if node is None:
        return False
    if node.op_type == "Constant":
        return True
    return (
        node.op_type in ("Transpose", "Cast", "Identity", "DequantizeLinear")
        and bool(node.input)
        and (node.input[0] in wiring.stored or _is_weight(wiring, node.input[0]))
    )


def _role(node: onnx.NodeProto) -> str:
    if node.op_type in ("Mul", "Div"):
        return "scale"
    if node.op_type in ("Add", "Sub", "Where"):
        return "mask"
    return "before softmax"


def _near(wiring: _Wiring, node: onnx.NodeProto) -> set[int]:
    """Ids of the nodes at most `_AROUND` steps from one; nodes that very many read are not passed."""
    near = {id(node)}
    edge = [node]
    for _ in range(_AROUND):
        edge = [n for at in edge for n in (*wiring.back(at), *wiring.on(at)) if len(wiring.on(at)) <= 8 or at is node]
        edge = [n for n in edge if id(n) not in near]
        near |= {id(n) for n in edge}
    return near


def _captured(node: onnx.NodeProto) -> Sequence[str]:
    """Names that the subgraphs of a node read from around it (and some of their own, which do no harm here)."""
    graphs = [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    inner = [({o for n in g.node for o in n.output} | {i.name for i in g.input} | {t.name for t in g.initializer}, g) for g in graphs]
    return [name for own, g in inner for n in g.node for name in (*n.input, *_captured(n)) if name and name not in own]


def _label(node: onnx.NodeProto) -> str:
    """The same name as in reports (`site.label`)."""
    return f"{node.op_type} {node.name or '-> ' + (node.output[0] if node.output else '?')}"


def _shaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes that ONNX can infer; as it is where it cannot."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # inference fails on what it does not know in ways of its own
        return model
