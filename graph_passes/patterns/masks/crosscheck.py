"""Evaluates a mask on small inputs and compares it with what was proved of it.

The proof covers every length; this guards the proof against a mistake in itself. The nodes that make the mask are cut out of
the graph (at Shape nodes, whose results are computed), and run by ONNX's reference evaluator for several batch sizes, row
counts and past lengths. One probe has more keys than any integer in those nodes, so that a window or chunk of that size would
show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.masks.prove import MASKED, MaskTerm
from graph_passes.site import KeyMask, Mask, Refusal, label
from graph_passes.symbolic.graph import Stuck, SymbolicGraph, is_standard, producer
from graph_passes.symbolic.poly import Clamped, Dim, Poly, Symbol, const

__all__ = ["crosscheck"]

_LONGEST_ROW = 2**18
"""Keys in the widest probe when rows are few; a larger integer in a mask is judged by the proof alone."""
_LONGEST_SQUARE = 4100
"""The same for graphs without a past, whose masks are square: 4096 is the commonest window."""
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Probe:
    """Numbers for one evaluation."""

    batch: int
    rows: int
    past: int


def crosscheck(sg: SymbolicGraph, terms: list[MaskTerm], mask: Mask, grid: Grid) -> tuple[str, ...]:
    """Evaluates the terms and compares them with `mask`.

    Returns:
        A sentence that says what was evaluated.

    Raises:
        Refusal: the evaluation disagrees with the proof, or cannot be made.
    """
    if not terms:
        return ()
    question = (
        "mask evaluated",
        tuple(
            (t.how, t.after, t.factor, t.offset, t.at, t.lengths, *(sg.signature(x) for x in (t.mask, t.fill) if x is not None))
            for t in terms
        ),
        mask,
        grid.batch,
        grid.rows,
        grid.keys,
    )
    if question not in sg.memory:
        sg.memory[question] = _evaluate(sg, terms, mask, grid)
    return sg.memory[question]


def _evaluate(sg: SymbolicGraph, terms: list[MaskTerm], mask: Mask, grid: Grid) -> tuple[str, ...]:
    cut = _Cut(sg, terms, mask)
    seen: list[str] = []
    generator = np.random.default_rng(0)
    for probe in _probes(grid, cut.largest_integer(), cut.longest()):
        lengths = _lengths(grid, probe, cut.dims())
        b, s, t = (_number(p, lengths) for p in (grid.batch, grid.rows, grid.keys))
        if f"{b}x{s}x{t}" in seen:
            continue
        for pattern in ("left", "right", "random"):
            values = cut.run(lengths, partial(_padding, generator, pattern, mask.keys))
            _compare(terms, mask, values, (b, s, t), lengths)
            if mask.keys is None:
                break
        seen.append(f"{b}x{s}x{t}")
    return (f"mask evaluated for batch x rows x keys = {', '.join(seen)}: as proved.",)


class _Cut:
    """The nodes that the mask terms depend on."""

    def __init__(self, sg: SymbolicGraph, terms: list[MaskTerm], mask: Mask) -> None:
        self.sg = sg
        self.key_tensor = mask.keys.tensor if mask.keys is not None else ""
        wanted = [t for term in terms for t in (term.mask, term.fill) if t is not None]
        if self.key_tensor:
            wanted.append(sg.tensors[self.key_tensor])
        self.outputs = list({t.name: t for t in wanted}.values())
        self.nodes: list[gs.Node] = []
        self.inputs: dict[str, gs.Tensor] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.measured: dict[str, gs.Node] = {}
        order = {id(n): i for i, n in enumerate(sg.graph.nodes)}
        self._collect()
        self.nodes.sort(key=lambda n: order[id(n)])

    def _collect(self) -> None:
        stack, done = list(self.outputs), set()
        while stack:
            tensor = stack.pop()
            if not tensor.name or tensor.name in done:
                continue
            done.add(tensor.name)
            node = producer(tensor)
            if tensor.name in self.sg.inputs:
                self.inputs[tensor.name] = tensor
            elif node is None or node.op == "Constant":
                array = self.sg.array(tensor)
                if array is None:
                    raise Refusal(f"its mask reads {tensor.name}, which is too large or cannot be read.", label(node))
                self.constants[tensor.name] = array
            elif node.op in ("Shape", "Size") and is_standard(node):
                self.measured[tensor.name] = node
            elif not is_standard(node) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
                raise Refusal(f"its mask comes from {node.op}, which cannot be evaluated apart.", label(node))
            else:
                if all(node is not n for n in self.nodes):
                    self.nodes.append(node)
                stack += list(node.inputs)

    def dims(self) -> set[Dim]:
        """The open lengths of the inputs and of what is measured."""
        shapes = [self.sg.shape(t) for t in self.inputs.values()] + [self.sg.shape(n.inputs[0]) for n in self.measured.values()]
        return {s for shape in shapes for n in shape or () for s in n.symbols if isinstance(s, Dim)}

    def largest_integer(self) -> int:
        """The largest integer constant among the nodes, apart from the ones that mean "to the end"."""
        found = [
            int(x) for a in self.constants.values() if a.dtype.kind in "iu" and a.size <= 64 for x in np.abs(a.reshape(-1).astype(object))
        ]
        return max((x for x in found if x < _INT_MAX), default=0)

    def longest(self) -> int:
        """The most rows that the buffers hold from which the mask is cut."""
        shapes = [self.sg.shape(t) for n in self.nodes for t in n.outputs]
        bounds = [s.bound for shape in shapes for n in shape or () for s in n.symbols if isinstance(s, Clamped)]
        return min(bounds, default=_LONGEST_SQUARE)

    def run(self, lengths: dict[Dim, int], make: Callable[[list[int], bool], np.ndarray]) -> dict[str, np.ndarray]:
        """The values of the terms' tensors and of the key mask's source."""
        from onnx.reference import ReferenceEvaluator

        constants = dict(self.constants)
        for name, node in self.measured.items():
            constants[name] = self._measure(node, lengths)
        feeds: dict[str, np.ndarray] = {}
        for name, tensor in self.inputs.items():
            shape = [_number(n, lengths) for n in self.sg.known_shape(tensor)]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self.sg.dtype(tensor) or onnx.TensorProto.INT64)
            feeds[name] = make(shape, name == self.key_tensor).astype(dtype)
        computed = [t.name for t in self.outputs if t.name not in feeds and t.name not in constants]
        values = {**feeds, **constants}
        if computed:
            try:
                model = self._model(computed, constants)
                with np.errstate(all="ignore"):
                    results = ReferenceEvaluator(model).run(computed, feeds)
            except Exception as error:  # whatever an operator of the evaluator stumbles over
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                raise Refusal(f"its mask was proved but cannot be evaluated ({what}).") from None
            values.update(zip(computed, results, strict=True))
        return {t.name: np.asarray(values[t.name]) for t in self.outputs}

    def _measure(self, node: gs.Node, lengths: dict[Dim, int]) -> np.ndarray:
        from graph_passes.symbolic.arguments import shape_window

        try:
            numbers = [_number(n, lengths) for n in self.sg.known_shape(node.inputs[0], node)]
        except Stuck as stuck:
            raise Refusal(f"its mask cannot be evaluated: {stuck.why}.", label(node)) from None
        if node.op == "Size":
            return np.array(int(np.prod(numbers)), dtype=np.int64)
        return np.array(numbers[shape_window(node)], dtype=np.int64)

    def _model(self, computed: list[str], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
        from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

        graph = onnx.helper.make_graph(
            [OnnxExporter.export_node(n) for n in self.nodes],
            "mask",
            [onnx.helper.make_tensor_value_info(n, self.sg.dtype(t) or onnx.TensorProto.INT64, None) for n, t in self.inputs.items()],
            [onnx.helper.make_empty_tensor_value_info(n) for n in computed],
            [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.sg.opset)])


def _probes(grid: Grid, largest: int, longest: int) -> Iterator[Probe]:
    has_past = any(isinstance(s, Dim) for s in (grid.keys - grid.rows).symbols)
    yield Probe(2, 5, 4)
    yield Probe(3, 7, 0)
    if has_past:
        yield Probe(1, 3, min(largest + 2, _LONGEST_ROW))
    else:
        yield Probe(1, min(largest + 3, longest, _LONGEST_SQUARE), 0)


def _lengths(grid: Grid, probe: Probe, others: set[Dim]) -> dict[Dim, int]:
    """Numbers for the open lengths that give the probe's batch, rows and past; a length that is none of them is that of all keys."""
    out: dict[Dim, int] = {}
    for p, number in ((grid.batch, probe.batch), (grid.rows, probe.rows)):
        for s in p.symbols:
            if isinstance(s, Dim):
                out.setdefault(s, number)
    open_ = [s for s in grid.keys.symbols if isinstance(s, Dim) and s not in out]
    if len(open_) == 1:
        least = _number(grid.keys, {**out, open_[0]: 0})
        out[open_[0]] = max(_number(grid.rows, out) + probe.past - least, 0)
    out |= {s: probe.past for s in open_ if s not in out}
    keys = _number(grid.keys, out)
    return {**{d: keys for d in others if d not in out}, **out}


