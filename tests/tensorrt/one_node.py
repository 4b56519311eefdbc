"""A model of one SampleAttention node, and inputs for it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_passes import body, op


def one_node(
    policy: str = "tile",
    *,
    dtype: int = TensorProto.FLOAT,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 300,
    keys: int = 300,
    size: int = 32,
    value_size: int = 32,
    batch: int = 1,
    **settings: object,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """(model with its function body, feeds of random numbers); every length of the model is free but heads and sizes."""
    chosen = op.Policy(policy=policy, min_length=0, dense_rows=0, sink=0, **settings)  # type: ignore[arg-type]
    shapes = {"query": ["B", heads, "S", size], "key": ["B", kv_heads, "T", size], "value": ["B", kv_heads, "T", value_size]}
    node = helper.make_node(
        op.OP_TYPE, list(shapes), ["output"], name="site", domain=op.DOMAIN, **op.node_attributes(chosen, scale=size**-0.5)
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info("output", dtype, ["B", heads, "S", value_size])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    body.attach(model)
    rng = np.random.default_rng(1)
    lengths = {"B": batch, "S": queries, "T": keys}
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    return model, {n: rng.standard_normal([lengths.get(d, d) for d in s]).astype(kind) for n, s in shapes.items()}
