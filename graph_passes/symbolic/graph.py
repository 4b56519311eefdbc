"""A graph seen symbolically: the shape of each tensor as polynomials, and the value of each element as an expression.

The rules for operators live in `shapes` and `points`. Nothing is run and no weight is read: an element that no rule explains is
a `Load`, which is equal to itself and otherwise unknown. Standard operators of ONNX are taken at their specified meaning;
symbols of the same name in the declared shapes of graph inputs are the same length (ONNX, "Static tensor shapes").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.symbolic.equations import Equation, solve, substituted
from graph_passes.symbolic.logic import Atom, Value
from graph_passes.symbolic.poly import Dim, Load, Poly, Symbol, const, poly

__all__ = ["CORE_DOMAIN", "MALFORMED", "Contradiction", "Either", "Shape", "Stuck", "SymbolicGraph", "is_standard", "op_names"]

Shape = tuple[Poly, ...]

_LARGEST_CONSTANT = 64 * 2**20
"""Bytes of a constant that is still looked into (a causal buffer of 4096 x 4096 floats); a larger one stays unknown."""


_MOST_MERGES = 8
"""Rounds of finding equal lengths; two or three are usual."""

MALFORMED = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a node that breaks its operator's specification (a missing input, a wrong attribute) shows up as in the rules."""


CORE_DOMAIN = "sample_attention.core"
"""Domain of the node that stands for softmax(scale * Q K^T + masks) V while a graph is looked at; it is never written.

Inputs: query [B, Hq, S, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv], and masks that broadcast to [B, Hq, S, T], each bool
(true = seen) or of real type (added to the scores). Attributes: `scale`; `softcap` (0 = none), applied before the masks;
`offset` (row i sees the keys 0 .. i + offset; None: no such rule) as a polynomial; `pattern`, the name of the family in reports.
"""


class Stuck(Exception):
    """A value or an index that cannot be followed past a node; the message says why."""

    def __init__(self, node: gs.Node | None, why: str) -> None:
        super().__init__(why)
        self.node = node
        self.why = why


class Contradiction(Stuck):
    """The graph contradicts itself; nothing that it declares of the result is to be relied on."""


