"""Softmax of opset 11 or 12 as the raising of opsets writes it, in two dimensions between a Flatten and a Reshape: one Softmax over
the last axis, where the Flatten keeps just that axis apart."""

from __future__ import annotations

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import is_standard, producer

__all__ = ["expand"]


def expand(m: Maker) -> None:
    """Takes Reshape(Softmax(Flatten(x, rank - 1)), Shape(x)) as Softmax(x)."""
    rows, lengths = m.needed(*m.inputs(2))
    softmax, shape = producer(rows), producer(lengths)
    if softmax is None or shape is None or softmax.op != "Softmax" or shape.op != "Shape" or shape.attrs or not is_standard(softmax):
        return
    flatten = producer(softmax.inputs[0])
    if flatten is None or flatten.op != "Flatten" or softmax.attrs.get("axis", -1) not in (-1, 1):
        return
    x = flatten.inputs[0]
    known = m.sg.shape(x)
    if shape.inputs[0] is not x or known is None or flatten.attrs.get("axis", 1) not in (-1, len(known) - 1):
        return
    parts = (flatten, softmax, shape)
    if all(len(p.outputs[0].outputs) == 1 and p.outputs[0].name not in m.sg.outputs for p in parts):
        m.absorbed += parts
    m.op("Softmax", x, axis=-1, into=m.output(0))
