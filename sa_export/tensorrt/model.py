"""What of a rewritten model concerns TensorRT: its sites, and what keeps the plugin from taking one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_export.errors import UserError

if TYPE_CHECKING:
    import onnx

__all__ = ["MAX_HEAD_SIZE", "Site", "bodies", "check_sites", "nodes_of", "read_model", "sites_of"]

MAX_HEAD_SIZE = 256
"""Of queries, keys and values, in the kernels behind the plugin."""

_DTYPES = ("FLOAT16", "BFLOAT16", "FLOAT")


@dataclass(frozen=True)
class Site:
    """A `SampleAttention` node of a model.

    Attributes:
        name: name of the node, which becomes the name of its layer.
        dtype: ONNX type of its queries (FLOAT16, ...), "" when the file does not tell.
        heads, kv_heads, head_size, value_size: of its inputs, 0 when the file does not tell.
        problem: why the plugin cannot take it, a sentence; empty when it can.
    """

    name: str
    dtype: str
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    attributes: dict[str, Any]
    problem: str = ""


def read_model(path: Path) -> onnx.ModelProto:
    """A model without its weights, after checking that those are there.

    Raises:
        GraphError: no file, no ONNX model, or no weights.
    """
    from graph_passes import model_io

    return model_io.load(path)


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The `SampleAttention` nodes of the top-level graph, in order."""
    from graph_passes import op

    return [n for n in model.graph.node if n.domain == op.DOMAIN and n.op_type == op.OP_TYPE]


def bodies(model: onnx.ModelProto) -> list[str]:
    """The variants of `SampleAttention` that the model's nodes call, by overload."""
    return sorted({n.overload for n in nodes_of(model)})


def sites_of(path: Path, model: onnx.ModelProto) -> list[Site]:
    """Every `SampleAttention` node of a model with what it is fed."""
    import onnx

    from graph_passes.pipeline import inspect

    found = {s.node: s for s in inspect(path).sites}
    types = dict(_types(model))
    out = []
    for node in nodes_of(model):
        name = node.name or node.output[0]
        shape = found.get(name)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        dtype = onnx.TensorProto.DataType.Name(types[node.input[0]]) if types.get(node.input[0]) else ""
        sizes = (shape.heads, shape.kv_heads, shape.head_size, shape.value_size) if shape else (0, 0, 0, 0)
        out.append(Site(name, dtype, *sizes, attributes, _problem(node, attributes, dtype, *sizes)))
    return out


def check_sites(path: Path, sites: list[Site]) -> None:
    """Raises UserError when the plugin cannot take one of the sites; the sentence names the first and counts the rest."""
    wrong = [s for s in sites if s.problem]
    if wrong:
        more = f" ({len(wrong) - 1} more sites are refused)" if len(wrong) > 1 else ""
        raise UserError(f"{path}: the plugin cannot take {wrong[0].name}: {wrong[0].problem}{more}")


def _problem(node: onnx.NodeProto, attributes: dict[str, Any], dtype: str, heads: int, kv_heads: int, size: int, value_size: int) -> str:
    from graph_passes import op
    from graph_passes.errors import GraphError

    if missing := [a.name for a in op.ATTRIBUTES if a.name not in attributes]:
        return f"it lacks the attribute {missing[0]}; rewrite the model again."
    if not 3 <= len(node.input) <= 4 or not all(node.input):
        return f"it has {len(node.input)} inputs; allowed are query, key, value and key_mask, none of them empty."
    if len(node.output) != 1:
        return "it makes a certificate, which TensorRT's parser cannot ask of a plugin; rewrite the model again."
    if dtype and dtype not in _DTYPES:
        return f"its queries are {dtype.lower()}; allowed are float16, bfloat16 and float32: export the model with --dtype fp16 or bf16."
    for what, got in (("head size", size), ("value size", value_size)):
        if got > MAX_HEAD_SIZE:
            return f"its {what} is {got}; allowed are 1 to {MAX_HEAD_SIZE}: set the site to skip in attention.yaml."
    try:
        policy = op.policy_from_attributes(attributes)
        if heads:
            policy.for_heads(heads)
    except GraphError as error:
        return str(error)
    if policy.policy == "residue" and policy.stride & (policy.stride - 1):
        return f"its stride is {policy.stride}; the kernels take powers of two."
    if policy.policy == "tile" and policy.sample_rows & (policy.sample_rows - 1):
        return f"its sample_rows is {policy.sample_rows}; the kernels take powers of two."
    return ""


def _types(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Element types that the file states, and those that follow from them through nodes that keep the type."""
    known: dict[str, int] = {}
    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    known.update((i.name, i.data_type) for i in graph.initializer)
    for node in graph.node:
        cast = next((a.i for a in node.attribute if a.name == "to" and node.op_type == "Cast"), 0)
        for name in node.output:
            known.setdefault(name, cast or next((known[i] for i in node.input if known.get(i)), 0))
    yield from known.items()
