"""A graph seen symbolically: the shape of each tensor as polynomials, and the value of each element as an expression.

The rules for operators live in `shapes` and `points`. Nothing is run and no weight is read: an element that no rule explains is
a `Load`, which is equal to itself and otherwise unknown. Standard operators of ONNX are taken at their specified meaning;
symbols of the same name in the declared shapes of graph inputs are the same length (ONNX, "Static tensor shapes").
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic.logic import Atom, Value
from graph_passes.symbolic.poly import Dim, Load, Poly, const, poly

__all__ = ["MALFORMED", "Shape", "Stuck", "SymbolicGraph", "is_standard", "op_names"]

Shape = tuple[Poly, ...]

_LARGEST_CONSTANT = 64 * 2**20
"""Bytes of a constant that is still looked into (a causal buffer of 4096 x 4096 floats); a larger one stays unknown."""


MALFORMED = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a node that breaks its operator's specification (a missing input, a wrong attribute) shows up as in the rules."""


class Stuck(Exception):
    """A value or an index that cannot be followed past a node; the message says why."""

    def __init__(self, node: gs.Node | None, why: str) -> None:
        super().__init__(why)
        self.node = node
        self.why = why


def op_names(names: str) -> frozenset[str]:
    """The names in a text, which is easier to read than a list of them."""
    return frozenset(names.split())


def is_standard(node: gs.Node) -> bool:
    return node.domain in (None, "", "ai.onnx")


