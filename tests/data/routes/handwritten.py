"""Graphs as people write them without an exporter: the ONNX `Attention` operator in its forms, and masks from buffers.

Each is a language model of one layer with the usual inputs, so that the same checks run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from tests.data.families import ALIBI, FULL, VOCABULARY, WINDOW, WINDOWED
from tests.graph_passes.builder import Builder

__all__ = ["MODELS", "PACKAGES", "VARIANTS", "export"]

PACKAGES = ("onnx",)
VARIANTS = {"handwritten": None}

HEADS, KV_HEADS, SIZE, LONGEST = 4, 2, 16, 128


class _Layer:
    """The projections of one attention layer, queries, keys and values as [B, H, length, D] or [B, length, H * D]."""

    def __init__(self, opset: int, *, flat: bool = False, past: bool = False, mask: bool = False) -> None:
        self.b = b = Builder(opset)
        self._draw = np.random.default_rng(7)
        ids = b.input("input_ids", ["batch", "rows"], TensorProto.INT64)
        self.mask = b.input("attention_mask", ["batch", "total" if past else "rows"], TensorProto.INT64) if mask else ""
        hidden = b.op("Gather", self._weight(VOCABULARY, HEADS * SIZE, 2.0), ids)
        self.q, self.k, self.v = (self._project(hidden, heads, flat) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.past: list[str] = []
        if past:
            for what in ("key", "value"):
                self.past.append(b.input(f"past_key_values.0.{what}", ["batch", KV_HEADS, "past", SIZE]))
        self._flat = flat

    def _weight(self, rows: int, columns: int, gain: float = 1.0) -> str:
        level = self._draw.integers(0, 4, (rows, columns)) - 1.5
        return self.b.const(level * gain * 1.25 / rows**0.5, np.float32)

    def _project(self, hidden: str, heads: int, flat: bool) -> str:
        made = self.b.op("MatMul", hidden, self._weight(HEADS * SIZE, heads * SIZE))
        if flat:
            return made
        return self.b.op("Transpose", self.b.op("Reshape", made, self.b.const([0, 0, heads, SIZE])), perm=[0, 2, 1, 3])

    def join_past(self) -> None:
        """Puts the past in front of the keys and values; what comes out is the present."""
        self.k = self.b.op("Concat", self.past[0], self.k, axis=2, name="present.0.key")
        self.v = self.b.op("Concat", self.past[1], self.v, axis=2, name="present.0.value")

    def repeat(self, x: str) -> str:
        """Each key/value head once for each of its query heads."""
        b = self.b
        shape = b.op("Concat", b.dim(x, 0), b.const([KV_HEADS, HEADS // KV_HEADS]), b.dim(x, 2), b.const([SIZE]), axis=0)
        wide = b.op("Expand", b.op("Unsqueeze", x, b.const([2])), shape)
        return b.op("Reshape", wide, b.op("Concat", b.dim(x, 0), b.const([HEADS]), b.dim(x, 2), b.const([SIZE]), axis=0))

    def scores(self) -> str:
        product = self.b.op("MatMul", self.q, self.b.op("Transpose", self.repeat(self.k), perm=[0, 1, 3, 2]))
        return self.b.op("Mul", product, self.b.const(0.3, np.float32))

    def softmax(self, scores: str) -> str:
        return self.b.op("MatMul", self.b.op("Softmax", scores, axis=-1), self.repeat(self.v))

    def positions(self) -> tuple[str, str]:
        """Key positions [1, 1, 1, T] and query positions [1, 1, S, 1]; the queries stand at the end of the keys."""
        b, zero, one = self.b, self.b.const(0), self.b.const(1)
        keys, rows = b.scalar(self.k, 2), b.scalar(self.q, 2)
        kv = b.op("Range", zero, keys, one)
        q = b.op("Range", b.op("Sub", keys, rows), keys, one)
        return b.op("Unsqueeze", kv, b.const([0, 1, 2])), b.op("Unsqueeze", q, b.const([0, 1, 3]))

    def finish(self, attended: str) -> onnx.ModelProto:
        b = self.b
        if not self._flat:
            attended = b.op("Transpose", attended, perm=[0, 2, 1, 3])
        flat = b.op("Reshape", attended, b.const([0, 0, HEADS * SIZE]))
        b.op("MatMul", flat, self._weight(HEADS * SIZE, VOCABULARY), name="logits")
        b.output("logits", rank=3)
        for name in (o for n in b.nodes for o in n.output if o.startswith("present.")):
            b.output(name)
        return b.model()


def _attention(opset: int, *, flat: bool = False, **attributes: object) -> onnx.ModelProto:
    layer = _Layer(opset, flat=flat)
    heads = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS} if flat else {}
    return layer.finish(layer.b.op("Attention", layer.q, layer.k, layer.v, is_causal=1, **heads, **attributes))


def _attention_past() -> onnx.ModelProto:
    """The past goes into the operator, so its `is_causal` is counted from the end."""
    layer = _Layer(23, past=True)
    b = layer.b
    made = b.op("Attention", layer.q, layer.k, layer.v, "", *layer.past, outputs=3, is_causal=1)
    b.nodes[-1].output[1:] = ["present.0.key", "present.0.value"]
    return layer.finish(made)


def _attention_mask() -> onnx.ModelProto:
    layer = _Layer(23, past=True, mask=True)
    layer.join_past()
    b, (kv, q) = layer.b, layer.positions()
    real = b.op("Unsqueeze", b.op("Cast", layer.mask, to=TensorProto.BOOL), b.const([1, 2]))
    return layer.finish(b.op("Attention", layer.q, layer.k, layer.v, b.op("And", b.op("LessOrEqual", kv, q), real), scale=0.3))


def _attention_top_left() -> onnx.ModelProto:
    """With the past joined outside, `is_causal` counts from the start: row 0 sees key 0 alone, no row sees the last keys."""
    layer = _Layer(23, past=True)
    layer.join_past()
    return layer.finish(layer.b.op("Attention", layer.q, layer.k, layer.v, is_causal=1))


def _attention_window() -> onnx.ModelProto:
    layer = _Layer(23, past=True)
    layer.join_past()
    b, (kv, q) = layer.b, layer.positions()
    near = b.op("Greater", kv, b.op("Sub", q, b.const(WINDOW)))
    return layer.finish(b.op("Attention", layer.q, layer.k, layer.v, b.op("And", b.op("LessOrEqual", kv, q), near)))


def _buffer() -> onnx.ModelProto:
    """A lower-triangular buffer as long as the model's context, cut to the rows of the call."""
    layer = _Layer(18)
    b = layer.b
    buffer = b.const(np.tril(np.ones((1, 1, LONGEST, LONGEST))), np.float32)
    rows = b.dim(layer.q, 2)
    cut = b.op("Slice", b.op("Slice", buffer, b.const([0]), rows, b.const([2])), b.const([0]), rows, b.const([3]))
    hidden = b.op("Equal", cut, b.const(0, np.float32))
    return layer.finish(layer.softmax(b.op("Where", hidden, b.const(-np.inf, np.float32), layer.scores())))


