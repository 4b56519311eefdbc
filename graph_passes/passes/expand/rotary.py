"""Rotary embedding in standard operators, and `com.microsoft.RotaryEmbedding` of ONNX Runtime.

Source: Su et al., RoFormer (arXiv 2104.09864). A pair (x, y) of a head becomes (x cos - y sin, y cos + x sin); the pairs are the
two halves of the turned part, or its neighbours (`interleaved`).
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import op_names

__all__ = ["expand", "turned"]

_KNOWN = op_names("num_heads rotary_embedding_dim interleaved is_packed_batching scale")


def expand(m: Maker) -> None:
    source, positions, cos, sin = m.inputs(4)
    m.refuse_unknown_attributes(_KNOWN)
    source, positions, cos, sin = m.needed(source, positions, cos, sin)
    if m.attribute("is_packed_batching", 0) or float(m.node.attrs.get("scale", 1.0)) != 1:
        raise m.refusal("it has packed batches or a factor, which is not carried over.")
    half = m.number(m.shape(cos, 2)[1], "rotary width")
    shape = m.shape(source)
    interleaved = m.flag("interleaved")
    rows = source if len(shape) == 3 else None
    if rows is not None:
        heads = m.attribute("num_heads", 0)
        if not heads:
            # Without the attribute the head is as wide as the cache says.
            heads = m.number(shape[2], "width") // (2 * half)
        source = m.heads_first(source, heads)
    index = m.cast(positions, onnx.TensorProto.INT64)
    if len(m.shape(positions)) == 1:
        # One number: the position of the first row.
        length = m.length(source, 2)
        index = m.op("Unsqueeze", m.op("Add", m.positions(length), index), m.ints([0]))
    out = turned(m, source, index, cos, sin, interleaved, into=None if rows is not None else m.output(0))
    if rows is not None:
        m.rows_first(out, m.output(0))


def turned(
    m: Maker,
    source: gs.Tensor,
    index: gs.Tensor,
    cos: gs.Tensor,
    sin: gs.Tensor,
    interleaved: bool,
    into: gs.Tensor | None = None,
    share: bool = False,
) -> gs.Tensor:
    """[B, heads, length, size], its first 2 * (width of the caches) entries turned.

    Args:
        index: positions [B or 1, length].
        cos, sin: caches [positions, half the turned width].
        share: look the caches up once for all operators of the graph that ask for the same positions.
    """
    shape = m.shape(source, 4)
    size, half = m.number(shape[3], "head size"), m.number(m.shape(cos, 2)[1], "rotary width")
    if 2 * half > size:
        raise m.refusal(f"its rotary width {2 * half} is larger than its head size {size}.")
    c, s = (_at(m, t, index, share) for t in (cos, sin))
    rest: list[gs.Tensor] = []
    part = source
    if 2 * half < size:
        m.op("Split", source, m.ints([2 * half, size - 2 * half]), axis=3, outputs=2)
        part, *rest = m.results()
    if interleaved:
        pairs = m.op("Reshape", part, m.ints([0, 0, 0, half, 2]))
        m.op("Split", pairs, m.ints([1, 1]), axis=4, outputs=2)
        x, y = (m.op("Squeeze", t, m.ints([4])) for t in m.results())
    else:
        m.op("Split", part, m.ints([half, half]), axis=3, outputs=2)
        x, y = m.results()
    first = m.op("Sub", m.op("Mul", x, c), m.op("Mul", y, s), shape=(*shape[:3], m.shape(x)[3]))
    second = m.op("Add", m.op("Mul", y, c), m.op("Mul", x, s), shape=(*shape[:3], m.shape(x)[3]))
    if not interleaved:
        return m.op("Concat", first, second, *rest, axis=3, into=into)
    joined = m.op("Concat", *(m.op("Unsqueeze", t, m.ints([4])) for t in (first, second)), axis=4)
    flat = m.op("Reshape", joined, m.ints([0, 0, 0, 2 * half]), into=None if rest else into)
    return m.op("Concat", flat, *rest, axis=3, into=into) if rest else flat


def _at(m: Maker, cache: gs.Tensor, index: gs.Tensor, share: bool) -> gs.Tensor:
    """[B or 1, 1, length, half]: rows of a cache."""

    def make() -> gs.Tensor:
        return m.op("Unsqueeze", m.op("Gather", cache, index, axis=0), m.ints([1]))

    return m.shared(("rotary", cache.name, index.name), make) if share else make()
