"""Graphs with one or two seeded faults: never a traceback, and whatever is still rewritten is still equal."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes.errors import GraphError
from graph_passes.op import OP_TYPE
from graph_passes.pipeline import inspect, rewrite
from tests.graph_passes import builder, running
from tests.graph_passes.builder import Spelling

BASES = (
    Spelling(),
    Spelling(scale="both", transpose="3d", guard=True, mask_as="add_inf"),
    Spelling(mask_as="where", scale="div", transpose="bshd"),
    Spelling(past=False, mask_as="unless", cast=True),
    Spelling(product="3d", softcap="div"),
    Spelling(product="grouped", softcap="mul", mask_as="where"),
)
MUTANTS = int(os.environ.get("SA_MUTANTS", "120"))

TWINS = (
    ("And", "Or", "Xor"),
    ("LessOrEqual", "Less", "Greater", "GreaterOrEqual", "Equal"),
    ("Add", "Sub", "Mul", "Div", "Max", "Min"),
    ("Not", "Identity"),
    ("Sqrt", "Neg", "Identity", "Tanh"),
    ("Expand", "Reshape", "Tile"),
    ("Softmax", "LogSoftmax", "Identity"),
)


def mutate(model: onnx.ModelProto, generator: random.Random) -> str:
    """Puts one fault into a graph, in place, and says which."""
    graph = model.graph
    kind = generator.choice(["twin", "input", "swap", "bypass", "number", "attribute", "type", "drop", "dim", "output"])
    node = generator.choice(graph.node)
    if kind == "twin":
        group = next((g for g in TWINS if node.op_type in g), None)
        if group is not None:
            node.op_type = generator.choice(group)
    elif kind == "input" and node.input:
        names = [i.name for i in graph.input] + [t.name for t in graph.initializer] + [o for n in graph.node for o in n.output]
        node.input[generator.randrange(len(node.input))] = generator.choice([*names, "", "nowhere"])
    elif kind == "swap" and len(node.input) > 1:
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif kind == "bypass" and node.input:
        for other in graph.node:
            for k, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[k] = node.input[generator.randrange(len(node.input))]
    elif kind == "number":
        tensor = generator.choice(graph.initializer)
        array = numpy_helper.to_array(tensor).copy()
        if array.size:
            flat = array.reshape(-1)
            k = generator.randrange(flat.size)
            flat[k] = (not flat[k]) if flat.dtype == bool else flat[k] + generator.choice([-2, -1, 1, 2])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif kind == "attribute" and node.attribute:
        attribute = generator.choice(node.attribute)
        if attribute.ints:
            generator.shuffle(attribute.ints)
        else:
            attribute.i += generator.choice([-1, 1])
    elif kind == "type":
        value = generator.choice(list(graph.input))
        value.type.tensor_type.elem_type = generator.choice([TensorProto.FLOAT, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT16])
    elif kind == "drop":
        graph.node.remove(node)
    elif kind == "dim":
        value = generator.choice(list(graph.input))
        dim = generator.choice(list(value.type.tensor_type.shape.dim))
        if generator.random() < 0.5:
            dim.dim_param = generator.choice(["batch", "seq", "past", "other"])
        else:
            dim.dim_value = generator.choice([1, 2, 4, 16])
    elif kind == "output" and node.output:
        node.output[0] = generator.choice(["renamed", node.output[0]])
    return f"{kind} at {node.op_type} {node.name}"


def compare(path: Path, out: Path, what: str) -> bool:
    """Runs both where the original runs; returns whether it did.

    ONNX Runtime's optimiser is off: its transpose optimiser (1.31) breaks some mutants on its own.
    """
    mutant, new = onnx.load(path), onnx.load(out)
    node = next(n for n in new.graph.node if n.op_type == OP_TYPE)
    for model in (mutant, new):
        if node.output[0] not in [o.name for o in model.graph.output]:
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    if len(node.input) > 3:
        new.graph.output.append(helper.make_tensor_value_info(node.input[3], TensorProto.BOOL, [None, None]))
    onnx.save(new, out)
    onnx.save(mutant, path)
    try:
        original = running.Session(path, optimise=False)
    except Exception:
        return False
    sparse = running.Session(out, optimise=False)
    ran = False
    for batch, rows, past, pad in ((2, 20, 3, "left"), (3, 5, 17, "right"), (2, 18, 1, "none")):
        try:
            data = builder.feeds(mutant, batch, rows, past, pad=pad)
        except KeyError:
            data = {}
        try:
            expected = original(data)
        except Exception:
            continue
        try:
            got = sparse(data)
        except Exception as error:
            raise AssertionError(f"{what}: the original runs, the rewritten model does not: {error}") from error
        key = node.input[3] if len(node.input) > 3 else ""
        total = got[key].shape[1] if key else 0
        real = got[key][:, total - rows :] if key else np.ones((batch, rows), dtype=bool)
        a, b = (x[node.output[0]].swapaxes(1, 2) for x in (expected, got))
        if real.any():
            scale = max(1.0, float(np.abs(a[real]).max()))
            assert running.largest_difference(a, b, real) < 1e-5 * scale, what
            ran = True
    return ran


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutants(tmp_path: Path) -> None:
    generator = random.Random(int(os.environ.get("SA_MUTANTS_SEED", "0")))
    fates = {"refused file": 0, "declined": 0, "refused rewrite": 0, "equal": 0, "does not run": 0, "no candidate": 0}
    path, out = tmp_path / "mutant.onnx", tmp_path / "out.onnx"
    for _ in range(MUTANTS):
        model = builder.attention(generator.choice(BASES))
        what = "; ".join(mutate(model, generator) for _ in range(generator.randint(1, 2)))
        path.write_bytes(model.SerializeToString())
        try:
            report = inspect(path)
        except GraphError:
            fates["refused file"] += 1
            continue
        softmaxes = sum(n.op_type == "Softmax" for n in model.graph.node)
        assert len(report.sites) + len(report.declined) == softmaxes, what
        if not report.sites:
            fates["declined" if softmaxes else "no candidate"] += 1
            assert all(d.reason and d.stopped_by for d in report.declined), what
            continue
        try:
            rewrite(path, out, running.EXACT, force=True)
        except GraphError:
            fates["refused rewrite"] += 1
            continue
        fates["equal" if compare(path, out, what) else "does not run"] += 1
    assert fates["declined"] > MUTANTS // 4, fates
    assert fates["equal"] > MUTANTS // 20, fates
    print(fates)
