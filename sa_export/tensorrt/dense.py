"""Full attention in the place of each `SampleAttention` node: the engine that a sparse one is compared with.

Letters in shapes: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, S query rows, T keys, D and Dv head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sa_export.errors import UserError

__all__ = ["FORMS", "lower", "write_dense"]

FORMS = ("native", "decomposed")
"""`native`: the operator ONNX Attention, TensorRT's own attention layer. `decomposed`: MatMul, Softmax, MatMul."""

_ATTENTION_OPSET = 23
_HIDDEN = -65504.0
"""Score of a pair that is not read: the lowest float16, far below every real score in any type."""


def write_dense(source: Path, target: Path, form: str, *, force: bool = False) -> Path:
    """Writes the dense model of a rewritten one; it reads the weights of `source`. In another folder these are linked to.

    Raises:
        UserError: `target` is in the way, or the model cannot have this form.
        GraphError: the weights cannot be reached from the folder of `target`.
    """
    from graph_passes import external_data, model_io

    if target.exists() and not force:
        raise UserError(f"{target} exists; choose another name, or replace it with --force.")
    model = lower(model_io.load(source), form)
    if target.parent.samefile(source.parent) or not target.parent.name.startswith("sa-export-"):
        external_data.place(model, source.parent, target.parent)
    else:  # a temporary folder, for TensorRT's parser alone: it follows links
        for location in {item.location for item in external_data.external_tensors(model)}:
            link = target.parent / location
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((source.parent / location).resolve())
    model_io.write(model, target)
    return target


def lower(model: onnx.ModelProto, form: str) -> onnx.ModelProto:
    """The same model with every `SampleAttention` node of its graph as full attention in a form of `FORMS`; the function bodies go.

    A padding key is hidden from every row but its own, so that rows of padding stay finite; what they hold is read by nobody.

    Raises:
        UserError: `native` with a soft-cap, or in a model whose opset cannot be raised to that of Attention.
    """
    from graph_passes import op

    out = onnx.ModelProto()
    out.CopyFrom(model)
    if form == "native":
        _raise_opset(out)
    del out.graph.node[:]
    masks: dict[str, str] = {}
    for node in model.graph.node:
        if node.domain != op.DOMAIN or node.op_type != op.OP_TYPE:
            out.graph.node.append(node)
            continue
        nodes = _Nodes(node.name or node.output[0])
        # Queries of one decoder share their rows: one mask serves every site with the same padding.
        padding = node.input[3] if len(node.input) > 3 else ""
        if padding not in masks:
            masks[padding] = _mask(nodes, node)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        write = _native if form == "native" else _decomposed
        write(nodes, node, masks[padding], attributes)
        out.graph.node.extend(nodes.made)
    kept = [f for f in model.functions if f.domain != op.DOMAIN]
    del out.functions[:]
    out.functions.extend(kept)
    domains = [o for o in out.opset_import if o.domain != op.DOMAIN]
    del out.opset_import[:]
    out.opset_import.extend(domains)
    return out


class _Nodes:
    """Nodes with names of their own that stand for one site."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.made: list[onnx.NodeProto] = []

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self.site}/dense/{op_type}_{len(self.made)}"
        output = output or f"{name}_out"
        self.made.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def ints(self, values: int | Sequence[int]) -> str:
        return self.add("Constant", value=numpy_helper.from_array(np.asarray(values, np.int64)))

    def scalar(self, value: float) -> str:
        return self.add("Constant", value=numpy_helper.from_array(np.asarray(value, np.float32)))

    def dim(self, tensor: str, axis: int) -> str:
        return self.add("Squeeze", self.add("Shape", tensor, start=axis, end=axis + 1), self.ints([0]))


def _mask(nodes: _Nodes, node: onnx.NodeProto) -> str:
    """bool [S, T], or [B, 1, S, T] with padding: true where row i may read key j."""
    rows, keys = nodes.dim(node.input[0], 2), nodes.dim(node.input[1], 2)
    zero, one = nodes.ints(0), nodes.ints(1)
    position = nodes.add("Unsqueeze", nodes.add("Range", nodes.add("Sub", keys, rows), keys, one), nodes.ints([1]))
    key = nodes.add("Unsqueeze", nodes.add("Range", zero, keys, one), nodes.ints([0]))
    causal = nodes.add("LessOrEqual", key, position)
    if len(node.input) < 4:
        return causal
    real = nodes.add("Unsqueeze", node.input[3], nodes.ints([1, 2]))
    own = nodes.add("Equal", key, position)
    return nodes.add("And", causal, nodes.add("Or", real, own))


def _native(nodes: _Nodes, node: onnx.NodeProto, mask: str, attributes: dict[str, Any]) -> None:
    if attributes["softcap"] > 0:
        raise UserError(f"{nodes.site} has a soft-cap, which TensorRT's attention layer does not take; use --dense decomposed.")
    nodes.add("Attention", *node.input[:3], mask, output=node.output[0], scale=attributes["scale"])


def _decomposed(nodes: _Nodes, node: onnx.NodeProto, mask: str, attributes: dict[str, Any]) -> None:
    query, key, value = node.input[:3]
    B, H, S = (nodes.add("Shape", query, start=i, end=i + 1) for i in range(3))
    N, Dv = nodes.add("Shape", key, start=1, end=2), nodes.add("Shape", value, start=3, end=4)
    rest = nodes.add("Shape", query, start=2, end=4)
    grouped = nodes.add("Reshape", query, nodes.add("Concat", B, N, nodes.add("Div", H, N), rest, axis=0))  # [B, Hkv, G, S, D]
    scaled = nodes.add("Mul", grouped, nodes.add("CastLike", nodes.scalar(attributes["scale"]), query))
    axis = nodes.ints([2])
    keys = nodes.add("Transpose", nodes.add("Unsqueeze", key, axis), perm=[0, 1, 2, 4, 3])
    scores = nodes.add("MatMul", scaled, keys)
    if attributes["softcap"] > 0:
        cap = nodes.add("CastLike", nodes.scalar(attributes["softcap"]), query)
        scores = nodes.add("Mul", nodes.add("Tanh", nodes.add("Div", scores, cap)), cap)
    seen = nodes.add("Unsqueeze", mask, axis) if len(node.input) > 3 else mask
    lowest = nodes.add("CastLike", nodes.scalar(_HIDDEN), query)
    weights = nodes.add("Softmax", nodes.add("Where", seen, scores, lowest), axis=-1)
    read = nodes.add("MatMul", weights, nodes.add("Unsqueeze", value, axis))
    nodes.add("Reshape", read, nodes.add("Concat", B, H, S, Dv, axis=0), output=node.output[0])


def _raise_opset(model: onnx.ModelProto) -> None:
    """Declares opset 23, after checking that no operator of the model has other inputs, outputs or attributes there."""
    standard = next(o for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if standard.version >= _ATTENTION_OPSET:
        return
    for name in sorted({n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx")}):
        old, new = (onnx.defs.get_schema(name, version, "") for version in (standard.version, _ATTENTION_OPSET))
        if (set(old.attributes), len(old.inputs), len(old.outputs)) != (set(new.attributes), len(new.inputs), len(new.outputs)):
            raise UserError(
                f"The operator {name} is another one in opset {_ATTENTION_OPSET}, which brings Attention; export the model with --opset {_ATTENTION_OPSET}."
            )
    standard.version = _ATTENTION_OPSET
    model.ir_version = max(model.ir_version, 10)
