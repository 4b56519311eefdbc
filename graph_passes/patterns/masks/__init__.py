"""Proof of masks: what a mask means for every batch item, row and key, and a check of that by evaluation."""

from __future__ import annotations

from dataclasses import fields, replace

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.masks.crosscheck import crosscheck
from graph_passes.patterns.masks.prove import MaskTerm, prove
from graph_passes.site import Mask, Refusal, label
from graph_passes.symbolic.graph import Either, SymbolicGraph
from graph_passes.symbolic.poly import Dim

__all__ = ["MaskTerm", "decide"]


def decide(sg: SymbolicGraph, terms: list[MaskTerm], grid: Grid) -> tuple[Mask, tuple[str, ...]]:
    """What the terms mean together, proved and then evaluated, with the sentences that say so.

    Raises:
        Refusal: it is not full causal attention (with padding), or that cannot be proved, or the evaluation disagrees.
    """
    try:
        return _decided(sg, terms, grid)
    except Either as error:
        either = error
    if any(t.at is not None for t in terms):
        raise Refusal(f"its mask cannot be followed: {either.why}.", label(either.node))
    try:
        masks, evidence = zip(*(_decided_under(sg, terms, grid, *case) for case in either.cases), strict=True)
    except Either as again:
        raise Refusal(f"its mask cannot be followed: {again.why}.", label(again.node)) from None
    if any(m != masks[0] for m in masks):
        cases = " and ".join(f"{name} = {value}" for name, value in either.cases)
        raise Refusal(f"its mask reads other keys for {cases}.", label(either.node))
    return masks[0], sum(evidence, ())


def _decided_under(sg: SymbolicGraph, terms: list[MaskTerm], grid: Grid, length: Dim, value: int) -> tuple[Mask, tuple[str, ...]]:
    """The same where a length has a value; lengths in the mask are named as in the graph itself."""
    there = sg.assuming(length, value)
    names = [f.name for f in fields(Grid)]
    grid_there = Grid(**{name: there.renamed(getattr(grid, name)) for name in names})
    terms_there = [replace(t, offset=None if t.offset is None else there.renamed(t.offset)) for t in terms]
    mask, evidence = _decided(there, terms_there, grid_there)
    keys = None if mask.keys is None else replace(mask.keys, length=str(grid.keys))
    return Mask(keys), tuple(f"for {length} = {value}: {sentence}" for sentence in evidence)


def _decided(sg: SymbolicGraph, terms: list[MaskTerm], grid: Grid) -> tuple[Mask, tuple[str, ...]]:
    mask, proved = prove(sg, terms, grid)
    assumed: list[str] = []
    if sg.taken_as_equal:
        names = ", ".join(sorted(s.name for s in sg.taken_as_equal))
        assumed.append(f"lengths of inputs taken to be those that they meet elsewhere, or 1: {names}.")
    if mask.keys is not None and mask.keys.tensor in sg.taken_as_flags:
        assumed.append(f"{mask.keys.tensor} is taken to hold 0 and 1 only, as the graph subtracts it from 1.")
    return mask, (*proved, *assumed, *crosscheck(sg, terms, mask, grid))
