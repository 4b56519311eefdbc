"""What TensorRT's parser would say of a model: by a table, and by the parser itself where a TensorRT is installed. Weights are not read.

Letters in sentences: D and Dv head sizes of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sa_export.tensorrt.accepted import CONTRIB_OPERATORS, CONTRIB_PLUGINS, ELEMENT_TYPES, NO_IMPORTER, RTX_PLUGINS, TRT_OPERATORS

if TYPE_CHECKING:
    import onnx

    from sa_export.tensorrt.model import Site

__all__ = ["Finding", "Lint", "lint", "lint_text"]

_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT does not take, or takes in a way that is not expected.

    Attributes:
        node: its name, or the name of a tensor; "" for the whole file.
        op: the operator, or the element type.
        text: a sentence.
        fatal: no engine can be built; otherwise it is a remark.
        refused_by: the runtime that alone cannot build the engine, for a remark that says so.
        source: who says it: `table`, or the parser's name and version.
    """

    node: str
    op: str
    text: str
    fatal: bool = True
    source: str = "table"
    refused_by: str = ""


@dataclass(frozen=True)
class Lint:
    """All findings on a model; `parsers` names the TensorRT versions that were asked."""

    findings: list[Finding]
    parsers: list[str]

    @property
    def ok(self) -> bool:
        return not any(f.fatal for f in self.findings)

    def taken_by(self, runtime: str) -> bool:
        """Whether nothing is known that this runtime (`tensorrt`, `tensorrt_rtx`) refuses."""
        return self.ok and not any(f.refused_by == runtime for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "parsers": self.parsers, "findings": [vars(f) for f in self.findings]}


def lint(path: Path, *, ask: bool = True) -> Lint:
    """Judges a model, rewritten or not.

    Args:
        path: an ONNX file; its external weights need not be read.
        ask: also ask the parser of each TensorRT that is installed, in a process of its own.

    Raises:
        GraphError: the file cannot be read.
    """
    from graph_passes import op
    from sa_export.tensorrt.model import read_model, sites_of
    from sa_export.tensorrt.runtime import installed_runtimes

    model = read_model(path)
    sites = sites_of(path, model) if any(n.domain == op.DOMAIN for n in model.graph.node) else []
    findings = list(_by_table(path, model, sites))
    parsers = []
    known = {f.node for f in findings if f.fatal}
    for runtime in installed_runtimes() if ask else ():
        name, said = _by_parser(runtime.name, model, sites)
        parsers.append(name)
        findings = [f for f in findings if f.refused_by != runtime.name or f.node not in {x.node for x in said}]
        findings += [f for f in said if f.node not in known]
    return Lint(findings, parsers)


def lint_text(result: Lint) -> str:
    """A short list for a terminal: one line a finding, alike ones together."""
    asked = ", ".join(result.parsers) or "table only; the parser itself is asked where tensorrt or tensorrt-rtx is installed"
    verdict = "nothing that it refuses" if result.ok else "it refuses this model"
    lines = [f"TensorRT's parser ({asked}): {verdict}"]
    groups: dict[tuple[str, bool], list[str]] = {}
    for f in result.findings:
        groups.setdefault((f"{f.op}: {f.text}" if f.op else f.text, f.fatal), []).append(f.node)
    for (text, fatal), nodes in list(groups.items())[:_SHOWN]:
        names = [n for n in nodes if n]
        where = f" ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")") if names else ""
        lines.append(f"  {'refused' if fatal else 'note'}: {text}{where}")
    if len(groups) > _SHOWN:
        lines.append(f"  and {len(groups) - _SHOWN} more kinds; --json lists them all")
    return "\n".join(lines)


