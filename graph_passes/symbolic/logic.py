"""Element values that depend on conditions: formulas over comparisons, and numbers that are chosen by formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graph_passes.symbolic.poly import Index, Monomial, Poly, const, is_nonnegative

__all__ = [
    "And",
    "Equal",
    "Formula",
    "Ite",
    "LessEqual",
    "Not",
    "Or",
    "Value",
    "atoms",
    "conjunction",
    "equal",
    "evaluate",
    "less_equal",
    "negation",
    "truth",
]


@dataclass(frozen=True)
class LessEqual:
    """poly <= 0."""

    poly: Poly

    def __str__(self) -> str:
        return _comparison(self.poly, "<=")


@dataclass(frozen=True)
class Equal:
    """poly == 0."""

    poly: Poly

    def __str__(self) -> str:
        return _comparison(self.poly, "==")


@dataclass(frozen=True)
class Not:
    of: Formula

    def __str__(self) -> str:
        if isinstance(self.of, Equal):
            return str(self.of).replace("==", "!=")
        if isinstance(self.of, LessEqual):
            return _comparison(1 - self.of.poly, "<=")
        return f"not ({self.of})"


@dataclass(frozen=True)
class And:
    left: Formula
    right: Formula

    def __str__(self) -> str:
        return f"{self.left} and {self.right}"


@dataclass(frozen=True)
class Or:
    left: Formula
    right: Formula

    def __str__(self) -> str:
        return f"({self.left} or {self.right})"


Atom = LessEqual | Equal
Formula = bool | LessEqual | Equal | Not | And | Or


@dataclass(frozen=True)
class Ite:
    """`then` where the condition holds, `other` elsewhere."""

    condition: Formula
    then: Value
    other: Value

    def __str__(self) -> str:
        return f"({self.then} where {self.condition}, else {self.other})"


Value = Poly | float | Ite | Formula
"""What an element is: an integer, a real constant, a choice, or a truth value."""


def less_equal(p: Poly) -> Formula:
    """p <= 0, decided where the ranges of the symbols decide it.

    Of a comparison and its opposite (1 - p <= 0, all being integers) one is the atom and the other its negation, so that both
    are recognised.
    """
    if is_nonnegative(-p):
        return True
    if is_nonnegative(p - 1):
        return False
    divisor = math.gcd(*(c for m, c in p.terms if m))
    if divisor > 1:
        offset = next((c for m, c in p.terms if not m), 0)
        # divisor * r + offset <= 0  <=>  r <= floor(-offset / divisor)
        p = Poly.of({m: c // divisor for m, c in (p - offset).terms}) - (-offset // divisor)
    return LessEqual(p) if _leading(p)[1] > 0 else Not(LessEqual(1 - p))


def equal(p: Poly) -> Formula:
    """p == 0, decided where the ranges of the symbols decide it."""
    if p.value is not None:
        return p.value == 0
    if is_nonnegative(p - 1) or is_nonnegative(-p - 1):
        return False
    return Equal(p if p.terms[0][1] > 0 else -p)


def negation(f: Formula) -> Formula:
    if isinstance(f, bool):
        return not f
    return f.of if isinstance(f, Not) else Not(f)


def conjunction(a: Formula, b: Formula) -> Formula:
    if a is False or b is False:
        return False
    if a is True or a == b:
        return b
    return a if b is True else And(a, b)


def disjunction(a: Formula, b: Formula) -> Formula:
    if a is True or b is True:
        return True
    if a is False or a == b:
        return b
    return a if b is False else Or(a, b)


def truth(value: Value) -> Formula:
    """The value cast to bool: true where it is not zero."""
    if isinstance(value, Poly):
        return negation(equal(value))
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value != 0
    if isinstance(value, Ite):
        return choose(value.condition, truth(value.then), truth(value.other))
    return value


def choose(condition: Formula, then: Formula, other: Formula) -> Formula:
    """`then` where the condition holds, `other` elsewhere, as a formula."""
    return disjunction(conjunction(condition, then), conjunction(negation(condition), other))


def ite(condition: Formula, then: Value, other: Value) -> Value:
    if isinstance(condition, bool):
        return then if condition else other
    then, other = _known(then, condition, True), _known(other, condition, False)
    return then if then == other else Ite(condition, then, other)


def _known(value: Value, condition: Formula, truth_: bool) -> Value:
    """The value where a condition is known to be true, or known not to be."""
    while isinstance(value, Ite) and value.condition in (condition, negation(condition)):
        value = value.then if (value.condition == condition) == truth_ else value.other
    return value


def number(value: Value) -> Value:
    """A truth value as the integers 1 and 0; other values as they are."""
    if isinstance(value, bool):
        return const(int(value))
    return value if isinstance(value, (Poly, float, Ite)) else Ite(value, const(1), const(0))


def lift(operation: Callable[[Value, Value], Value | None], left: Value, right: Value) -> Value | None:
    """Applies an operation on unconditional values under the conditions of both; None when it is not defined on some pair."""
    for first, value in ((True, left), (False, right)):
        if isinstance(value, Ite):
            then = lift(operation, value.then, right) if first else lift(operation, left, value.then)
            other = lift(operation, value.other, right) if first else lift(operation, left, value.other)
            return None if then is None or other is None else ite(value.condition, then, other)
    return operation(left, right)


def atoms(f: Formula) -> tuple[Atom, ...]:
    """The comparisons in a formula, each once, in order of appearance."""
    out: dict[Atom, None] = {}
    stack: list[Formula] = [f]
    while stack:
        g = stack.pop()
        if isinstance(g, (LessEqual, Equal)):
            out[g] = None
        elif isinstance(g, Not):
            stack.append(g.of)
        elif isinstance(g, (And, Or)):
            stack += [g.right, g.left]
    return tuple(out)


def evaluate(f: Formula, facts: Mapping[Atom, bool]) -> bool:
    """The truth of a formula when its comparisons have the given truths."""
    if isinstance(f, bool):
        return f
    if isinstance(f, (LessEqual, Equal)):
        return facts[f]
    if isinstance(f, Not):
        return not evaluate(f.of, facts)
    if isinstance(f, And):
        return evaluate(f.left, facts) and evaluate(f.right, facts)
    return evaluate(f.left, facts) or evaluate(f.right, facts)


def _leading(p: Poly) -> tuple[Monomial, int]:
    """The first term with a position along an axis, or else the first term."""
    return next(((m, c) for m, c in p.terms if any(isinstance(x, Index) for x in m)), p.terms[0])


def _comparison(p: Poly, relation: str) -> str:
    """`p relation 0`, solved for the leading term."""
    if not p.terms:
        return f"0 {relation} 0"
    monomial, coefficient = _leading(p)
    left = Poly.of({monomial: abs(coefficient)})
    if coefficient > 0:
        return f"{left} {relation} {left - p}"
    return f"{left} {relation.replace('<=', '>=')} {left + p}"
