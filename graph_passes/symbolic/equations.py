"""Lengths that a graph gives two names: which of them are the same.

A product needs its inner lengths equal and a Concat its other lengths; a call that breaks this fails. Where two open lengths meet
elementwise they are equal, or one of them is 1 and repeated. That they are equal is taken

1. of a length that an input of at most two axes (an attention mask, positions) has for itself: what is read from such an input is
   repeated to the full length, which serves both cases;
2. of two sums with a common length (new keys and the past of one layer or another): 1 leaves no key but that of the one row.

No length is found to be 0: such a graph works on nothing, or two of its names are used against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graph_passes.symbolic.poly import Dim, Poly, poly

__all__ = ["Equation", "solve", "substituted"]


@dataclass(frozen=True)
class Equation:
    """left = right; `certain`, or else unless one of them is 1; `repeats`: the operator is there for that case."""

    left: Poly
    right: Poly
    certain: bool
    repeats: bool = False


def solve(equations: Sequence[Equation], may_be_taken: Callable[[Dim], bool]) -> tuple[dict[Dim, Poly], frozenset[Dim]]:
    """What to put in the place of which lengths, and those of them that are only taken to be equal.

    Args:
        may_be_taken: whether an equation that is not certain may decide a length.
    """
    found: dict[Dim, Poly] = {}
    taken: set[Dim] = set()
    for equation in sorted(equations, key=lambda e: not e.certain):
        difference = substituted(equation.left - equation.right, found)
        if difference.value is not None or (not equation.certain and any(".broadcast[" in str(s) for s in difference.symbols)):
            continue
        sums = bool(_sum(equation.left, found) & _sum(equation.right, found))
        candidates = [
            s
            for s in _alone(difference)
            if (equation.certain or sums or (may_be_taken(s) and not equation.repeats))
            and _solved(difference, s).value != 0
            and (all(c >= 0 for _, c in _solved(difference, s).terms) or (equation.certain and ".shape[" in s.name))
        ]
        if not candidates:
            continue
        gone = min(candidates, key=lambda s: (".shape[" not in s.name, not may_be_taken(s), s.name))
        instead = _solved(difference, gone)
        found = {s: substituted(p, {gone: instead}) for s, p in found.items()}
        found[gone] = instead
        if not equation.certain:
            taken.add(gone)
    return found, frozenset(taken)


def substituted(p: Poly, found: dict[Dim, Poly]) -> Poly:
    return p.substitute(lambda s: found.get(s) if isinstance(s, Dim) else None) if found else p


def _sum(p: Poly, found: dict[Dim, Poly]) -> set[Dim]:
    """The lengths of a sum of several."""
    p = substituted(p, found)
    return {s for s in p.symbols if isinstance(s, Dim)} if len(p.terms) > 1 else set()


def _solved(difference: Poly, length: Dim) -> Poly:
    """What a length is when the difference is 0."""
    factor = dict(difference.terms)[(length,)]
    return Poly.of({m: -c // factor for m, c in (difference - poly(length) * factor).terms})


def _alone(difference: Poly) -> list[Dim]:
    """Lengths that stand once in a difference, by themselves, with a factor that divides the rest: it can be solved for them."""
    counted = [s for monomial, _ in difference.terms for s in set(monomial)]
    return [
        m[0]
        for m, factor in difference.terms
        if len(m) == 1 and isinstance(m[0], Dim) and counted.count(m[0]) == 1 and all(c % factor == 0 for _, c in difference.terms)
    ]
