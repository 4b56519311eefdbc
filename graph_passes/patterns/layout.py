"""Follows a query, key or value from the product that reads it back to the tensor that holds it as [B, H, length, head size].

Transposes in any spelling, the repetition of key/value heads, no-op casts and scalar factors on the way are undone by following
one symbolic element; what is found is therefore equal to the original for every index, whatever operators spelled it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.site import Operand, Refusal, label
from graph_passes.symbolic.graph import Shape, Stuck, SymbolicGraph, is_standard, producer
from graph_passes.symbolic.movement import broadcast_index, move
from graph_passes.symbolic.poly import Poly, const, floordiv

__all__ = ["Holder", "Read", "Step", "follow", "holders", "operands", "scalar_factor"]

Read = tuple[gs.Tensor, Shape]
"""A tensor and the index of one of its elements."""


_WIDTH = {onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16, onnx.TensorProto.FLOAT: 32, onnx.TensorProto.DOUBLE: 64}


@dataclass(frozen=True)
class Step:
    """One tensor on the way: the element of the product's operand is `factor * tensor[index]`; `through` are the nodes passed so far."""

    tensor: gs.Tensor
    index: Shape
    factor: float
    through: tuple[gs.Node, ...]


@dataclass(frozen=True)
class Holder:
    """A tensor that holds the operand, up to `factor`."""

    operand: Operand
    factor: float
    dtype: int | None
    through: tuple[gs.Node, ...]


def scalar_factor(sg: SymbolicGraph, node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """For `x * c`, `c * x` and `x / c` with c one constant number: x, and the factor."""
    if node.op not in ("Mul", "Div") or not is_standard(node):
        return None
    left, right = node.inputs
    c = sg.scalar(right)
    if c is not None and (node.op == "Mul" or c != 0):
        return left, c if node.op == "Mul" else 1.0 / c
    c = sg.scalar(left) if node.op == "Mul" else None
    return None if c is None else (right, c)


def follow(sg: SymbolicGraph, tensor: gs.Tensor, index: Shape) -> Iterator[Step]:
    """The tensors that hold an element, from the given one towards the inputs."""
    factor = 1.0
    through: tuple[gs.Node, ...] = ()
    while True:
        yield Step(tensor, index, factor, through)
        node = producer(tensor)
        if node is None:
            return
        try:
            scaled = scalar_factor(sg, node)
            if scaled is not None:
                index = broadcast_index(sg, node, scaled[0], index)
                tensor, factor = scaled[0], factor * scaled[1]
            elif _widens(sg, node):
                tensor = node.inputs[0]
            else:
                moved = move(sg, node, tensor, index)
                if moved is None:
                    return
                tensor, index = moved
        except Stuck:
            return
        through = (*through, node)


def _widens(sg: SymbolicGraph, node: gs.Node) -> bool:
    """A float Cast that loses nothing: the kernel accumulates in float32 whatever the input type."""
    if node.op != "Cast" or not is_standard(node):
        return False
    source, target = (_WIDTH.get(sg.dtype(t) or 0, 0) for t in (node.inputs[0], node.outputs[0]))
    return 0 < source <= target


def holders(
    sg: SymbolicGraph, read: Read, *, b: Poly, h: Poly, row: Poly, column: Poly, heads: int, sizes: tuple[Poly, Poly, Poly]
) -> list[Holder]:
    """All tensors on the way that hold the operand as [B, H', length, size] or a transposition of it, H' dividing `heads`.

    Args:
        read: the element that the product reads, in terms of b, h, row and column.
        heads: number of query heads; head h reads head h // (heads / H') of the tensor.
        sizes: B, length, head size.

    Returns:
        Best first: fewest heads, then no transposition needed, then nearest to the inputs.
    """
    found: list[tuple[tuple[int, bool, int], Holder]] = []
    for depth, step in enumerate(follow(sg, *read)):
        shape = sg.shape(step.tensor)
        if shape is None or len(shape) != 4:
            continue
        for perm in permutations(range(4)):
            at, lengths = [step.index[p] for p in perm], [shape[p] for p in perm]
            count = lengths[1].value
            if not count or heads % count or (lengths[0], lengths[2], lengths[3]) != sizes:
                continue
            if at == [b, floordiv(h, const(heads // count)), row, column]:
                identity = perm == (0, 1, 2, 3)
                operand = Operand(step.tensor.name, count, None if identity else perm)
                found.append(((count, not identity, -depth), Holder(operand, step.factor, sg.dtype(step.tensor), step.through)))
                break
    return [holder for _, holder in sorted(found, key=lambda pair: pair[0])]


def operands(
    sg: SymbolicGraph, grid: Grid, query: Read, key: Read, value: Read, output: gs.Tensor, node: gs.Node
) -> tuple[Holder, Holder, Holder]:
    """Where queries, keys and values are held.

    All have the element type of the output, or a half type where they were widened to float; keys and values have the fewest heads that
    both can be had with.

    Args:
        query, key, value: the elements (b, h, q, d), (b, h, kv, d) and (b, h, kv, w) as the products read them.
        node: named when the operands cannot be found.

    Raises:
        Refusal: no tensors hold them so.
    """
    heads = grid.heads.value or 0
    b, h = grid.b, grid.h
    queries = holders(sg, query, b=b, h=h, row=grid.q, column=grid.d, heads=heads, sizes=(grid.batch, grid.rows, grid.size))
    keys = holders(sg, key, b=b, h=h, row=grid.kv, column=grid.d, heads=heads, sizes=(grid.batch, grid.keys, grid.size))
    values = holders(sg, value, b=b, h=h, row=grid.kv, column=grid.w, heads=heads, sizes=(grid.batch, grid.keys, grid.value_size))
    queries = [x for x in queries if x.operand.heads == heads]
    for what, found in (("queries", queries), ("keys", keys), ("values", values)):
        if not found:
            raise Refusal(f"no tensor holds its {what} as [batch, heads, length, head size] with the lengths of the scores.", label(node))
    dtype = sg.dtype(output)
    if dtype == onnx.TensorProto.DOUBLE:
        raise Refusal("it computes in double; float16, bfloat16 and float are carried over.", label(node))
    # A product of widened halves is that of the halves: the kernel accumulates in float32 whatever the input type, and a mean of
    # values is no larger than they are.
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) if dtype == onnx.TensorProto.FLOAT else ()
    for kind in (*halves, dtype):
        alike = [[x for x in found if x.dtype == kind] for found in (queries, keys, values)]
        for k in alike[1]:
            v = next((x for x in alike[2] if x.operand.heads == k.operand.heads and x.factor == 1), None)
            if v is not None and alike[0]:
                return alike[0][0], k, v
    raise Refusal(
        "no tensors hold its queries, keys and values with one element type and equal numbers of key and value heads.",
        label(node),
    )
