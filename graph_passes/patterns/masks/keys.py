"""Which tensor of the graph says which keys are real, once it is proved that the mask asks that of (b, kv) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.site import KeyMask, Refusal, label
from graph_passes.symbolic.graph import Shape, SymbolicGraph
from graph_passes.symbolic.logic import Atom, Equal, Formula, Not, Value, atoms, evaluate, truth
from graph_passes.symbolic.poly import Load, poly

__all__ = ["KeyCondition", "key_mask"]


@dataclass(frozen=True)
class KeyCondition:
    """A condition on (b, kv): its truth for each truth of some comparisons (assignments that cannot hold together may be missing)."""

    comparisons: tuple[Atom, ...]
    table: dict[tuple[bool, ...], bool]

    def single(self) -> Formula | None:
        """The one comparison, or its opposite, that the condition is."""
        for i, atom in enumerate(self.comparisons):
            if all(value == facts[i] for facts, value in self.table.items()):
                return atom
            if all(value != facts[i] for facts, value in self.table.items()):
                return Not(atom)
        return None

    def is_same_as(self, f: Formula) -> bool:
        """Whether a formula over the same comparisons has the same truth table."""
        if not set(atoms(f)) <= set(self.comparisons):
            return False
        return all(evaluate(f, dict(zip(self.comparisons, facts, strict=True))) == value for facts, value in self.table.items())

    def __str__(self) -> str:
        one = self.single()
        return str(one) if one is not None else f"a condition on ({'; '.join(map(str, self.comparisons))})"


def key_mask(sg: SymbolicGraph, condition: KeyCondition, grid: Grid) -> KeyMask:
    """Where to read the condition: from a test of one [B, length] tensor, or else from a tensor that the mask itself is made from.

    Raises:
        Refusal: no tensor holds it.
    """
    question = ("key mask", condition.comparisons, tuple(condition.table.items()), grid.batch, grid.keys)
    if question not in sg.memory:
        sg.memory[question] = _search(sg, condition, grid)
    return sg.memory[question]


def _search(sg: SymbolicGraph, condition: KeyCondition, grid: Grid) -> KeyMask:
    one = condition.single()
    found = None if one is None else _test_of_a_tensor(sg, one, grid)
    found = found or _tensor_in_the_mask(sg, condition, grid)
    if found is None:
        names = ", ".join(sorted({s.tensor for a in condition.comparisons for s in a.poly.symbols if isinstance(s, Load)}))
        stopped_by = next((label(sg.origin[a]) for a in condition.comparisons if a in sg.origin), "")
        raise Refusal(f"no tensor says which keys are real as [batch, keys]: the mask asks {condition} of {names}.", stopped_by)
    return found


def _test_of_a_tensor(sg: SymbolicGraph, formula: Formula, grid: Grid) -> KeyMask | None:
    """For a comparison with the element [b, kv] or [0, kv] of a tensor."""
    atom = formula.of if isinstance(formula, Not) else formula
    loads = [s for s in atom.poly.symbols if isinstance(s, Load)]  # type: ignore[union-attr]
    if len(loads) != 1 or len(atom.poly.symbols) != 1 or len(loads[0].index) != 2:  # type: ignore[union-attr]
        return None
    load = loads[0]
    row, column = load.index
    tensor = sg.tensors[load.tensor]
    rows, length = sg.known_shape(tensor)
    one_row = row.value == 0 and grid.batch.value != 1
    repeat = one_row or bool(sg.taken_as_equal)
    if column != grid.kv or not (one_row or (row == grid.b and rows == grid.batch)):
        return None
    slope = dict(atom.poly.terms)[(load,)]  # type: ignore[union-attr]
    offset = (atom.poly - poly(load) * slope).value  # type: ignore[union-attr]
    if abs(slope) != 1 or offset is None:
        return None
    test, bound = _test(isinstance(atom, Equal), slope, offset, wanted=not isinstance(formula, Not))
    boolean = sg.dtype(tensor) == onnx.TensorProto.BOOL
    return KeyMask(tensor.name, (), test, bound, cut=length != grid.keys, repeat=repeat, boolean=boolean, length=str(grid.keys))


def _test(is_equality: bool, slope: int, offset: int, wanted: bool) -> tuple[str, int]:
    """`slope * x + offset` == 0 or <= 0 (slope 1 or -1), or its opposite, as a test of x."""
    bound = -offset * slope
    if is_equality:
        if bound == 0:
            return ("zero", 0) if wanted else ("nonzero", 0)
        return ("==" if wanted else "!=", bound)
    if slope > 0:
        return ("<=", bound) if wanted else (">=", bound + 1)
    return (">=", bound) if wanted else ("<=", bound - 1)


def _tensor_in_the_mask(sg: SymbolicGraph, condition: KeyCondition, grid: Grid) -> KeyMask | None:
    """For a bool tensor, met while the mask was followed, whose element at (b, kv) is the condition."""
    for tensor, index, value in _met(sg):
        shape = sg.shape(tensor)
        if shape is None or sg.dtype(tensor) != onnx.TensorProto.BOOL or not condition.is_same_as(truth(value)):
            continue
        kept = [k for k, n in enumerate(shape) if n.value != 1]
        squeezed = tuple(k for k in range(len(shape)) if k not in kept)
        if [(index[k], shape[k]) for k in kept] == [(grid.b, grid.batch), (grid.kv, grid.keys)]:
            return KeyMask(tensor.name, squeezed, repeat=bool(sg.taken_as_equal), boolean=True, length=str(grid.keys))
        if [(index[k], shape[k]) for k in kept] == [(grid.kv, grid.keys)] and squeezed and squeezed[0] < kept[0]:
            # One row for the whole batch: the first axis of length 1 stays and is repeated.
            return KeyMask(tensor.name, squeezed[1:], repeat=grid.batch.value != 1, boolean=True, length=str(grid.keys))
    return None


def _met(sg: SymbolicGraph) -> Iterator[tuple[gs.Tensor, Shape, Value]]:
    """Tensors whose elements were asked for, those nearest to the inputs first."""
    for (name, index), value in sg.known_values():
        yield sg.tensors[name], index, value