def _by_table(path: Path, model: onnx.ModelProto, sites: list[Site]) -> Iterator[Finding]:
    from graph_passes import op
    from graph_passes.body.guard import GUARD
    from sa_export.tensorrt.model import bodies

    yield from _contrib(path, model)
    constants = _constants(model.graph)
    functions = {f.name for f in model.functions}
    for node in _nodes(model.graph):
        if node.domain in ("", "ai.onnx"):
            if node.op_type in NO_IMPORTER:
                yield Finding(node.name, node.op_type, "TensorRT has no such operator.")
            elif node.op_type == "Attention":
                yield from _attention(node)
            elif node.op_type.startswith("Reduce") and any(i not in constants for i in node.input[1:] if i):
                yield Finding(node.name, node.op_type, "its axes are computed; fold them (polygraphy surgeon sanitize --fold-constants).")
            elif node.op_type in RTX_PLUGINS:
                text = "taken by TensorRT; TensorRT for RTX leaves it to a plugin that it does not bring."
                yield Finding(node.name, node.op_type, text, fatal=False, refused_by="tensorrt_rtx")
        elif node.domain not in (op.DOMAIN, "com.microsoft") and node.op_type not in functions and node.op_type not in TRT_OPERATORS:
            yield Finding(node.name, node.op_type, f"domain {node.domain!r}: a plugin of this name must be registered.", fatal=False)
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    yield from _element_types(types)
    for site in sites:
        if site.problem:
            yield Finding(site.name, op.OP_TYPE, site.problem)
    first = next((f.overload for f in model.functions if f.name == op.OP_TYPE), "")
    if len(variants := bodies(model)) > 1 and first != GUARD:
        yield Finding(
            "",
            "",
            f"the file has {len(variants)} bodies of {op.OP_TYPE} ({', '.join(variants)}), and TensorRT tells functions apart by name alone: "
            "without the plugin it takes the first for all nodes. Rewrite the model again, or build with sa-export build, which counts the plugin's layers.",
            fatal=False,
        )


def _contrib(path: Path, model: onnx.ModelProto) -> Iterator[Finding]:
    """Operators of ONNX Runtime."""
    found = [n for n in _nodes(model.graph) if n.domain == "com.microsoft"]
    standard = _standard(path, model) if found else set()
    shapes = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.value_info)}
    ranks = {name: len(t.shape.dim) for name, t in shapes.items() if t.HasField("shape")}
    for node in found:
        is_written = node.output[0] in standard
        advice = "add --standard to rewrite." if is_written else "--standard has no rule for it: export the model without it."
        if node.op_type in CONTRIB_PLUGINS:
            text = f"TensorRT has no such operator, and TensorRT for RTX leaves it to a plugin that it does not bring; {advice}"
            yield Finding(node.name, node.op_type, text)
        elif node.op_type not in CONTRIB_OPERATORS:
            yield Finding(node.name, node.op_type, f"an operator of ONNX Runtime alone; {advice}")
        elif why := _contrib_form(node, ranks):
            yield Finding(node.name, node.op_type, f"TensorRT has no such operator, and TensorRT for RTX {why}; {advice}")
        else:
            text = f"taken by TensorRT for RTX alone; for TensorRT, {advice}"
            yield Finding(node.name, node.op_type, text, fatal=False, refused_by="tensorrt")


def _contrib_form(node: onnx.NodeProto, ranks: dict[str, int]) -> str:
    """Why TensorRT for RTX refuses this form of an operator that it takes; "" when it does not."""
    if node.op_type == "SkipSimplifiedLayerNormalization" and sum(bool(o) for o in node.output) > 2:
        return "takes two outputs at most"
    if (
        node.op_type == "RotaryEmbedding"
        and not any(a.name == "num_heads" and a.i for a in node.attribute)
        and ranks.get(node.input[0]) != 4
    ):
        return "ends the process at a 3-D one without num_heads"
    return ""


