"""Reads and writes models as graphsurgeon graphs without touching the weights, and keeps what graphsurgeon drops."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_graphsurgeon.logger import G_LOGGER

from graph_passes import external_data, op
from graph_passes.errors import GraphError

__all__ = ["check_structure", "complaint", "drop_import", "export_graph", "import_graph", "load", "write", "write_bytes", "write_text"]


def load(path: Path) -> onnx.ModelProto:
    """A model with its external weights left where they are, after checking that they are there.

    Raises:
        GraphError: the file does not exist, is no ONNX model, or lacks weights.
    """
    if not path.is_file():
        raise GraphError(f"{path} is not a file; give the path of an ONNX model.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise GraphError(
            f"{path} cannot be read as an ONNX model ({_first_line(error)}); give an .onnx file, or export it again."
        ) from None
    if not model.graph.node or not model.opset_import:
        raise GraphError(f"{path} holds no ONNX graph; give an .onnx file, or export it again.")
    external_data.verify(model, path.parent)
    return model


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The top-level graph for surgery. Model-local functions stay behind in `model`; their calls are ordinary nodes.

    Raises:
        GraphError: the graph is not in topological order, or graphsurgeon cannot hold it.
    """
    aside = onnx.ModelProto()
    aside.functions.extend(model.functions)
    model.ClearField("functions")
    try:
        with G_LOGGER.suppress():
            return gs.import_onnx(model)
    except Exception as error:  # graphsurgeon raises whatever it stumbles over
        raise GraphError(
            f"The graph cannot be taken apart by onnx-graphsurgeon ({_first_line(error)}); see what onnx.checker says of it."
        ) from error
    finally:
        model.functions.extend(aside.functions)


def export_graph(graph: gs.Graph, original: onnx.ModelProto) -> onnx.ModelProto:
    """The model of a changed graph, with everything of the original that graphsurgeon does not keep.

    Graph inputs and outputs are the original's to the letter; functions, metadata, documentation and overloads of surviving
    nodes are restored.
    """
    for gs_node in graph.nodes:
        # graphsurgeon cannot tell the type of an empty list; the original can.
        for name in [k for k, v in gs_node.attrs.items() if isinstance(v, list) and not v]:
            del gs_node.attrs[name]
    with G_LOGGER.suppress():
        model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = original.ir_version
    model.doc_string = original.doc_string
    model.domain, model.model_version = original.domain, original.model_version
    model.metadata_props.extend(original.metadata_props)
    model.functions.extend(f for f in original.functions if f.domain != op.DOMAIN)
    new, old = model.graph, original.graph
    for name in ("input", "output", "metadata_props", "quantization_annotation"):
        new.ClearField(name)
        getattr(new, name).extend(getattr(old, name))
    new.doc_string = old.doc_string
    before = {_key(n): n for n in old.node}
    made: set[str] = set()
    for node in new.node:
        made.update(node.output)
        twin = before.get(_key(node))
        if twin is not None and twin.op_type == node.op_type:
            if twin.doc_string:
                node.doc_string = twin.doc_string
            if twin.overload:
                node.overload = twin.overload
            node.metadata_props.extend(twin.metadata_props)
            present = {a.name for a in node.attribute}
            node.attribute.extend(a for a in twin.attribute if a.name not in present and not onnx.helper.get_attribute_value(a))
    new.ClearField("value_info")
    new.value_info.extend(v for v in old.value_info if v.name in made)
    return model


def drop_import(model: onnx.ModelProto, domain: str) -> None:
    """Drops the import of a domain that no node of the model, subgraphs included, is of any more."""

    def uses(graph: onnx.GraphProto) -> bool:
        inner = (g for n in graph.node for a in n.attribute for g in (*a.graphs, *([a.g] if a.HasField("g") else [])))
        return any(n.domain == domain for n in graph.node) or any(uses(g) for g in inner)

    if not uses(model.graph):
        kept = [o for o in model.opset_import if o.domain != domain]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def check_structure(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """ONNX's checker on everything but the weights (see `complaint`).

    Raises:
        GraphError: the checker refuses the model, or refused the original already.
    """
    found = complaint(model)
    if found is not None:
        inherited = complaint(original)
        if inherited is not None:
            raise GraphError(f"The model does not pass ONNX's checker as it is: {inherited}; export it again.")
        raise GraphError(f"The rewritten graph does not pass ONNX's checker: {found}")


def complaint(model: onnx.ModelProto) -> str | None:
    """What ONNX's checker says against a model, None when it accepts it.

    An external initializer stands in as a graph input, so that no file is looked at, and operators in the standard domain that ONNX does
    not know (ONNX Runtime's optimiser puts its `SimplifiedLayerNormalization` there) are passed over.
    """
    foreign = {n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx") and not onnx.defs.has(n.op_type)}
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for node in bare.graph.node:
        if node.op_type in foreign and node.domain in ("", "ai.onnx"):
            node.domain = "foreign"
    if foreign:
        bare.opset_import.append(onnx.helper.make_opsetid("foreign", 1))
    kept = [t for t in bare.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    known = {i.name for i in bare.graph.input}
    for t in bare.graph.initializer:
        if t.data_location == onnx.TensorProto.EXTERNAL and t.name not in known:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        return _first_line(error)
    return None


def write(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model in one step (see `write_bytes`)."""
    write_bytes(model.SerializeToString(), path)


def write_text(text: str, path: Path) -> None:
    """Writes a text file in one step (see `write_bytes`)."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file in one step: a reader sees the old file or the new one, never a part.

    Raises:
        GraphError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        why = "no space is left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise GraphError(f"{path} cannot be written: {why}; free some space or choose another folder.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _key(node: onnx.NodeProto) -> str:
    """A node is told by what it makes: names may be missing or repeated, outputs may not."""
    return next((o for o in node.output if o), "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
