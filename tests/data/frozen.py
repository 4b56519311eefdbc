"""The frozen graphs: where they lie, how they are written and read, and what of their structure is compared when they are made anew."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

__all__ = ["GRAPHS", "Frozen", "freeze", "frozen", "read_manifest", "structure", "thaw", "write_manifest"]

GRAPHS = Path(__file__).parent / "graphs"
_MANIFEST = "manifest.json"
_SUFFIX = ".onnx.xz"


@dataclass(frozen=True)
class Frozen:
    """One frozen graph."""

    route: str
    family: str
    path: Path

    @property
    def id(self) -> str:
        return f"{self.route}/{self.family}"


def frozen(folder: Path = GRAPHS) -> Iterator[Frozen]:
    """All graphs of a folder, by route and family."""
    for path in sorted(folder.glob(f"*/*{_SUFFIX}")):
        yield Frozen(path.parent.name, path.name.removesuffix(_SUFFIX), path)


def freeze(model: onnx.ModelProto, folder: Path, route: str, family: str) -> Path:
    """Writes a graph, compressed, without the notes that exporters leave about the machine they ran on (source paths, stack traces)."""
    for holder in _with_metadata(model):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    path = folder / route / f"{family}{_SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(model.SerializeToString(deterministic=True), preset=9 | lzma.PRESET_EXTREME))
    return path


def thaw(path: Path) -> bytes:
    """The bytes of the ONNX file."""
    return lzma.decompress(path.read_bytes())


def read_manifest(folder: Path = GRAPHS) -> dict[str, Any]:
    """Route -> the packages and the day of its run, and what it could not export."""
    path = folder / _MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_manifest(manifest: dict[str, Any], folder: Path = GRAPHS) -> None:
    (folder / _MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n", encoding="utf-8")


def structure(path: Path) -> dict[str, Any]:
    """What two runs of an exporter are compared by: opsets, inputs, outputs, operator counts, and what is found of attention.

    Args:
        path: an ONNX file, not compressed.
    """
    from graph_passes.pipeline import inspect

    model = onnx.load(str(path), load_external_data=False)
    report = inspect(path)
    return {
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "inputs": [_declared(v) for v in model.graph.input],
        "outputs": [_declared(v) for v in model.graph.output],
        "operators": dict(sorted(Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in model.graph.node).items())),
        "sites": [
            f"{s.id} {s.pattern} {s.mask.kind} {s.heads}/{s.kv_heads} {s.head_size}/{s.value_size} {s.scale:.6g}" for s in report.sites
        ],
        "declined": [f"{d.id} {d.pattern}: {d.reason}" for d in report.declined],
    }


def _declared(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{value.name} {onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{dims}]"


def _with_metadata(model: onnx.ModelProto) -> Iterator[Any]:
    graphs = [model.graph]
    yield model
    while graphs:
        graph = graphs.pop()
        yield graph
        for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
            yield from (p for p in part if hasattr(p, "metadata_props"))
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else []
                graphs += attribute.graphs
    for function in model.functions:
        yield function
        yield from function.node
