"""A body that keeps TensorRT from building out of the others.

TensorRT's parser tells model-local functions apart by name alone, and the first of a name wins (onnx-tensorrt, `importLocalFunctions`).
In a file with several variants of an operator every node would get the body of one of them, without a word; a single variant gives an engine
of thousands of layers after minutes, or none. So a function that no node calls stands in front of them: consumers that know `overload` pass
it over, TensorRT's parser stops at it unless the plugin is registered.
"""

from __future__ import annotations

import onnx
from onnx import helper

from graph_passes import op
from graph_passes.body.builder import PREFIX

__all__ = ["GUARD", "guard"]

GUARD = "tensorrt_needs_the_plugin"
"""The overload of the guard."""

_WHY = "SampleAttention needs its plugin: load libsample_attention_trt.so (trtexec --dynamicPlugins, polygraphy --plugins)"


def guard(body: onnx.FunctionProto) -> onnx.FunctionProto:
    """A function with the inputs and outputs of `body` that TensorRT's parser refuses, naming `_WHY` as the node.

    It has no strings and never will; should a parser take the constant all the same, the result is NaN and not a plausible number.
    """
    query, nan, like = body.input[0], f"{PREFIX}guard_nan", f"{PREFIX}guard_like"
    nodes = [
        helper.make_node("Constant", [], [f"{PREFIX}guard_why"], name=_WHY, value_string=_WHY),
        helper.make_node("Constant", [], [nan], value_float=float("nan")),
        helper.make_node("CastLike", [nan, query], [like]),
        *(helper.make_node("Add", [query, like], [output]) for output in body.output),
    ]
    return helper.make_function(
        op.DOMAIN, op.OP_TYPE, list(body.input), list(body.output), nodes, list(body.opset_import), list(body.attribute), overload=GUARD
    )