class Either(Stuck):
    """A length meets a longer one: a call does not fail only where one of several assumptions holds."""

    def __init__(self, node: gs.Node | None, why: str, cases: tuple[tuple[Dim, int], ...]) -> None:
        super().__init__(node, why)
        self.cases = cases


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
        expand: gives the nodes that stand in the place of a node, with their shapes recorded; the graph is changed accordingly.
        under: what is known of the same graph already, and lengths to assume (`assuming`).
    """

    def __init__(
        self,
        graph: gs.Graph,
        folder: Path | None = None,
        expand: Callable[[SymbolicGraph, gs.Node], list[gs.Node]] | None = None,
        *,
        under: tuple[SymbolicGraph, Mapping[Dim, Poly]] | None = None,
    ) -> None:
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
        self.left_whole: dict[int, Exception] = {}
        """Why `expand` could not take a node apart, by the id of the node."""
        self._signatures: dict[str, int] = {}
        self._shapes: dict[str, Shape | None] = {}
        self._dtypes: dict[str, int | None] = {}
        self._values: dict[tuple[str, tuple[Poly, ...]], Value] = {}
        self._arrays: dict[str, np.ndarray | None] = {}
        self.stated: dict[str, Shape] = {}
        """Shapes that the maker of a tensor knows better than inference."""
        self.equations: list[Equation] = []
        self.same_axes: list[tuple[gs.Tensor, int, gs.Tensor, int]] = []
        """Axes of tensors that an operator requires to be equally long."""
        self.taken_as_equal: frozenset[Dim] = frozenset()
        """Lengths of inputs that are taken to be equal to the length that they meet elementwise, unless 1 (`equations`)."""
        self.opaque: set[str] = set()
        """Tensors whose elements are not followed further: what they say is a condition of its own."""
        self.taken_as_flags: set[str] = set()
        """Inputs of integers that are taken to hold only 0 and 1."""
        self._same: dict[Dim, Poly] = {}
        self._assumes = under is not None
        if under is not None:
            known, lengths = under
            self._same = {**{s: substituted(p, dict(lengths)) for s, p in known._same.items()}, **lengths}
            self.stated = {name: tuple(substituted(n, self._same) for n in shape) for name, shape in known.stated.items()}
            self.taken_as_equal = known.taken_as_equal
            self.opaque = known.opaque
        for tensor in graph.inputs:
            self._declare(tensor, tensor.shape)
        nodes: list[gs.Node] = []
        for node in list(graph.nodes):
            stand_in = [node] if expand is None else expand(self, node)
            if stand_in == [node]:
                shapes.infer(self, node)
            nodes += stand_in
        graph.nodes[:] = [n for n in nodes if n.inputs or n.outputs]  # `expand` may have emptied some
        self._merge_equal_lengths()

    @cached_property
    def live(self) -> frozenset[int]:
        """Ids of the nodes that some output of the graph depends on."""
        live: set[int] = set()
        stack: list[gs.Tensor] = list(self.graph.outputs)
        while stack:
            for node in stack.pop().inputs:
                if id(node) not in live:
                    live.add(id(node))
                    stack += [*node.inputs, *_captured(node)]
        return frozenset(live)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read the values of a tensor, those left out that no output depends on."""
        return [n for n in tensor.outputs if n.op != "Shape" and id(n) in self.live]

    def _merge_equal_lengths(self) -> None:
        """Gives lengths that are equal one name, and infers everything again with it, until nothing new is found."""
        from graph_passes.symbolic import shapes

        by_rank: dict[bool, set[Symbol]] = {True: set(), False: set()}
        for tensor in self.graph.inputs:
            shape = self._shapes[tensor.name] or ()
            by_rank[len(shape) <= 2] |= {s for n in shape for s in n.symbols}
        own = by_rank[True] - by_rank[False]
        for _ in range(_MOST_MERGES):
            for a, i, b, j in self.same_axes:
                self.equal(self.known_shape(a)[i], self.known_shape(b)[j], certain=True)
            certain = [e for e in self.equations if e.certain]
            found, taken = solve(certain, _is_inferred)
            if not found:
                found, taken = solve(self.equations, lambda s: s in own or _is_inferred(s))
            if not found:
                return
            self._same = {**{s: substituted(p, found) for s, p in self._same.items()}, **found}
            self.taken_as_equal |= {s for s in taken if not _is_inferred(s)}
            self.stated = {name: tuple(substituted(n, found) for n in shape) for name, shape in self.stated.items()}
            for cache in (self._shapes, self._values, self.memory, self.origin, self._signatures, self.equations):
                cache.clear()
            for tensor in self.graph.inputs:
                self._declare(tensor, tensor.shape)
            for node in self.graph.nodes:
                shapes.infer(self, node)
                if isinstance(node.attrs.get("offset"), Poly) and not self._assumes:
                    node.attrs["offset"] = substituted(node.attrs["offset"], found)

    def assuming(self, length: Dim, value: int) -> SymbolicGraph:
        """The same graph where a length has a value."""
        key = ("assuming", length, value)
        if key not in self.memory:
            self.memory[key] = SymbolicGraph(self.graph, self.folder, under=(self, {length: const(value)}))
        return self.memory[key]

    def renamed(self, p: Poly) -> Poly:
        """A length with the one name of each length in it."""
        return substituted(p, self._same)

    def equal(self, left: Poly, right: Poly, *, certain: bool, repeats: bool = False) -> None:
        """Records that two lengths are equal (`certain`), or that one of them is 1 (see `Equation`)."""
        if left != right and (left.value is None or right.value is None):
            self.equations.append(Equation(left, right, certain, repeats))

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

    def partial_integers(self, tensor: gs.Tensor) -> tuple[Poly | None, ...] | None:
        """The elements of a 1-D integer tensor of fixed length, None for those that are no plain polynomials."""
        shape = self.shape(tensor)
        if shape is None or len(shape) != 1 or shape[0].value is None or shape[0].value > 64:
            return None
        found = (self._integer(tensor, k) for k in range(shape[0].value))
        return tuple(found)

    def _integer(self, tensor: gs.Tensor, k: int) -> Poly | None:
        try:
            found = self.value(tensor, (const(k),))
        except Stuck:
            return None
        if isinstance(found, Poly) and not any(isinstance(s, Load) for s in found.symbols):
            return found
        return None

    def constant_integers(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The elements of a tensor of constant integers, stored or computed, flattened."""
        array = self.array(tensor)
        if array is not None:
            return tuple(int(x) for x in array.reshape(-1)) if array.dtype.kind in "iu" else None
        try:
            found = (self.value(tensor, ()),) if self.shape(tensor) == () else self.integers(tensor)
        except Stuck:
            return None
        out = [x.value for x in found or () if isinstance(x, Poly)]
        whole = [x for x in out if x is not None]
        return tuple(whole) if found is not None and len(whole) == len(found) else None

    def set_shape(self, tensor: gs.Tensor, shape: Shape | None) -> None:
        """Records an inferred shape; a length that inference left open takes the declared number, if there is one."""
        declared = getattr(tensor, "shape", None)
        shape = self.stated.get(tensor.name, shape)
        if shape is None:
            self._declare(tensor, declared)
            return
        if declared is not None and len(declared) == len(shape):
            shape = tuple(
                self._declared_length(tensor, i, n) if _is_open(inferred, tensor) else inferred
                for i, (inferred, n) in enumerate(zip(shape, declared, strict=True))
            )
        self._shapes[tensor.name] = shape

    def forget_shape(self, tensor: gs.Tensor) -> None:
        """Leaves a shape unknown, whatever is declared."""
        self._shapes[tensor.name] = None

    def set_dtype(self, tensor: gs.Tensor, dtype: int | None) -> None:
        self._dtypes[tensor.name] = dtype if dtype is not None else element_type(tensor)

    def open_length(self, tensor: gs.Tensor, axis: int, *, repeated: bool = False) -> Poly:
        """A length of which nothing is known; `repeated`: but that it is not to be taken for one that it meets (it is one of two that
        met, or may be 1)."""
        return substituted(poly(Dim(f"{tensor.name}.{'broadcast' if repeated else 'shape'}[{axis}]")), self._same)

    def _declare(self, tensor: gs.Tensor, shape: list | None) -> None:
        self._shapes[tensor.name] = None if shape is None else tuple(self._declared_length(tensor, i, n) for i, n in enumerate(shape))

    def _declared_length(self, tensor: gs.Tensor, axis: int, declared: object) -> Poly:
        if isinstance(declared, (int, np.integer)) and declared >= 0:
            return const(int(declared))
        if isinstance(declared, str) and declared:
            terms = [t.strip() for t in declared.split("+")]
            if all(re.fullmatch(r"\w[\w.]*", t) for t in terms):
                named = sum((const(int(t)) if t.isdecimal() else poly(Dim(t)) for t in terms), start=const(0))
                return substituted(named, self._same)
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
    return any(isinstance(s, Dim) and s.name.startswith((f"{tensor.name}.shape[", f"{tensor.name}.broadcast[")) for s in length.symbols)


def _captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Tensors that the subgraphs of a node read, their own among them."""
    for value in node.attrs.values():
        for graph in value if isinstance(value, list) else [value]:
            if isinstance(graph, gs.Graph):
                yield from graph.outputs
                for inner in graph.nodes:
                    yield from inner.inputs
                    yield from _captured(inner)


def _is_inferred(length: Dim) -> bool:
    """Left open by inference, not named by the graph."""
    return ".shape[" in length.name


def _constant_node(node: gs.Node) -> np.ndarray | None:
    attrs = node.attrs
    if isinstance(attrs.get("value"), gs.Constant):
        return np.asarray(attrs["value"].values)
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if name in attrs:
            return np.asarray(attrs[name], dtype=dtype)
    return None
