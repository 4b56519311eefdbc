"""Changes a graph in place, node by node, as other exporters and optimisers would have written it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Core", "Editor"]

_FARTHEST = 16
_T = TypeVar("_T")


class Core:
    """The nodes of one attention spelled with Softmax."""

    def __init__(self, product: onnx.NodeProto, softmax: onnx.NodeProto, output: onnx.NodeProto) -> None:
        self.product, self.softmax, self.output = product, softmax, output


class Editor:
    """A model, what its tensors are, and a seeded choice of places in it.

    Args:
        model: changed in place.
        generator: decides where.
    """

    def __init__(self, model: onnx.ModelProto, generator: random.Random) -> None:
        self.model, self.graph, self.random = model, model.graph, generator
        try:
            known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except Exception:  # it fails on operators that ONNX does not know in ways of its own
            known = model.graph
        self._types = {v.name: v.type.tensor_type for v in (*known.value_info, *known.input, *known.output)}
        self._dtypes = {name: t.elem_type for name, t in self._types.items()} | {t.name: t.data_type for t in self.graph.initializer}
        self._made = 0
        self._tag = generator.randrange(10**6)
        self.chosen: list[str] = []
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))

    def dtype(self, name: str) -> int:
        """The element type, 0 when it is not known."""
        return self._dtypes.get(name, 0)

    def shape(self, name: str) -> list[int | str] | None:
        """Lengths, an open one as its name; None when even their number is unknown."""
        array = self.array(name)
        if array is not None:
            return list(array.shape)
        if name not in self._types or not self._types[name].HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in self._types[name].shape.dim]

    def maker(self, name: str) -> onnx.NodeProto | None:
        return next((n for n in self.graph.node if name and name in n.output), None)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [n for n in self.graph.node if name in n.input]

    def array(self, name: str) -> np.ndarray | None:
        """The values of a constant."""
        stored = next((t for t in self.graph.initializer if t.name == name), None)
        if stored is None:
            node = self.maker(name)
            if node is None or node.op_type != "Constant" or not node.attribute[0].HasField("t"):
                return None
            stored = node.attribute[0].t
        return numpy_helper.to_array(stored)

    def number(self, name: str) -> float | None:
        """The value of a constant of one real number."""
        array = self.array(name)
        return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind == "f" else None

    def nodes(self, *op_types: str) -> list[onnx.NodeProto]:
        return [n for n in self.graph.node if n.op_type in op_types and n.domain == ""]

    def pick(self, *op_types: str) -> onnx.NodeProto | None:
        """A node of these operators, most often one near an attention."""
        found = self.nodes(*op_types)
        near = [n for n in found if n.output[0] in self._near()]
        chosen = near if near and self.random.random() < 0.8 else found
        return self.random.choice(chosen) if chosen else None

    def edge(self, dtype: int | None = None) -> tuple[onnx.NodeProto, int] | None:
        """A place where a node reads a computed tensor, most often near an attention."""
        made = {o for n in self.graph.node if n.op_type != "Constant" for o in n.output} | {i.name for i in self.graph.input}
        stored = {t.name for t in self.graph.initializer}
        near = self._near()
        edges = [
            (n, k)
            for n in self.graph.node
            for k, name in enumerate(n.input)
            if name in made - stored and self.dtype(name) and dtype in (None, self.dtype(name))
        ]
        close = [e for e in edges if e[0].output[0] in near]
        chosen = close if close and self.random.random() < 0.8 else edges
        return self.random.choice(chosen) if chosen else None

    def is_score(self, name: str) -> bool:
        """It lies between the product of queries and keys and the product with the values."""
        return any(name == core.product.output[0] or self._lies_between(core, name) for core in self.cores())

    def cores(self) -> list[Core]:
        """The attentions that are spelled with Softmax, in graph order."""
        found = []
        for softmax in self.nodes("Softmax"):
            product, output = self._back_to_product(softmax.input[0]), self._on_to_product(softmax.output[0])
            if product is not None and output is not None:
                found.append(Core(product, softmax, output))
        return found

    def choose(self, ways: Sequence[_T]) -> _T:
        """One of several ways, which is remembered for the message of a failing test."""
        way = self.random.choice(ways)
        self.chosen.append(str(way))
        return way

    def const(self, value: object, dtype: type | np.dtype = np.int64) -> str:
        tensor = numpy_helper.from_array(np.array(value, dtype=dtype), self._name("const"))
        self.graph.initializer.append(tensor)
        self._dtypes[tensor.name] = tensor.data_type
        return tensor.name

    def op(self, at: onnx.NodeProto, op_type: str, *inputs: str, dtype: int = 0, domain: str = "", **attrs: object) -> str:
        """The result of a new node in front of `at`, of the type of its first input unless said."""
        out = self._name(op_type.lower())
        node = helper.make_node(op_type, list(inputs), [out], name=self._name(op_type), domain=domain, **attrs)
        self.graph.node.insert(self._index(at), node)
        self._dtypes[out] = dtype or self.dtype(inputs[0])
        return out

    def replace(self, node: onnx.NodeProto, result: str) -> None:
        """What a node made is made by the maker of `result` instead, which nothing else reads."""
        maker = self.maker(result)
        assert maker is not None
        position = list(maker.output).index(result)
        name = node.output[0]
        self.graph.node.remove(node)
        maker.output[position] = name

    def put(self, node: onnx.NodeProto, k: int, result: str) -> None:
        node.input[k] = result

    def import_domain(self, domain: str) -> None:
        if domain not in {o.domain for o in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(domain, 1))

    def grid(self, at: onnx.NodeProto, scores: str) -> tuple[str, str]:
        """Positions of keys [T] and of rows [S, 1] of scores [..., S, T], the last row at the last key."""
        shape = self.op(at, "Shape", scores, dtype=TensorProto.INT64)
        rows, keys = (self.op(at, "Gather", shape, self.const(k), axis=0) for k in (-2, -1))
        zero, one = self.const(0), self.const(1)
        kv = self.op(at, "Range", zero, keys, one)
        q = self.op(at, "Add", self.op(at, "Range", zero, rows, one), self.op(at, "Sub", keys, rows))
        return kv, self.op(at, "Unsqueeze", q, self.const([1]))

    def shuffle(self) -> None:
        """Another topological order of the nodes."""
        waiting = list(self.graph.node)
        self.random.shuffle(waiting)
        made = {i.name for i in self.graph.input} | {t.name for t in self.graph.initializer} | {""}
        ordered: list[onnx.NodeProto] = []
        while waiting:
            ready = [n for n in waiting if made.issuperset(n.input)]
            assert ready
            for node in ready[: self.random.randint(1, 4)]:
                ordered.append(node)
                made.update(node.output)
                waiting.remove(node)
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def _index(self, node: onnx.NodeProto) -> int:
        return next(i for i, n in enumerate(self.graph.node) if n is node or n.output[:] == node.output[:])

    def _name(self, what: str) -> str:
        self._made += 1
        return f"edit.{self._tag}.{what}.{self._made}"

    def _near(self) -> set[str]:
        """What attention scores and masks are made from: tensors a few steps before a softmax, and just after one."""
        by_output = {o: n for n in self.graph.node for o in n.output}
        starts = [n for n in self.graph.node if n.op_type in ("Softmax", "Attention")]
        near = {r.output[0] for n in starts for r in self.readers(n.output[0])}
        edge: Sequence[onnx.NodeProto] = starts
        for _ in range(_FARTHEST):
            near |= {n.output[0] for n in edge}
            edge = [by_output[i] for n in edge for i in n.input if i in by_output and by_output[i].output[0] not in near]
        return near

    def _lies_between(self, core: Core, name: str) -> bool:
        seen, edge = set(), [core.output.input[0]]
        while edge:
            at = edge.pop()
            node = self.maker(at)
            if at == name:
                return True
            if node is not None and node is not core.product and at not in seen and len(seen) < 64:
                seen.add(at)
                edge += [i for i in node.input if node.op_type in ("Softmax", "Where") or self.leads_to_product(i)]
        return False

    def _back_to_product(self, name: str) -> onnx.NodeProto | None:
        for _ in range(_FARTHEST):
            node = self.maker(name)
            if node is None or node.op_type == "MatMul":
                return node
            name = next((i for i in node.input if self.leads_to_product(i)), "")
        return None

    def leads_to_product(self, name: str, depth: int = _FARTHEST) -> bool:
        """It is made from a product of two computed tensors, as scores are and masks are not."""
        node = self.maker(name)
        if node is None or not depth or node.op_type not in ("MatMul", "Mul", "Div", "Add", "Where", "Cast", "Tanh", "Reshape", "Identity"):
            return False
        if node.op_type == "MatMul":
            return self.array(node.input[1]) is None
        return any(self.leads_to_product(i, depth - 1) for i in node.input)

    def _on_to_product(self, name: str) -> onnx.NodeProto | None:
        for _ in range(_FARTHEST):
            readers = [n for n in self.readers(name) if n.op_type not in ("Shape", "IsNaN")]
            if len(readers) != 1:
                return None
            if readers[0].op_type == "MatMul":
                return readers[0] if readers[0].input[0] == name else None
            name = readers[0].output[0]
        return None
