"""Integer polynomials over the lengths and index variables of a graph, and what can be proved about their signs.

Every symbol is an integer. `Dim` is a length that the graph leaves open (a `dim_param`), `Index` a position along an axis,
`Quotient` and `Remainder` are what is left of a division that does not come out even, and `Load` is the element of a tensor
whose value is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

__all__ = [
    "Clamped",
    "Dim",
    "Index",
    "Load",
    "Poly",
    "Quotient",
    "Remainder",
    "Symbol",
    "const",
    "floordiv",
    "index_variables",
    "is_nonnegative",
    "poly",
    "product",
    "rejoined",
    "remainder",
]


@dataclass(frozen=True)
class Dim:
    """A length that is known only at run time; at least `least`."""

    name: str
    least: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Clamped:
    """min(length, bound): what a Slice of `length` entries leaves of an axis of `bound` >= 2 entries."""

    length: Poly
    bound: int

    def __str__(self) -> str:
        return f"min({self.length}, {self.bound})"


@dataclass(frozen=True)
class Index:
    """A position along an axis: 0 <= value < size."""

    name: str
    size: Poly

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Quotient:
    """floor(numerator / denominator) for numerator >= 0 and denominator >= 1."""

    numerator: Poly
    denominator: Poly

    def __str__(self) -> str:
        return f"({self.numerator} div {self.denominator})"


@dataclass(frozen=True)
class Remainder:
    """numerator mod denominator for numerator >= 0 and denominator >= 1."""

    numerator: Poly
    denominator: Poly

    def __str__(self) -> str:
        return f"({self.numerator} mod {self.denominator})"


@dataclass(frozen=True)
class Load:
    """The element `index` of the tensor `tensor`, of which nothing is known; `node` names its producer ("" for a graph input)."""

    tensor: str
    index: tuple[Poly, ...]
    node: str = ""

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.index))}]"


Symbol = Dim | Clamped | Index | Quotient | Remainder | Load
Monomial = tuple[Symbol, ...]  # sorted, repeated for powers


def _order(symbol: Symbol) -> tuple[str, str]:
    """Sorting key: two symbols of different kinds may have the same text."""
    return type(symbol).__name__, str(symbol)


@dataclass(frozen=True)
class Poly:
    """A sum of integer multiples of products of symbols, in a canonical order, so that `==` is equality of polynomials."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(terms: Mapping[Monomial, int]) -> Poly:
        kept = [(m, c) for m, c in terms.items() if c]
        return Poly(tuple(sorted(kept, key=lambda term: (-len(term[0]), [_order(s) for s in term[0]]))))

    @cached_property
    def value(self) -> int | None:
        """The integer that this polynomial is, or None when it has symbols."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @cached_property
    def symbols(self) -> frozenset[Symbol]:
        return frozenset(s for monomial, _ in self.terms for s in monomial)

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Poly | int) -> Poly:
        out = dict(self.terms)
        for monomial, coefficient in poly(other).terms:
            out[monomial] = out.get(monomial, 0) + coefficient
        return Poly.of(out)

    def __mul__(self, other: Poly | int) -> Poly:
        out: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in poly(other).terms:
                monomial = tuple(sorted(m1 + m2, key=_order))
                out[monomial] = out.get(monomial, 0) + c1 * c2
        return Poly.of(out)

    def __neg__(self) -> Poly:
        return self * -1

    def __sub__(self, other: Poly | int) -> Poly:
        return self + poly(other) * -1

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Poly | int) -> Poly:
        return poly(other) - self

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        parts: list[str] = []
        for monomial, coefficient in self.terms:
            size = "" if abs(coefficient) == 1 and monomial else str(abs(coefficient))
            body = "*".join([size] * bool(size) + [str(s) for s in monomial])
            sign = "-" if coefficient < 0 else "+"
            parts.append((f"{sign} " if parts else sign.replace("+", "")) + body)
        return " ".join(parts)

    def divided_by(self, other: Poly) -> Poly | None:
        """The exact quotient, or None when `other` is not one product that divides every term."""
        if self == other and self.terms:
            return const(1)
        if len(other.terms) != 1:
            return None
        divisor, size = other.terms[0]
        out: dict[Monomial, int] = {}
        for monomial, coefficient in self.terms:
            rest = list(monomial)
            for s in divisor:
                if s not in rest:
                    return None
                rest.remove(s)
            if coefficient % size:
                return None
            out[tuple(rest)] = coefficient // size
        return Poly.of(out)

    def substitute(self, replace: Callable[[Symbol], Poly | None]) -> Poly:
        """The polynomial with each symbol replaced; None from `replace` keeps the symbol."""
        total = const(0)
        for monomial, coefficient in self.terms:
            product = const(coefficient)
            for s in monomial:
                new = replace(s)
                product = product * (poly(s) if new is None else new)
            total = total + product
        return total


def const(value: int) -> Poly:
    return Poly(((((), int(value))),) if value else ())


def poly(value: Poly | Symbol | int) -> Poly:
    if isinstance(value, Poly):
        return value
    if isinstance(value, int):
        return const(value)
    return Poly((((value,), 1),))


def index_variables(p: Poly) -> frozenset[Index]:
    """The positions that a polynomial depends on, also through the elements that it reads and through divisions."""
    found: set[Index] = set()
    for s in p.symbols:
        if isinstance(s, Index):
            found.add(s)
        for inner in s.index if isinstance(s, Load) else (s.numerator, s.denominator) if isinstance(s, (Quotient, Remainder)) else ():
            found |= index_variables(inner)
    return frozenset(found)


def product(values: Iterable[Poly]) -> Poly:
    return math.prod(values, start=const(1))


@cache
def is_nonnegative(p: Poly) -> bool:
    """True when p >= 0 whatever the lengths are and wherever the indices stand; False when that is not proved."""
    lowest = const(0)
    for monomial, coefficient in p.terms:
        if any(isinstance(s, Load) for s in monomial):
            return False
        positions = [s for s in monomial if not isinstance(s, (Dim, Clamped))]
        if not positions:
            lowest = lowest + Poly.of({monomial: coefficient})
        elif coefficient < 0:
            # All symbols are >= 0: a positive term is lowest at position 0, a negative one at the last position.
            extreme = const(coefficient)
            for s in monomial:
                top = poly(s) if isinstance(s, (Dim, Clamped)) else _largest(s)
                if top is None:
                    return False
                extreme = extreme * top
            lowest = lowest + extreme
    if any(not isinstance(s, (Dim, Clamped)) for s in lowest.symbols):
        return is_nonnegative(lowest)
    shifted = lowest.substitute(lambda s: poly(s) + s.least if isinstance(s, Dim) else None)
    return all(coefficient >= 0 for _, coefficient in shifted.terms)


def _largest(symbol: Symbol) -> Poly | None:
    """The largest value of a position; sizes of axes are taken as >= 1, since the position exists."""
    if isinstance(symbol, Index):
        return symbol.size - 1
    if isinstance(symbol, Remainder):
        return symbol.denominator - 1
    if isinstance(symbol, Quotient):
        top = symbol.numerator.substitute(lambda s: None if isinstance(s, (Dim, Clamped)) else _largest(s))
        if any(c < 0 and m for m, c in symbol.numerator.terms):
            return None
        # floor((n - 1) / d) = n / d - 1 when d divides n.
        whole = (top + 1).divided_by(symbol.denominator)
        if whole is not None:
            return whole - 1
        if top.value is not None and symbol.denominator.value:
            return const(top.value // symbol.denominator.value)
    return None


def _split(p: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    """p = quotient * divisor + rest, with as many whole terms in the quotient as can be."""
    quotient, rest = const(0), const(0)
    for monomial, coefficient in p.terms:
        term = Poly.of({monomial: coefficient})
        whole = term.divided_by(divisor)
        if whole is None:
            rest = rest + term
        else:
            quotient = quotient + whole
    return quotient, rest


def floordiv(p: Poly, divisor: Poly) -> Poly:
    """floor(p / divisor) for p >= 0 and divisor >= 1."""
    if divisor.value == 1:
        return p
    quotient, rest = _split(p, divisor)
    if rest.value is not None and divisor.value is not None:
        return quotient + rest.value // divisor.value
    if is_nonnegative(rest) and is_nonnegative(divisor - 1 - rest):
        return quotient
    return quotient + poly(Quotient(rest, divisor)) if is_nonnegative(rest) else poly(Quotient(p, divisor))


def remainder(p: Poly, divisor: Poly) -> Poly:
    """p mod divisor for p >= 0 and divisor >= 1."""
    if divisor.value == 1:
        return const(0)
    _, rest = _split(p, divisor)
    if rest.value is not None and divisor.value is not None:
        return const(rest.value % divisor.value)
    if is_nonnegative(rest) and is_nonnegative(divisor - 1 - rest):
        return rest
    return poly(Remainder(rest if is_nonnegative(rest) else p, divisor))


def rejoined(p: Poly) -> Poly:
    """The polynomial with n * (x div n) + (x mod n) written as x."""
    terms = dict(p.terms)
    for monomial, factor in p.terms:
        rest = monomial[0] if len(monomial) == 1 else None
        if isinstance(rest, Remainder):
            whole = (Quotient(rest.numerator, rest.denominator),)
            if rest.denominator.value is not None and terms.get(whole) == factor * rest.denominator.value:
                return rejoined(p - Poly.of({monomial: factor, whole: terms[whole]}) + rest.numerator * factor)
    return p