def _trilu() -> onnx.ModelProto:
    layer = _Layer(18, mask=True)
    b = layer.b
    rows = b.dim(layer.q, 2)
    ones = b.op("Expand", b.const(np.ones((1, 1)), np.float32), b.op("Concat", rows, rows, axis=0))
    future = b.op("Mul", b.op("Trilu", ones, b.const(1), upper=1), b.const(-1e9, np.float32))
    padding = b.op("Sub", b.const(1, np.float32), b.op("Cast", layer.mask, to=TensorProto.FLOAT))
    padded = b.op("Unsqueeze", b.op("Mul", padding, b.const(-1e9, np.float32)), b.const([1, 2]))
    return layer.finish(layer.softmax(b.op("Add", b.op("Add", layer.scores(), future), padded)))


def _alibi() -> onnx.ModelProto:
    """Causal, and a penalty that grows with the distance: not full attention."""
    layer = _Layer(18)
    b, (kv, q) = layer.b, layer.positions()
    slopes = b.const((2.0 ** -np.arange(1, HEADS + 1)).reshape(1, HEADS, 1, 1), np.float32)
    distance = b.op("Mul", b.op("Cast", b.op("Sub", kv, q), to=TensorProto.FLOAT), slopes)
    hidden = b.op("Greater", kv, q)
    return layer.finish(layer.softmax(b.op("Where", hidden, b.const(-1e9, np.float32), b.op("Add", layer.scores(), distance))))


