"""Proof of masks: what a mask means for every batch item, row and key, and a check of that by evaluation."""

from __future__ import annotations

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.masks.crosscheck import crosscheck
from graph_passes.patterns.masks.prove import MaskTerm, prove
from graph_passes.site import Mask
from graph_passes.symbolic.graph import SymbolicGraph

__all__ = ["MaskTerm", "decide"]


def decide(sg: SymbolicGraph, terms: list[MaskTerm], grid: Grid) -> tuple[Mask, tuple[str, ...]]:
    """What the terms mean together, proved and then evaluated, with the sentences that say so.

    Raises:
        Refusal: it is not full causal attention (with padding), or that cannot be proved, or the evaluation disagrees.
    """
    mask, proved = prove(sg, terms, grid)
    return mask, (*proved, *crosscheck(sg, terms, mask, grid))