class SymbolicGraph:
    """Shapes and element values of one graph.

    Args:
        graph: top-level graph, nodes in topological order.
        folder: folder that external data files are relative to; None when external constants must not be read.
    """

    def __init__(self, graph: gs.Graph, folder: Path | None = None) -> None:
        from graph_passes.symbolic import shapes

        self.graph = graph
        self.opset: int = graph.opset
        self.folder = folder
        self.tensors: dict[str, gs.Tensor] = graph.tensors()
        self.inputs = {t.name for t in graph.inputs}
        self.outputs = {t.name for t in graph.outputs}
        self.origin: dict[Atom, gs.Node] = {}
        """The node that made each comparison."""
        self.memory: dict[Hashable, Any] = {}
        """Results of costly questions that several layers ask alike."""
        self._signatures: dict[str, int] = {}
        self._shapes: dict[str, Shape | None] = {}
        self._dtypes: dict[str, int | None] = {}
        self._values: dict[tuple[str, tuple[Poly, ...]], Value] = {}
        self._arrays: dict[str, np.ndarray | None] = {}
        for tensor in graph.inputs:
            self._declare(tensor, tensor.shape)
        for node in graph.nodes:
            shapes.infer(self, node)

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """Lengths of the axes; None when even their number is unknown."""
        if tensor.name not in self._shapes:
            if isinstance(tensor, gs.Constant):
                self._shapes[tensor.name] = tuple(const(int(n)) for n in tensor.shape)
            else:
                self._declare(tensor, getattr(tensor, "shape", None))
        return self._shapes[tensor.name]

    def known_shape(self, tensor: gs.Tensor, node: gs.Node | None = None) -> Shape:
        """The shape, or `Stuck` when the number of axes is unknown."""
        found = self.shape(tensor)
        if found is None:
            raise Stuck(node or producer(tensor), f"the number of axes of {tensor.name} is not known")
        return found

    def dtype(self, tensor: gs.Tensor) -> int | None:
        """ONNX element type, or None when nothing says it."""
        if tensor.name not in self._dtypes:
            self._dtypes[tensor.name] = element_type(tensor)
        return self._dtypes[tensor.name]

    def value(self, tensor: gs.Tensor, index: Shape) -> Value:
        """The element of a tensor at an index."""
        from graph_passes.symbolic import points

        key = (tensor.name, index)
        if key not in self._values:
            self._values[key] = points.value(self, tensor, index)
        return self._values[key]

    def signature(self, tensor: gs.Tensor) -> int:
        """A number that two tensors share only when they are computed alike: by equal nodes from the same inputs, equal
        constants and equal shapes."""
        if tensor.name not in self._signatures:
            node = producer(tensor)
            array = self.array(tensor)
            key: tuple[Hashable, ...]
            if array is not None:
                key = ("constant", str(array.dtype), array.shape, array.tobytes())
            elif node is None:
                key = ("input", tensor.name)
            elif node.op in ("Shape", "Size") and is_standard(node):
                key = (node.op, self.shape(node.inputs[0]), _plain(node.attrs))
            else:
                made = next(i for i, t in enumerate(node.outputs) if t is tensor)
                key = (node.op, node.domain, _plain(node.attrs), made, *(self.signature(t) if t.name else -1 for t in node.inputs))
            self._signatures[tensor.name] = self.memory.setdefault(("signature", key), len(self._signatures))
        return self._signatures[tensor.name]

    def known_values(self) -> Iterator[tuple[tuple[str, Shape], Value]]:
        """The elements found so far, each after those that it is made from."""
        yield from self._values.items()

    def load(self, tensor: gs.Tensor, index: Shape) -> Poly:
        node = producer(tensor)
        return poly(Load(tensor.name, index, node.name if node is not None else ""))

    def array(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The values of a constant, or None for a variable, a large constant, or one that cannot be read."""
        if tensor.name not in self._arrays:
            self._arrays[tensor.name] = self._read(tensor)
        return self._arrays[tensor.name]

    def scalar(self, tensor: gs.Tensor) -> float | None:
        """The number that a tensor holds when it is one constant number (computed or stored), whatever its shape."""
        shape = self.shape(tensor)
        if shape is None or any(n.value != 1 for n in shape):
            return None
        try:
            found = self.value(tensor, (const(0),) * len(shape))
        except (Stuck, *MALFORMED):
            return None
        if isinstance(found, bool):
            return None
        if isinstance(found, Poly):
            return None if found.value is None else float(found.value)
        return found if isinstance(found, float) else None

    def integers(self, tensor: gs.Tensor) -> tuple[Poly, ...] | None:
        """The elements of a 1-D integer tensor, or None when they are not plain polynomials."""
        shape = self.shape(tensor)
        if shape is None or len(shape) != 1 or shape[0].value is None or shape[0].value > 64:
            return None
        out = []
        for k in range(shape[0].value):
            found = self.value(tensor, (const(k),))
            if not isinstance(found, Poly):
                return None
            out.append(found)
        return tuple(out)

    def constant_integers(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The elements of a constant tensor of integers, flattened."""
        array = self.array(tensor)
        if array is None or array.dtype.kind not in "iu":
            return None
        return tuple(int(x) for x in array.reshape(-1))

    def set_shape(self, tensor: gs.Tensor, shape: Shape | None) -> None:
        """Records an inferred shape; a length that inference left open takes the declared number, if there is one."""
        declared = getattr(tensor, "shape", None)
        if shape is None:
            self._declare(tensor, declared)
            return
        if declared is not None and len(declared) == len(shape):
            shape = tuple(
                self._declared_length(tensor, i, n) if _is_open(inferred, tensor) else inferred
                for i, (inferred, n) in enumerate(zip(shape, declared, strict=True))
            )
        self._shapes[tensor.name] = shape

    def set_dtype(self, tensor: gs.Tensor, dtype: int | None) -> None:
        self._dtypes[tensor.name] = dtype if dtype is not None else element_type(tensor)

    def open_length(self, tensor: gs.Tensor, axis: int) -> Poly:
        """A length of which nothing is known."""
        return poly(Dim(f"{tensor.name}.shape[{axis}]"))

    def _declare(self, tensor: gs.Tensor, shape: list | None) -> None:
        self._shapes[tensor.name] = None if shape is None else tuple(self._declared_length(tensor, i, n) for i, n in enumerate(shape))

    def _declared_length(self, tensor: gs.Tensor, axis: int, declared: object) -> Poly:
        if isinstance(declared, (int, np.integer)) and declared >= 0:
            return const(int(declared))
        if isinstance(declared, str) and declared:
            terms = [t.strip() for t in declared.split("+")]
            if all(re.fullmatch(r"\w[\w.]*", t) for t in terms):
                return sum((const(int(t)) if t.isdecimal() else poly(Dim(t)) for t in terms), start=const(0))
        return self.open_length(tensor, axis)

    def _read(self, tensor: gs.Tensor) -> np.ndarray | None:
        node = producer(tensor)
        if node is not None and node.op == "Constant" and is_standard(node):
            return _constant_node(node)
        if not isinstance(tensor, gs.Constant):
            return None
        stored = tensor._values
        if isinstance(stored, np.ndarray):
            return stored
        if stored.nbytes > _LARGEST_CONSTANT or not isinstance(getattr(stored, "tensor", None), onnx.TensorProto):
            return None
        try:
            return np.asarray(onnx.numpy_helper.to_array(stored.tensor, base_dir=str(self.folder or "")))
        except (OSError, ValueError, TypeError, onnx.checker.ValidationError):
            return None


def producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def inputs_of(node: gs.Node) -> Iterator[gs.Tensor | None]:
    """The inputs of a node, None for one that is left out."""
    return (t if t.name else None for t in node.inputs)


def element_type(tensor: gs.Tensor) -> int | None:
    """ONNX element type of a tensor as graphsurgeon keeps it (a NumPy type, or ONNX's own number for types NumPy lacks)."""
    if isinstance(tensor, gs.Constant) and isinstance(getattr(tensor._values, "tensor", None), onnx.TensorProto):
        return int(tensor._values.tensor.data_type)
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype or None
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _plain(attrs: dict[str, Any]) -> Hashable:
    """Attributes as a value that is equal for equal attributes; tensors count by their content, subgraphs by identity."""
    out: list[Hashable] = []
    for name, value in sorted(attrs.items()):
        if isinstance(value, gs.Constant):
            array = np.asarray(value.values)
            out.append((name, str(array.dtype), array.shape, array.tobytes()))
        else:
            out.append((name, id(value) if isinstance(value, gs.Graph) else repr(value)))
    return tuple(out)


def _is_open(length: Poly, tensor: gs.Tensor) -> bool:
    return any(isinstance(s, Dim) and s.name.startswith(f"{tensor.name}.shape[") for s in length.symbols)


def _constant_node(node: gs.Node) -> np.ndarray | None:
    attrs = node.attrs
    if isinstance(attrs.get("value"), gs.Constant):
        return np.asarray(attrs["value"].values)
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if name in attrs:
            return np.asarray(attrs[name], dtype=dtype)
    return None
