"""The index variables of one attention: which element a pattern means when it follows a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from graph_passes.symbolic.poly import Index, Poly, const, poly

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Lengths of an attention: scores [B, Hq, S, T], head size D of queries and keys, Dv of values."""

    batch: Poly
    heads: Poly
    rows: Poly
    keys: Poly
    size: Poly
    value_size: Poly

    @property
    def b(self) -> Poly:
        return _variable("b", self.batch)

    @property
    def h(self) -> Poly:
        return _variable("h", self.heads)

    @property
    def q(self) -> Poly:
        return _variable("q", self.rows)

    @property
    def kv(self) -> Poly:
        return _variable("kv", self.keys)

    @property
    def d(self) -> Poly:
        return _variable("d", self.size)

    @property
    def w(self) -> Poly:
        return _variable("w", self.value_size)

    @property
    def scores(self) -> tuple[Poly, Poly, Poly, Poly]:
        """Lengths of the scores."""
        return self.batch, self.heads, self.rows, self.keys

    @property
    def at(self) -> tuple[Poly, Poly, Poly, Poly]:
        """Index of an element of the scores."""
        return self.b, self.h, self.q, self.kv


def _variable(name: str, size: Poly) -> Poly:
    return const(0) if size.value == 1 else poly(Index(name, size))