def _standard(path: Path, model: onnx.ModelProto) -> set[str]:
    """First outputs of the nodes of ONNX Runtime that a rewrite with `standard` would write as standard ones."""
    from graph_passes import in_memory, model_io

    graph = model_io.import_graph(model)
    foreign = [n for n in graph.nodes if n.domain == "com.microsoft"]
    outputs = [n.outputs[0].name for n in foreign]
    found = in_memory.examine(graph, path.parent)
    in_memory.replace(found, {}, standard=True)
    left = {id(n) for n in graph.nodes}
    return {name for node, name in zip(foreign, outputs, strict=True) if id(node) not in left}


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Tensors that the parser has as weights."""
    found = {t.name for g in _graphs(graph) for t in g.initializer}
    for node in _nodes(graph):
        if node.op_type == "Constant" or (node.op_type in ("Cast", "Identity") and node.input[0] in found):
            found.update(node.output)
    return found


def _attention(node: onnx.NodeProto) -> Iterator[Finding]:
    """ONNX Attention as TensorRT's attention layer takes it."""
    from onnx import helper

    a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    given = [bool(x) for x in node.input] + [False] * 7
    if a.get("softcap", 0.0) > 0:
        yield Finding(node.name, node.op_type, "softcap is not taken.")
    if "softmax_precision" in a:
        yield Finding(node.name, node.op_type, "softmax_precision is not taken.")
    if given[3] and a.get("is_causal", 0):
        yield Finding(node.name, node.op_type, "a mask together with is_causal is not taken.")
    if given[4] or given[5] or sum(bool(o) for o in node.output) > 1:
        yield Finding(node.name, node.op_type, "past and present keys are not taken; concatenate them outside.")


def _element_types(types: dict[str, int]) -> Iterator[Finding]:
    from onnx import TensorProto

    for name, number in types.items():
        if not number:
            continue
        kind = TensorProto.DataType.Name(number)
        if kind not in ELEMENT_TYPES:
            yield Finding(name, kind, "TensorRT has no such element type.")
        elif kind == "DOUBLE":
            yield Finding(name, kind, "TensorRT computes this in float32.", fatal=False)


def _by_parser(runtime: str, model: onnx.ModelProto, sites: list[Site]) -> tuple[str, list[Finding]]:
    """The parser's name and version, and what it refuses. The plugin is not loaded: its nodes are judged by the table."""
    from graph_passes import op
    from sa_export.tensorrt.child import run_task

    with TemporaryDirectory(prefix="sa-export-") as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(_without_weights(model, sites).SerializeToString())
        answer = run_task(runtime, "parse", {"model": str(file), "plugin": None})
    if answer.error:
        return runtime, [Finding("", "", f"{runtime} could not be asked: {answer.error}", fatal=False, source=runtime)]
    name = f"{runtime} {answer.result['version']}"
    return name, [
        Finding(e["node"], e["op"], " ".join(e["text"].split())[:200], source=name)
        for e in answer.result["errors"]
        if not e["op"].startswith(op.OP_TYPE)
    ]


def _without_weights(model: onnx.ModelProto, sites: list[Site]) -> onnx.ModelProto:
    """The model with graph inputs in the place of external weights, and of each SampleAttention node one that makes a tensor of its
    type and shape: an Identity of its query, or a product with [D, Dv] where values are not as wide."""
    import onnx

    from graph_passes import op

    out = onnx.ModelProto()
    out.CopyFrom(model)
    kept = [t for t in out.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    inputs = {i.name for i in out.graph.input}
    for t in out.graph.initializer:
        if t.data_location == onnx.TensorProto.EXTERNAL and t.name not in inputs:
            out.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    del out.graph.initializer[:]
    out.graph.initializer.extend(kept)
    narrow = {s.name: s for s in sites if s.dtype and s.head_size != s.value_size}
    for node in out.graph.node:
        if node.domain == op.DOMAIN and node.op_type == op.OP_TYPE:
            site = narrow.get(node.name or node.output[0])
            node.op_type, node.domain, node.overload = "MatMul" if site else "Identity", "", ""
            del node.input[1:], node.output[1:], node.attribute[:]
            if site:
                weight = f"{site.name}/values"
                node.input.append(weight)
                dtype = onnx.TensorProto.DataType.Value(site.dtype)
                out.graph.input.append(onnx.helper.make_tensor_value_info(weight, dtype, [site.head_size, site.value_size]))
    del out.functions[:]
    out.functions.extend(f for f in model.functions if f.domain != op.DOMAIN)
    return out


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for g in _graphs(graph):
        yield from g.node


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _graphs(subgraph)