def _number(p: Poly, lengths: dict[Dim, int]) -> int:

    def known(s: Symbol) -> Poly | None:
        if isinstance(s, Clamped):
            return const(min(_number(s.length, lengths), s.bound))
        return const(lengths[s]) if isinstance(s, Dim) and s in lengths else None

    value = p.substitute(known).value
    if value is None or value < 0:
        raise Refusal(f"its mask cannot be evaluated: the length {p} has no number.")
    return value


def _padding(generator: np.random.Generator, pattern: str, keys: KeyMask | None, shape: list[int], is_keys: bool) -> np.ndarray:
    """Ones with zeros in front, behind or anywhere, different in each row; for a comparison, values around its bound."""
    bound = keys.bound if keys is not None and is_keys else 0
    if pattern == "random" or len(shape) != 2:
        return generator.integers(0, 2, shape) + bound
    padded = generator.integers(0, max(shape[1] // 2, 1), (shape[0], 1))
    columns = np.arange(shape[1])[None, :]
    kept = columns >= padded if pattern == "left" else columns < shape[1] - padded
    return kept.astype(np.int64) + bound


def _compare(
    terms: list[MaskTerm], mask: Mask, values: dict[str, np.ndarray], sizes: tuple[int, int, int], lengths: dict[Dim, int]
) -> None:
    b, s, t = sizes
    visible = np.ones((1, 1, 1, 1), dtype=bool)
    for term in terms:
        if term.removes:
            visible = visible & _visible(term, values, sizes, lengths)
    for term in terms:
        if term.how == "multiply" and np.any(visible & ~_visible(term, values, sizes, lengths)):
            raise Refusal(
                "its scores are multiplied by a mask that evaluates to other than 1 where they are not removed.", label(term.node)
            )
    expected = (np.arange(t)[None, :] <= np.arange(s)[:, None] + (t - s))[None, None]
    if mask.keys is not None:
        real = _real_keys(mask.keys, values[mask.keys.tensor].squeeze(mask.keys.squeeze))[:, :t]
        expected = expected & real[:, None, None, :]
    try:
        shape = np.broadcast_shapes(visible.shape, expected.shape, (b, 1, s, t))
    except ValueError:
        raise Refusal(
            f"its mask was proved for scores of {b} x {s} x {t}, but has the shape {visible.shape}.", label(terms[0].node)
        ) from None
    wrong = np.argwhere(np.broadcast_to(visible, shape) != np.broadcast_to(expected, shape))
    if len(wrong):
        at = dict(zip(("batch item", "head", "row", "key"), wrong[0].tolist(), strict=True))
        where = ", ".join(f"{k} {v}" for k, v in at.items())
        raise Refusal(
            f"its mask was proved causal, but evaluates otherwise at {where} (of {b} x {s} x {t}); the proof is not trusted.",
            label(terms[0].node),
        )


def _visible(term: MaskTerm, values: dict[str, np.ndarray], sizes: tuple[int, int, int], lengths: dict[Dim, int]) -> np.ndarray:
    if term.mask is None:
        offset = 0 if term.offset is None else _number(term.offset, lengths)
        return (np.arange(sizes[2])[None, :] <= np.arange(sizes[1])[:, None] + offset)[None, None]
    mask = values[term.mask.name]
    if term.how == "bool":
        out = mask.astype(bool)
    elif term.how == "add":
        with np.errstate(all="ignore"):
            removed = mask <= MASKED / term.factor if term.factor > 0 else mask >= MASKED / term.factor
        if not np.all(removed | (mask == 0)):
            raise Refusal("its added mask evaluates to a value that neither keeps nor removes a score.", label(term.node))
        out = ~removed
    elif term.how == "multiply":
        out = mask == 1
    else:
        out = mask.astype(bool) if term.how == "where" else ~mask.astype(bool)
    if term.lengths is not None:
        # Batch and heads in other axes than two: in row-major order they are the same.
        b, s, t = sizes
        return np.broadcast_to(out, [_number(n, lengths) for n in term.lengths]).reshape(b, -1, s, t)
    return out.reshape((1,) * (4 - out.ndim) + out.shape)


def _real_keys(keys: KeyMask, source: np.ndarray) -> np.ndarray:
    tests = {
        "nonzero": lambda x: x != 0,
        "zero": lambda x: x == 0,
        "==": lambda x: x == keys.bound,
        "!=": lambda x: x != keys.bound,
        "<=": lambda x: x <= keys.bound,
        ">=": lambda x: x >= keys.bound,
    }
    return tests[keys.test](source)
