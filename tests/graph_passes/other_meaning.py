"""Rewrites of one attention of a graph that look harmless and change what it means.

Each takes an `Editor` and an attention, and says whether it could be made. `OTHER` has them all by name, with the words of the reason
for which the attention must be declined; without words the operator can express the result, and a rewrite must be equal to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from tests.graph_passes.graph_editor import Core, Editor

__all__ = ["CONDITIONS", "OTHER", "NoPlace", "masked_operator"]

BOOL, FLOAT, INT64 = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64
LOW = float(np.finfo(np.float32).min)

Change = Callable[[Editor, Core], bool]
Condition = Callable[[Editor, onnx.NodeProto, str, str], str]
"""Makes a bool tensor of the positions of keys [T] and of rows [S, 1], in front of a node."""


class NoPlace(Exception):
    """The graph does not say what the change needs to know."""


def _per_head(e: Editor, scores: str) -> np.ndarray:
    """[1, H, 1, 1]: the number of each head."""
    shape = e.shape(scores)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise NoPlace
    return np.arange(shape[1]).reshape(1, shape[1], 1, 1)


def _seen(condition: Condition, fill: float = LOW) -> Change:
    """Scores are kept where a condition on positions of keys [T] and rows [S, 1] holds."""

    def change(e: Editor, core: Core) -> bool:
        node, x = core.softmax, core.softmax.input[0]
        seen = condition(e, node, *e.grid(node, x))
        if e.choose(["where", "unless", "add"]) == "add" and fill == LOW:
            added = e.op(node, "Where", seen, e.const(0.0, np.float32), e.const(LOW, np.float32), dtype=FLOAT)
            e.put(node, 0, e.op(node, "Add", x, added))
        elif e.chosen[-1] == "unless":
            e.put(node, 0, e.op(node, "Where", e.op(node, "Not", seen), e.const(fill, np.float32), x, dtype=FLOAT))
        else:
            e.put(node, 0, e.op(node, "Where", seen, x, e.const(fill, np.float32), dtype=FLOAT))
        return True

    return change


def _window(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    """Longer than every call of the test, and still no full attention."""
    width = e.const(200)
    if e.choose(["greater", "difference"]) == "greater":
        return e.op(node, "Greater", kv, e.op(node, "Sub", q, width), dtype=BOOL)
    return e.op(node, "Less", e.op(node, "Sub", q, kv), width, dtype=BOOL)


def _window_of_some_heads(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    first = e.const(_per_head(e, node.input[0]) == 0, bool)
    return e.op(node, "Or", first, _window(e, node, kv, q))


def _strictly_before(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    """Also where it is none: the first row would see no key."""
    before = e.op(node, "Less", kv, q, dtype=BOOL)
    return e.op(node, "Or", before, e.op(node, "Less", q, e.const(1), dtype=BOOL))


def _top_left(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    """Row i sees the keys 0 .. i, whatever the past."""
    first = e.op(node, "Slice", q, e.const([0]), e.const([1]), e.const([0]))
    return e.op(node, "LessOrEqual", kv, e.op(node, "Sub", q, first), dtype=BOOL)


def _chunks(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.op(node, "Equal", *(e.op(node, "Div", t, e.const(64)) for t in (kv, q)), dtype=BOOL)


def _strides(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    distance = e.op(node, "Max", e.op(node, "Sub", q, kv), e.const(0))
    return e.op(node, "Equal", e.op(node, "Mod", distance, e.const(2)), e.const(0), dtype=BOOL)


def _not_the_first_key(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    """But for the row that has no other."""
    return e.op(node, "Or", e.op(node, "Greater", kv, e.const(0), dtype=BOOL), e.op(node, "Less", q, e.const(1), dtype=BOOL))


def _upper_triangle(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.op(node, "GreaterOrEqual", kv, q, dtype=BOOL)


def _by_score(e: Editor, core: Core) -> bool:
    node, x = core.softmax, core.softmax.input[0]
    e.put(
        node,
        0,
        e.op(node, "Where", e.op(node, "Greater", x, e.const(-3.0, np.float32), dtype=BOOL), x, e.const(LOW, np.float32), dtype=FLOAT),
    )
    return True


def _prefix(e: Editor, core: Core) -> bool:
    """Every row sees the first keys."""
    adder = e.maker(core.softmax.input[0])
    chooser = e.maker(adder.input[1]) if adder is not None and adder.op_type == "Add" else None
    if adder is None or chooser is None or chooser.op_type != "Where":
        return False
    kv, _ = e.grid(adder, adder.input[0])
    seen = e.op(adder, "Or", chooser.input[0], e.op(adder, "Less", kv, e.const(4), dtype=BOOL))
    e.put(adder, 1, e.op(adder, "Where", seen, *chooser.input[1:], dtype=FLOAT))
    return True


def _scaled(factor: Callable[[Editor, onnx.NodeProto, str], str]) -> Change:
    def change(e: Editor, core: Core) -> bool:
        node = core.product
        (reader, *_) = e.readers(node.output[0])
        x = e.op(reader, "Mul", node.output[0], factor(e, reader, node.output[0]), dtype=FLOAT)
        e.put(reader, list(reader.input).index(node.output[0]), x)
        return e.dtype(node.output[0]) == FLOAT

    return change


def _of_the_data(e: Editor, node: onnx.NodeProto, x: str) -> str:
    return e.op(node, "Sigmoid", e.op(node, "ReduceMean", x, keepdims=0))


def _of_each_head(e: Editor, node: onnx.NodeProto, x: str) -> str:
    return e.const(1 + _per_head(e, x) / 10, np.float32)


def _of_each_row(e: Editor, node: onnx.NodeProto, x: str) -> str:
    """Longer contexts are cooled, as log-n scaling does."""
    _, q = e.grid(node, x)
    return e.op(node, "Log", e.op(node, "Cast", e.op(node, "Add", q, e.const(2)), to=FLOAT, dtype=FLOAT))


def _biased(bias: Callable[[Editor, onnx.NodeProto, str, str], str]) -> Change:
    def change(e: Editor, core: Core) -> bool:
        node, x = core.softmax, core.softmax.input[0]
        e.put(node, 0, e.op(node, "Add", x, bias(e, node, *e.grid(node, x))))
        return True

    return change


def _tiny(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.op(node, "Mul", e.op(node, "Cast", kv, to=FLOAT, dtype=FLOAT), e.const(1e-3, np.float32))


def _by_distance(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.op(node, "Mul", e.op(node, "Cast", e.op(node, "Sub", kv, q), to=FLOAT, dtype=FLOAT), e.const(0.01, np.float32))


def _half_hidden(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    """Early keys are lowered, not removed."""
    early = e.op(node, "Less", kv, e.const(4), dtype=BOOL)
    return e.op(node, "Where", early, e.const(-1.0, np.float32), e.const(0.0, np.float32), dtype=FLOAT)


def _over_rows(e: Editor, core: Core) -> bool:
    del core.softmax.attribute[:]
    core.softmax.attribute.append(onnx.helper.make_attribute("axis", -2))
    return True


def _after_softmax(factor: Callable[[Editor, onnx.NodeProto, str, str], str]) -> Change:
    def change(e: Editor, core: Core) -> bool:
        node = core.output
        p = node.input[0]
        e.put(node, 0, e.op(node, "Mul", p, factor(e, node, *e.grid(node, p))))
        return True

    return change


def _mask_of_probabilities(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.op(node, "Cast", e.op(node, "Less", e.op(node, "Sub", q, kv), e.const(6), dtype=BOOL), to=FLOAT, dtype=FLOAT)


def _nine_tenths(e: Editor, node: onnx.NodeProto, kv: str, q: str) -> str:
    return e.const(0.9, np.float32)


def _column_joined(e: Editor, core: Core) -> bool:
    """A sink, without a value."""
    node = core.softmax
    x = node.input[0]
    column = e.op(node, "ReduceMax", e.op(node, "Mul", x, e.const(0.0, np.float32)), e.const([-1]), keepdims=1)
    wide = e.op(node, "Concat", x, column, axis=-1)
    made = e.op(node, "Softmax", wide, axis=-1)
    e.replace(node, e.op(node, "Slice", made, e.const([0]), e.const([-1]), e.const([3])))
    return True


def _twice(e: Editor, core: Core) -> bool:
    e.put(core.softmax, 0, e.op(core.softmax, "Softmax", core.softmax.input[0], axis=-1))
    return True


def _capped(inner: float, outer: float, *, masked: bool = False) -> Change:
    """outer * tanh(score / inner), which is a soft-cap of `outer` of scores with another scale."""

    def change(e: Editor, core: Core) -> bool:
        node = core.softmax if masked else next(iter(e.readers(core.product.output[0])))
        x = node.input[0] if masked else core.product.output[0]
        capped = e.op(node, "Tanh", e.op(node, "Div", x, e.const(inner, np.float32)))
        e.put(node, list(node.input).index(x), e.op(node, "Mul", capped, e.const(outer, np.float32)))
        return not e.nodes("Tanh")[1:]  # the graph has no soft-cap of its own

    return change


def _keys_moved(which: int) -> Change:
    """Keys (or values) of the neighbouring token: another tensor, the same attention."""

    def change(e: Editor, core: Core) -> bool:
        node = core.output if which else core.product
        x, axis = node.input[1], 2 if which else 3
        rank = e.shape(x)
        if rank is None or len(rank) != 4:
            return False
        first = e.op(node, "Slice", x, e.const([0]), e.const([1]), e.const([axis]))
        rest = e.op(node, "Slice", x, e.const([1]), e.const([2**63 - 1]), e.const([axis]))
        e.put(node, 1, e.op(node, "Concat", rest, first, axis=axis))
        return True

    return change


def _heads_in_turn(e: Editor, core: Core) -> bool:
    """Head h reads head h mod n of the values instead of h div (heads / n)."""
    reshape = e.maker(core.output.input[1])
    expand = e.maker(reshape.input[0]) if reshape is not None and reshape.op_type == "Reshape" else None
    shape = e.shape(reshape.output[0]) if reshape is not None else None
    if expand is None or expand.op_type != "Expand" or shape is None or not isinstance(shape[1], int):
        return False
    order = np.arange(shape[1]).reshape(2, -1).T.reshape(-1)
    e.put(core.output, 1, e.op(core.output, "Gather", core.output.input[1], e.const(order), axis=1))
    return True


def _turned_padding(e: Editor, core: Core) -> bool:
    """The keys whose mask is 0 are real."""
    name = next((i.name for i in e.graph.input if i.name == "attention_mask"), "")
    readers = e.readers(name)
    if not readers or e.dtype(name) != INT64:
        return False
    turned = e.op(e.graph.node[0], "Sub", e.const(1), name, dtype=INT64)
    for reader in readers:
        if reader.op_type != "Shape":
            e.put(reader, list(reader.input).index(name), turned)
    return True


CONDITIONS: dict[str, tuple[Condition, str]] = {
    "window longer than any call": (_window, r"sliding window of 200 keys"),
    "without the own key": (_strictly_before, r"hides the last 1|condition that full causal attention does not have"),
    "top left": (_top_left, r"not the lower-right causal one|cannot be told whether"),
    "chunks": (_chunks, r"chunks or strides"),
    "strides": (_strides, r"chunks or strides|depends on the values of .*mod"),
    "without the first key": (_not_the_first_key, r"condition that full causal attention does not have"),
    "upper triangle": (_upper_triangle, r"sliding window of 1 keys|not causal"),
}
"""What a row sees less than full causal attention lets it, and why that must be declined."""


def masked_operator(e: Editor, node: onnx.NodeProto, condition: Condition) -> bool:
    """An ONNX Attention node sees fewer keys: its bool mask and a condition."""
    if node.op_type != "Attention" or len(node.input) < 4 or e.dtype(node.input[3]) != BOOL:
        return False
    e.put(node, 3, e.op(node, "And", node.input[3], condition(e, node, *e.grid(node, node.input[3]))))
    return True


_NO_NUMBER = r"neither one constant number nor part of a mask of 0 and 1"

OTHER: dict[str, tuple[Change, str]] = {
    **{name: (_seen(condition), reason) for name, (condition, reason) in CONDITIONS.items()},
    "window of all heads but one": (_seen(_window_of_some_heads), r"sliding window|depends on the values of .*const"),
    "lowered by 5": (_seen(_window, fill=-5.0), r"neither keeps a score|does not remove them"),
    "scores above a threshold": (_by_score, r"of which nothing is proved|is also read by Greater"),
    "prefix": (_prefix, r"not causal"),
    "scale of the data": (_scaled(_of_the_data), _NO_NUMBER + r"|is also read by ReduceMean"),
    "scale of each head": (_scaled(_of_each_head), _NO_NUMBER),
    "scale of each row": (_scaled(_of_each_row), _NO_NUMBER),
    "negative scale": (_scaled(lambda e, node, x: e.const(-1.0, np.float32)), r"a factor > 0 is needed"),
    "tiny bias": (_biased(_tiny), r"not a mask of 0 and -inf but a bias"),
    "bias by distance": (_biased(_by_distance), r"not a mask of 0 and -inf but a bias"),
    "half hidden": (_biased(_half_hidden), r"neither keeps a score"),
    "softmax over rows": (_over_rows, r"not over the keys"),
    "mask after softmax": (_after_softmax(_mask_of_probabilities), r"makes some of them 0 that the mask of its scores keeps"),
    "nine tenths of the probabilities": (_after_softmax(_nine_tenths), _NO_NUMBER),
    "sink": (_column_joined, r"attention sink"),
    "softmax twice": (_twice, r"Softmax"),
    "soft-cap of masked scores": (_capped(3.0, 3.0, masked=True), r"mask is applied before the soft-cap"),
    "soft-cap of two numbers": (_capped(3.0, 2.0), ""),
    "bare tanh": (_capped(1.0, 1.0), ""),
    "keys moved by one": (_keys_moved(0), ""),
    "values moved by one": (_keys_moved(1), ""),
    "heads in turn": (_heads_in_turn, ""),
    "padding turned": (_turned_padding, ""),
}
