"""Builds small attention graphs in the spellings that exporters use, and in ones that must be declined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HQ, HKV, D, DV = 4, 2, 16, 8
LOWEST = float(np.finfo(np.float32).min)


class Builder:
    """Collects nodes; each call of `op` returns the name of the result."""

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.domains: set[str] = set()

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int = TensorProto.FLOAT, rank: int = 4) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, [None] * rank))

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def op(self, op_type: str, *inputs: str, domain: str = "", outputs: int = 1, name: str | None = None, **attrs: object) -> str:
        index = len(self.nodes)
        made = [name or f"{op_type.lower()}_{index}"] + [f"{op_type.lower()}_{index}_{k}" for k in range(1, outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=f"{op_type}_{index}", domain=domain, **attrs))
        if domain:
            self.domains.add(domain)
        return made[0]

    def dim(self, tensor: str, axis: int) -> str:
        """A length as a tensor of one element."""
        return self.op("Shape", tensor, start=axis, end=axis + 1)

    def scalar(self, tensor: str, axis: int) -> str:
        """A length as a tensor without axes."""
        return self.op("Squeeze", self.dim(tensor, axis), self.const([0]))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@dataclass(frozen=True)
class Tensors:
    """What a mask may be built from."""

    q: str
    k: str
    mask: str
    past: str


MaskMaker = Callable[[Builder, Tensors], str]
"""Makes a bool tensor [B or 1, H or 1, S, T], true = allowed."""


def positions(b: Builder, t: Tensors) -> tuple[str, str]:
    """Key positions [1, 1, 1, T] and query positions [1, 1, S, 1], the past counted in."""
    zero, one = b.const(0), b.const(1)
    kv = b.op("Unsqueeze", b.op("Range", zero, b.scalar(t.k, 2), one), b.const([0, 1, 2]))
    rows = b.op("Add", b.op("Range", zero, b.scalar(t.q, 2), one), b.scalar(t.past, 2))
    return kv, b.op("Unsqueeze", rows, b.const([0, 1, 3]))


def causal(b: Builder, t: Tensors) -> str:
    kv, q = positions(b, t)
    return b.op("LessOrEqual", kv, q)


def padding(b: Builder, t: Tensors) -> str:
    """[B, 1, 1, T] from the attention mask."""
    return b.op("Unsqueeze", b.op("Cast", t.mask, to=TensorProto.BOOL), b.const([1, 2]))


def causal_padding(b: Builder, t: Tensors) -> str:
    return b.op("And", causal(b, t), padding(b, t))


@dataclass(frozen=True)
class Spelling:
    """How one attention is written.

    Attributes:
        mask: makes the bool mask; None leaves the mask out.
        mask_as: `add` (0 / lowest float), `add_inf`, `where`, `unless`, `mul_not` (Cast(Not(m)) * lowest), or `shift` (m - 1) * 1e9.
        scale: where the factor 0.25 stands: `q`, `k`, `both` (square roots), `after`, `div`, `after_mask`, `computed` (from the
            shape), or `none`.
        transpose: `perm`, `3d` (through three axes), or `bshd` (straight from [B, T, H, D]).
        repeat: `expand` (Unsqueeze, Expand, Reshape), `concat` (no repetition: as many key/value heads as query heads), or
            `multiply` (one head, broadcast).
        guard, cast: NaN guard; float32 softmax between casts.
        dtype: float type of queries, keys and values.
        past: the keys and values of earlier calls are inputs, joined in front.
        static: all lengths are numbers: batch 2, 8 rows, past 3.
        product: how the two products are written: `4d`, `3d` (batch and heads in one axis), `grouped` (query heads of a group in an
            axis of their own), `einsum`, or `fused` (FusedMatMul of ONNX Runtime).
        softcap: `div` (Div, Tanh, Mul), `mul` (Mul, Tanh, Mul), or empty.
        parts: softmax as Exp, ReduceSum and Div.
    """

    mask: MaskMaker | None = causal_padding
    mask_as: str = "add"
    scale: str = "after"
    transpose: str = "perm"
    repeat: str = "expand"
    guard: bool = False
    cast: bool = False
    dtype: int = TensorProto.FLOAT
    past: bool = True
    opset: int = 20
    static: bool = False
    product: str = "4d"
    softcap: str = ""
    parts: bool = False


CAP = 1.5
"""The soft-cap of `Spelling.softcap`; small enough to bend the scores of random inputs."""


def attention(s: Spelling = Spelling(), *, change: Callable[[Builder, str, str], str] | None = None) -> onnx.ModelProto:
    """A graph of one attention.

    Args:
        change: called with the builder, a place (`scores`, `masked`, `probabilities`, `result`) and a tensor; returns the
            tensor to go on with.
    """
    b = Builder(s.opset)
    real = helper.tensor_dtype_to_np_dtype(s.dtype)
    kv_heads = {"expand": HKV, "concat": HQ, "multiply": 1}[s.repeat]
    batch, rows, past = ("batch", "seq", "past") if not s.static else (2, 8, 3)
    total = 11 if s.static else "past + seq"
    if not s.past:
        total, past = rows, 0
    q = b.input("query", [batch, HQ, rows, D], s.dtype)
    mask = b.input("attention_mask", [batch, total], TensorProto.INT64)
    heads_first = s.transpose != "bshd"
    k, v = (
        b.input(n, [batch, kv_heads, rows, w] if heads_first else [batch, rows, kv_heads, w], s.dtype)
        for n, w in (("key", D), ("value", DV))
    )
    past_k = k
    if s.past:
        pk, pv = (
            b.input(n, [batch, kv_heads, past, w] if heads_first else [batch, past, kv_heads, w], s.dtype)
            for n, w in (("past_key", D), ("past_value", DV))
        )
        axis = 2 if heads_first else 1
        k, v = b.op("Concat", pk, k, axis=axis, name="present_key"), b.op("Concat", pv, v, axis=axis, name="present_value")
        b.output(k, s.dtype), b.output(v, s.dtype)
        past_k = pk
    if not heads_first:
        v_heads = b.op("Transpose", v, perm=[0, 2, 1, 3])
        k_heads = b.op("Transpose", k, perm=[0, 2, 1, 3])
        past_heads = b.op("Transpose", past_k, perm=[0, 2, 1, 3])
    else:
        v_heads, k_heads, past_heads = v, k, past_k
    if not s.past:
        empty = b.op("Slice", k_heads, b.const([0]), b.const([0]), b.const([2]))
        past_heads = empty
    t = Tensors(q, k_heads, mask, past_heads)
    root = 0.25**0.5
    factor = b.const(0.25, real)
    if s.scale in ("q", "both"):
        q = b.op("Mul", q, b.const(root if s.scale == "both" else 0.25, real))
    kt = _transposed(b, s, k, k_heads, kv_heads) if s.product == "4d" else ""
    if s.scale in ("k", "both"):
        kt = b.op("Mul", b.const(root if s.scale == "both" else 0.25, real), kt)
    scores = b.op("MatMul", q, kt) if s.product == "4d" else _product(b, s, q, k_heads)
    if s.scale == "after":
        scores = b.op("Mul", scores, factor)
    elif s.scale == "div":
        scores = b.op("Div", scores, b.const(4.0, real))
    elif s.scale == "computed":
        width = b.op("Cast", b.dim("query", 3), to=s.dtype)
        scores = b.op("Mul", scores, b.op("Div", b.const(1.0, real), b.op("Sqrt", width)))
    if s.softcap:
        inner = b.op("Div", scores, b.const(CAP, real)) if s.softcap == "div" else b.op("Mul", scores, b.const(1 / CAP, real))
        scores = b.op("Mul", b.op("Tanh", inner), b.const(CAP, real))
    scores = change(b, "scores", scores) if change else scores
    if s.mask is not None:
        scores = _masked(b, s, scores, s.mask(b, t), real)
    if s.scale == "after_mask":
        scores = b.op("Div", scores, b.const(4.0, real))
    scores = change(b, "masked", scores) if change else scores
    if s.cast:
        scores = b.op("Cast", scores, to=TensorProto.FLOAT)
    p = _softmax_in_parts(b, scores) if s.parts else b.op("Softmax", scores, axis=-1)
    if s.cast:
        p = b.op("Cast", p, to=s.dtype)
    if s.guard:
        p = b.op("Where", b.op("IsNaN", p), b.const(0.0, real), p)
    p = change(b, "probabilities", p) if change else p
    v_all = _repeated(b, s, v_heads, DV) if s.repeat == "expand" and s.product != "grouped" else v_heads
    out = b.op("MatMul", p, v_all) if s.product == "4d" else _with_values(b, s, p, v_all)
    out = change(b, "result", out) if change else out
    result = b.op("Transpose", out, perm=[0, 2, 1, 3], name="result")
    b.output(result, s.dtype)
    return b.model()


def _product(b: Builder, s: Spelling, q: str, k: str) -> str:
    """The scores [B, Hq, S, T] by another product than that of four axes."""
    if s.product == "grouped":
        five = b.op("Reshape", q, b.const([0, HKV, HQ // HKV, -1, D]))
        keys = b.op("Unsqueeze", b.op("Transpose", k, perm=[0, 1, 3, 2]), b.const([2]))
        scores = b.op("MatMul", five, keys)
        shape = b.op("Concat", b.const([0, HQ]), b.dim(scores, 3), b.dim(scores, 4), axis=0)
        return b.op("Reshape", scores, shape)
    k = _repeated(b, s, k, D)
    if s.product == "einsum":
        return b.op("Einsum", q, k, equation="bhid,bhjd->bhij")
    if s.product == "fused":
        return b.op("FusedMatMul", q, k, domain="com.microsoft", transB=1, alpha=1.0)
    rows, keys, batch = b.dim(q, 2), b.dim(k, 2), b.dim(q, 0)
    q3 = b.op("Reshape", q, b.op("Concat", b.const([-1]), rows, b.const([D]), axis=0))
    k3 = b.op("Reshape", k, b.op("Concat", b.const([-1]), keys, b.const([D]), axis=0))
    scores = b.op("MatMul", q3, b.op("Transpose", k3, perm=[0, 2, 1]))
    return b.op("Reshape", scores, b.op("Concat", batch, b.const([HQ]), rows, keys, axis=0))


def _with_values(b: Builder, s: Spelling, p: str, v: str) -> str:
    """The product of probabilities and values, [B, Hq, S, Dv], in the same spelling."""
    if s.product == "grouped":
        shape = b.op("Concat", b.const([0, HKV, HQ // HKV]), b.dim(p, 2), b.dim(p, 3), axis=0)
        five = b.op("MatMul", b.op("Reshape", p, shape), b.op("Unsqueeze", v, b.const([2])))
        return b.op("Reshape", five, b.const([0, HQ, -1, DV]))
    if s.product == "einsum":
        return b.op("Einsum", p, v, equation="bhij,bhjd->bhid")
    if s.product == "fused":
        return b.op("FusedMatMul", p, v, domain="com.microsoft")
    rows, keys, batch = b.dim(p, 2), b.dim(p, 3), b.dim(p, 0)
    p3 = b.op("Reshape", p, b.op("Concat", b.const([-1]), rows, keys, axis=0))
    v3 = b.op("Reshape", v, b.op("Concat", b.const([-1]), keys, b.const([DV]), axis=0))
    out = b.op("MatMul", p3, v3)
    return b.op("Reshape", out, b.op("Concat", batch, b.const([HQ]), rows, b.const([DV]), axis=0))


def _softmax_in_parts(b: Builder, x: str) -> str:
    e = b.op("Exp", b.op("Sub", x, b.op("ReduceMax", x, b.const([-1]))))
    return b.op("Div", e, b.op("ReduceSum", e, b.const([-1])))


def _repeated(b: Builder, s: Spelling, x: str, width: int) -> str:
    """[B, Hkv, T, W] to [B, Hq, T, W] as dynamo writes it, with computed shapes."""
    batch, length = b.dim(x, 0), b.dim(x, 2)
    five = b.op("Concat", batch, b.const([HKV]), b.const([HQ // HKV]), length, b.const([width]), axis=0)
    four = b.op("Concat", batch, b.const([HQ]), length, b.const([width]), axis=0)
    return b.op("Reshape", b.op("Expand", b.op("Unsqueeze", x, b.const([2])), five), four)


def _transposed(b: Builder, s: Spelling, k: str, k_heads: str, kv_heads: int) -> str:
    if s.transpose == "bshd" and s.repeat != "expand":
        return b.op("Transpose", k, perm=[0, 2, 3, 1])
    x = _repeated(b, s, k_heads, D) if s.repeat == "expand" else k_heads
    if s.transpose != "3d":
        return b.op("Transpose", x, perm=[0, 1, 3, 2])
    shape = b.op("Shape", x)
    last, before, front = (b.op("Slice", shape, b.const([i]), b.const([j])) for i, j in ((-1, 2**63 - 1), (-2, -1), (-(2**63), -2)))
    three = b.op("Reshape", x, b.op("Concat", b.const([-1]), before, last, axis=0))
    return b.op("Reshape", b.op("Transpose", three, perm=[0, 2, 1]), b.op("Concat", front, last, before, axis=0))


def _masked(b: Builder, s: Spelling, scores: str, mask: str, real: np.dtype) -> str:
    lowest = float(ml_dtypes.finfo(real).min)
    zero, low, inf = b.const(0.0, real), b.const(lowest, real), b.const(-np.inf, real)
    if s.mask_as in ("add", "add_inf"):
        return b.op("Add", scores, b.op("Where", mask, zero, low if s.mask_as == "add" else inf))
    if s.mask_as == "where":
        return b.op("Where", mask, scores, low)
    if s.mask_as == "unless":
        return b.op("Where", b.op("Not", mask), inf, scores)
    if s.mask_as == "mul_not":
        return b.op("Add", b.op("Mul", b.op("Cast", b.op("Not", mask), to=s.dtype), low), scores)
    assert s.mask_as == "shift"
    ones = b.op("Cast", mask, to=s.dtype)
    return b.op("Add", scores, b.op("Mul", b.op("Sub", ones, b.const(1.0, real)), b.const(1e9, real)))


def feeds(model: onnx.ModelProto, batch: int, rows: int, past: int, *, pad: str = "none", seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the given lengths; `pad` is `none`, `left` or `right`."""
    generator = np.random.default_rng(seed)
    lengths = {"batch": batch, "seq": rows, "past": past, "past + seq": past + rows}
    out: dict[str, np.ndarray] = {}
    for i in model.graph.input:
        shape = [d.dim_value if d.HasField("dim_value") else lengths[d.dim_param] for d in i.type.tensor_type.shape.dim]
        if i.name == "attention_mask":
            out[i.name] = padding_mask(batch, past + rows, pad)
        elif i.name == "position_ids":
            out[i.name] = np.tile(np.arange(past, past + rows), (batch, 1))
        else:
            dtype = helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
            out[i.name] = generator.standard_normal(shape).astype(dtype)
    return out


def padding_mask(batch: int, total: int, pad: str) -> np.ndarray:
    """[batch, total] of 0 and 1; item i has i * total // (2 * batch) padded tokens."""
    mask = np.ones((batch, total), dtype=np.int64)
    for i in range(batch):
        n = i * total // (2 * batch)
        if n and pad == "left":
            mask[i, :n] = 0
        elif n and pad == "right":
            mask[i, -n:] = 0
    return mask
