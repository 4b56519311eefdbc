"""Normalisations of ONNX Runtime in standard operators: `SimplifiedLayerNormalization`, `SkipSimplifiedLayerNormalization`,
`SkipLayerNormalization` (`com.microsoft`). Sums are made in float32, as ONNX Runtime makes them."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import op_names

__all__ = ["expand_rms", "expand_skip_layer", "expand_skip_rms", "rms_normalised"]


def rms_normalised(m: Maker, x: gs.Tensor, weight: gs.Tensor, epsilon: float, into: gs.Tensor | None = None) -> gs.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    dtype = m.dtype(x)
    wide = m.cast(x, onnx.TensorProto.FLOAT)
    square = m.op("Mul", wide, wide)
    axes_are_an_input = m.sg.opset >= 18
    mean = m.op("ReduceMean", square, m.ints([-1]), keepdims=1) if axes_are_an_input else m.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = m.op("Sqrt", m.op("Add", mean, m.floats(epsilon)))
    scaled = m.op(
        "Mul", m.op("Div", wide, root), m.cast(weight, onnx.TensorProto.FLOAT), into=into if dtype == onnx.TensorProto.FLOAT else None
    )
    return scaled if dtype == onnx.TensorProto.FLOAT else m.op("Cast", scaled, to=dtype, into=into)


def expand_rms(m: Maker) -> None:
    """`SimplifiedLayerNormalization` over the last axis."""
    x, weight = m.needed(*m.inputs(2))
    m.refuse_unknown_attributes(op_names("axis epsilon stash_type"))
    axis, rank = m.attribute("axis", -1), len(m.shape(x))
    if axis not in (-1, rank - 1) or m.is_read(1):
        raise m.refusal(
            "it normalises over several axes, or its inverse deviation is read; only the last axis and the result are carried over."
        )
    rms_normalised(m, x, weight, float(m.node.attrs.get("epsilon", 1e-5)), m.output(0))


def expand_skip_rms(m: Maker) -> None:
    x, skip, weight, bias = m.inputs(4)
    x, skip, weight = m.needed(x, skip, weight)
    total = _sum(m, x, skip, bias)
    rms_normalised(m, total, weight, float(m.node.attrs.get("epsilon", 1e-12)), m.output(0))


def expand_skip_layer(m: Maker) -> None:
    x, skip, weight, shift, bias = m.inputs(5)
    x, skip, weight = m.needed(x, skip, weight)
    total = _sum(m, x, skip, bias)
    epsilon = float(m.node.attrs.get("epsilon", 1e-12))
    m.op("LayerNormalization", total, weight, *([] if shift is None else [shift]), axis=-1, epsilon=epsilon, into=m.output(0))


def _sum(m: Maker, x: gs.Tensor, skip: gs.Tensor, bias: gs.Tensor | None) -> gs.Tensor:
    """x + skip + bias, which is also the fourth output."""
    m.refuse_unknown_attributes(op_names("epsilon"))
    if m.is_read(1) or m.is_read(2):
        raise m.refusal("its mean or inverse deviation is read, which is not carried over.")
    into = m.output(3)
    total = m.op("Add", x, skip, into=into if bias is None else None)
    return total if bias is None else m.op("Add", total, bias, into=into)