def _encoder() -> onnx.ModelProto:
    """Padding alone: every token sees every token."""
    layer = _Layer(18, mask=True)
    b = layer.b
    real = b.op("Unsqueeze", b.op("Cast", layer.mask, to=TensorProto.BOOL), b.const([1, 2]))
    return layer.finish(layer.softmax(b.op("Where", real, layer.scores(), b.const(-1e9, np.float32))))


def _chunked() -> onnx.ModelProto:
    """Causal within blocks of 8 keys."""
    layer = _Layer(18)
    b, (kv, q) = layer.b, layer.positions()
    together = b.op("Equal", b.op("Div", kv, b.const(WINDOW)), b.op("Div", q, b.const(WINDOW)))
    keep = b.op("And", b.op("LessOrEqual", kv, q), together)
    return layer.finish(layer.softmax(b.op("Where", keep, layer.scores(), b.const(-1e9, np.float32))))


def _prefix() -> onnx.ModelProto:
    """Every row sees the first 8 keys."""
    layer = _Layer(18)
    b, (kv, q) = layer.b, layer.positions()
    keep = b.op("Or", b.op("LessOrEqual", kv, q), b.op("Less", kv, b.const(WINDOW)))
    return layer.finish(layer.softmax(b.op("Where", keep, layer.scores(), b.const(-1e9, np.float32))))


def _past_and_square() -> onnx.ModelProto:
    """Zeros for the past and a triangle of -inf for the rows of the call, side by side."""
    layer = _Layer(18, past=True)
    b = layer.b
    rows, past = b.dim(layer.q, 2), b.dim(layer.past[0], 2)
    layer.join_past()
    square = b.op("Expand", b.const(-np.inf, np.float32), b.op("Concat", rows, rows, axis=0))
    zeros = b.op("Expand", b.const(0.0, np.float32), b.op("Concat", rows, past, axis=0))
    both = b.op("Concat", zeros, b.op("Trilu", square, b.const(1), upper=1), axis=1)
    return layer.finish(layer.softmax(b.op("Add", layer.scores(), both)))


def _einsum_groups() -> onnx.ModelProto:
    """Two Einsums with the query heads of a group as an axis, and the product divided by the sum of the exponentials."""
    layer = _Layer(18, mask=True)
    b = layer.b
    q = b.op("Reshape", layer.q, b.const([0, KV_HEADS, HEADS // KV_HEADS, -1, SIZE]))
    scores = b.op("Mul", b.op("Einsum", q, layer.k, equation="bkgsd,bktd->bkgst"), b.const(0.3, np.float32))
    kv, rows = layer.positions()
    real = b.op("Unsqueeze", b.op("Cast", layer.mask, to=TensorProto.BOOL), b.const([1, 2]))
    keep = b.op("Unsqueeze", b.op("And", b.op("LessOrEqual", kv, rows), real), b.const([1]))
    masked = b.op("Where", keep, scores, b.const(-1e9, np.float32))
    e = b.op("Exp", b.op("Sub", masked, b.op("ReduceMax", masked, b.const([-1]))))
    out = b.op("Div", b.op("MatMul", e, b.op("Unsqueeze", layer.v, b.const([2]))), b.op("ReduceSum", e, b.const([-1])))
    return layer.finish(b.op("Reshape", out, b.const([0, HEADS, -1, SIZE])))


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "attention-23-causal": (lambda: _attention(23), (FULL,)),
    "attention-23-3d": (lambda: _attention(23, flat=True, scale=0.3), (FULL,)),
    "attention-23-softcap": (lambda: _attention(23, softcap=5.0), (FULL,)),
    "attention-24-causal": (lambda: _attention(24), (FULL,)),
    "attention-23-past": (_attention_past, (FULL,)),
    "attention-23-mask": (_attention_mask, (FULL,)),
    "attention-23-top-left": (_attention_top_left, (FULL,)),
    "attention-23-window": (_attention_window, (WINDOWED,)),
    "buffer": (_buffer, (FULL,)),
    "trilu": (_trilu, (FULL,)),
    "alibi": (_alibi, (ALIBI,)),
    "encoder": (_encoder, ("not causal",)),
    "chunked": (_chunked, ("chunks",)),
    "prefix": (_prefix, ("not causal",)),
    "past-and-square": (_past_and_square, (FULL,)),
    "einsum-groups": (_einsum_groups, (FULL,)),
}
"""Name -> its maker and what its layers are (see `families.Family.layers`)."""


def export(variant: str, family: str, path: Path) -> None:
    """Writes one graph, its weights inside."""
    model = MODELS[family][0]()
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
