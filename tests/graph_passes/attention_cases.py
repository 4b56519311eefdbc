"""Attention problems with the structure of real ones, models of one `SampleAttention` node, and their runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graph_passes import op
from graph_passes.body import PROBE_OP_TYPE, PROBE_OUTPUTS, attach

OUTPUT_TYPES = {"output": (TensorProto.FLOAT, 4), "certificate": (TensorProto.FLOAT, 3), "block_mask": (TensorProto.BOOL, 4)}


@dataclass(frozen=True)
class Case:
    """One seeded problem. padding: `left`, `right`, `both`, `holes`, `nothing_real` (for one item), or empty for no mask."""

    s: int = 96
    t: int = 96
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    dv: int = 16
    padding: str = ""
    softcap: float = 0.0
    seed: int = 0
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(np.float32(self.d**-0.5))

    def tensors(self) -> dict[str, NDArray]:
        """query, key, value in float32: sinks, local context, slashes and needles over noise, so that selection is not near-uniform."""
        rng = np.random.default_rng(self.seed * 7919 + self.s * 31 + self.t)
        query = rng.normal(size=(self.batch, self.heads, self.s, self.d))
        key = rng.normal(size=(self.batch, self.kv_heads, self.t, self.d))
        value = rng.normal(size=(self.batch, self.kv_heads, self.t, self.dv))
        position = np.arange(self.t - self.s, self.t)
        topic = np.repeat(rng.normal(size=(self.t // 12 + 1, self.d)), 12, axis=0)[: self.t]
        key += topic
        query += 0.7 * topic[position]
        sink = rng.normal(size=self.d)
        key[:, :, :3] += 2.0 * sink
        query += 0.5 * sink
        group = self.heads // self.kv_heads
        for b in range(self.batch):
            for h in range(self.heads):
                for row in rng.integers(0, self.s, size=max(self.s // 16, 1)):
                    needle = rng.integers(0, position[row] + 1)
                    key[b, h // group, needle] += 1.5 * query[b, h, row]
                distance = rng.integers(1, max(self.t // 3, 2))
                rows = np.flatnonzero(position >= distance)
                query[b, h, rows] += 0.6 * key[b, h // group, position[rows] - distance]
        return {"query": query.astype(np.float32), "key": key.astype(np.float32), "value": value.astype(np.float32)}

    def key_mask(self) -> NDArray[np.bool_] | None:
        if not self.padding:
            return None
        keys, item = np.arange(self.t), np.arange(self.batch)[:, None]
        if self.padding == "left":
            return keys >= item * self.t // 3
        if self.padding == "right":
            return keys < self.t - item * self.t // 3
        if self.padding == "both":
            return (keys >= 3 + item * self.t // 5) & (keys < self.t - item * self.t // 7)
        if self.padding == "holes":
            return np.random.default_rng(self.seed).random((self.batch, self.t)) < 0.7
        assert self.padding == "nothing_real"
        return np.broadcast_to((item < self.batch - 1), (self.batch, self.t)).copy()

    def feeds(self) -> dict[str, NDArray]:
        mask = self.key_mask()
        return self.tensors() | ({} if mask is None else {"key_mask": mask})


def node_model(
    policy: op.Policy,
    case: Case,
    *,
    probe: bool = False,
    certificate: bool = False,
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of one node with its body attached; with a 16-bit `dtype` the node computes in it, and inputs and output are float32."""
    names = op.INPUTS[: 3 + bool(case.padding)]
    outputs = PROBE_OUTPUTS if probe else op.OUTPUTS[: 1 + certificate]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(4)]) for name in names[:3]]
    if case.padding:
        inputs.append(helper.make_tensor_value_info("key_mask", TensorProto.BOOL, ["B", "T"]))
    nodes = [helper.make_node("Cast", [name], [f"{name}_low"], to=dtype) for name in names[:3]]
    nodes.append(
        helper.make_node(
            PROBE_OP_TYPE if probe else op.OP_TYPE,
            [f"{name}_low" for name in names[:3]] + list(names[3:]),
            ["output_low", *outputs[1:]],
            domain=op.DOMAIN,
            name="attention",
            **op.node_attributes(policy, scale=case.scale, softcap=case.softcap),
        )
    )
    nodes.append(helper.make_node("Cast", ["output_low"], ["output"], to=TensorProto.FLOAT))
    results = []
    for name in outputs:
        onnx_type, rank = OUTPUT_TYPES.get(name, (TensorProto.FLOAT, 3))
        results.append(helper.make_tensor_value_info(name, onnx_type, [None] * rank))
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, results), opset_imports=opsets, ir_version=8)
    attach(model)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    session = _session(model.SerializeToString())
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@lru_cache(maxsize=64)
def _session(model: bytes) -> Any:
    """Loading takes longer than running a small case, and many cases differ in their shapes only."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
