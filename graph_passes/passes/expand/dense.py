"""Full attention in standard operators, for a fused operator that is not rewritten in a model of standard operators."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.poly import Poly

__all__ = ["expand"]


def expand(m: Maker) -> None:
    """Puts a core (`CORE_DOMAIN` in `symbolic.graph`) into MatMul, Softmax and MatMul."""
    query, key, value, *masks = m.node.inputs
    heads, kv_heads = (m.number(m.shape(t, 4)[1], "number of heads") for t in (query, key))
    factor, softcap = float(m.node.attrs["scale"]), float(m.node.attrs["softcap"])
    if heads != kv_heads:
        key, value = (_repeated(m, t, heads, heads // kv_heads) for t in (key, value))
    scores = m.op("MatMul", m.op("Mul", query, m.real(factor, query)), m.op("Transpose", key, perm=[0, 1, 3, 2]))
    if softcap > 0:
        cap = m.real(softcap, query)
        scores = m.op("Mul", m.op("Tanh", m.op("Div", scores, cap)), cap)
    if m.node.attrs["offset"] is not None:
        masks = [*masks, _causal(m, query, key, m.node.attrs["offset"])]
    lowest = m.real(-65504.0 if m.dtype(query) == onnx.TensorProto.FLOAT16 else -3e38, query)
    for mask in masks:
        is_bool = m.dtype(mask) == onnx.TensorProto.BOOL
        scores = m.op("Where", mask, scores, lowest) if is_bool else m.op("Add", scores, mask)
    m.op("MatMul", m.op("Softmax", scores, axis=-1), value, into=m.output(0))


def _repeated(m: Maker, tensor: gs.Tensor, heads: int, times: int) -> gs.Tensor:
    """[B, Hkv, T, size] with each head as often as query heads read it."""
    size = m.number(m.shape(tensor, 4)[3], "head size")
    five = m.op("Expand", m.op("Unsqueeze", tensor, m.ints([2])), m.ints([1, 1, times, 1, 1]))
    return m.op("Reshape", five, m.ints([0, heads, -1, size]))


def _causal(m: Maker, query: gs.Tensor, key: gs.Tensor, offset: Poly) -> gs.Tensor:
    """[S, T]: row i sees the keys up to i + offset."""
    rows, keys = m.length(query, 2), m.length(key, 2)
    last = m.positions(rows)
    if offset == m.shape(key)[2] - m.shape(query)[2]:
        last = m.op("Add", last, m.op("Sub", keys, rows))
    elif offset.value is None:
        raise m.refusal("the length of its past cannot be written as standard operators.")
    elif offset.value:
        last = m.op("Add", last, m.ints(offset.value))
    return m.op("LessOrEqual", m.positions(keys), m.op("Unsqueeze", last, m.ints([1])))
