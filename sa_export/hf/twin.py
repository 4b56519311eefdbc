"""A bfloat16 graph as a float32 graph over the same weight file, for runtimes without bfloat16 kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NAME = "__float32"


def float32_twin(model: Any) -> Any:
    """Changes a model in place so that it computes in float32 wherever it computed in bfloat16, and returns it.

    Every bfloat16 initializer stays as it is, bytes and file, and goes through a `Cast` to float32; graph inputs and outputs, casts,
    constants and type annotations become float32. Function bodies are generic in their type; only their casts and constants matter.

    Args:
        model: an `onnx.ModelProto`; external data need not be loaded.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    weights = [tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    renamed = {name: name + _NAME for name in weights}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        _widen(node)
    for node in graph.node:
        _rename(node.input, renamed)
    for output in graph.output:
        if output.name in renamed:
            graph.node.append(helper.make_node("Identity", [renamed[output.name]], [output.name]))
    casts = [helper.make_node("Cast", [name], [renamed[name]], to=TensorProto.FLOAT) for name in weights]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _rename(names: Any, renamed: dict[str, str]) -> None:
    for i, name in enumerate(names):
        names[i] = renamed.get(name, name)


def _widen(node: Any) -> None:
    """Casts and constants of one node; `to` and `dtype` are the attributes that name an element type."""
    from onnx import TensorProto, numpy_helper

    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype", "softmax_precision", "stash_type") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        tensors: Iterable[Any] = (attribute.t, *attribute.tensors)
        for tensor in tensors:
            if tensor.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(tensor).astype("float32")
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
