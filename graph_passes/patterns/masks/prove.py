"""Decides by meaning whether a mask is full causal attention, with or without padding.

The element of the mask at (b, h, q, kv) is written as a formula over comparisons (`symbolic.points`). It must be equal, under
every consistent truth of those comparisons, to `kv <= q + (T - S)` and a condition on (b, kv) alone. Nothing is inferred from
names or node order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import onnx_graphsurgeon as gs

from graph_passes.patterns.grid import Grid
from graph_passes.patterns.masks.keys import KeyCondition, key_mask
from graph_passes.site import Mask, Refusal, label
from graph_passes.symbolic.graph import Either, Shape, Stuck, SymbolicGraph, producer
from graph_passes.symbolic.logic import (
    Atom,
    Equal,
    Formula,
    Ite,
    LessEqual,
    Not,
    Value,
    atoms,
    choose,
    conjunction,
    evaluate,
    less_equal,
    negation,
    number,
    truth,
)
from graph_passes.symbolic.movement import broadcast_index
from graph_passes.symbolic.poly import Index, Load, Poly, Quotient, Remainder, index_variables, is_nonnegative, poly

__all__ = ["MASKED", "MaskTerm", "allowed", "prove"]

MASKED = -1e4
"""A score lowered by at least this much (and by -inf, float minimum) has probability 0 in softmax: exp(-1e4) underflows in
every float type."""

_MOST_ATOMS = 12
_MOST_COMPARED = 64


@dataclass(frozen=True)
class MaskTerm:
    """One place where a mask meets the scores.

    Attributes:
        how: `add` (score + factor * mask), `where` (score where mask, else factor * fill), `unless` (factor * fill where mask, else score),
            `bool` (score where mask, else -inf), `multiply` (score * mask, before every other term), or `causal` (row i sees the keys
            0 .. i + offset; no tensor).
        mask: the mask tensor.
        node: the node where it meets the scores.
        fill: what replaces the score, for `where` and `unless`.
        factor: factor that the scores are multiplied by after this place.
        after: the mask meets the probabilities instead: they are multiplied by it, or chosen between with 0.
        at, lengths: index of the element (b, h, q, kv) in the scores where they meet the mask, and the lengths of those scores;
            None: [B, Hq, S, T].
    """

    how: str
    mask: gs.Tensor | None
    node: gs.Node
    fill: gs.Tensor | None = None
    factor: float = 1.0
    offset: Poly | None = None
    after: bool = False
    at: Shape | None = None
    lengths: Shape | None = None

    @property
    def removes(self) -> bool:
        """It takes scores out of the softmax; other terms may only make 0 what one that removes takes out."""
        return not self.after and self.how != "multiply"


def prove(sg: SymbolicGraph, terms: list[MaskTerm], grid: Grid) -> tuple[Mask, tuple[str, ...]]:
    """The mask that the terms make together, and the sentences that say what was proved.

    Raises:
        Refusal: the mask is not causal (with padding), or cannot be followed.
    """
    visible: Formula = True
    for term in terms:
        if term.removes:
            visible = conjunction(visible, allowed(sg, term, grid))
    causal = less_equal(grid.kv - grid.q - (grid.keys - grid.rows))
    for term in terms:
        if not term.removes:
            _require_removed(visible, allowed(sg, term, grid), causal, term)
    condition = _split_off_causal(sg, visible, causal, grid, terms)
    proved = f"mask proved: {causal if not isinstance(causal, bool) else 'every key is allowed to the one row'}"
    if condition is None:
        return Mask(), (proved + ".",)
    keys = key_mask(sg, condition, grid)
    return Mask(keys), (f"{proved} and {condition}.",)


def allowed(sg: SymbolicGraph, term: MaskTerm, grid: Grid) -> Formula:
    """Whether a term leaves the score of (b, h, q, kv) as it is.

    Raises:
        Refusal: it neither leaves nor removes some score.
    """
    if term.mask is None:
        return less_equal(grid.kv - grid.q - (term.offset or 0))
    value = _element(sg, term.mask, term, grid)
    if term.how == "bool":
        return truth(value)
    if term.how == "multiply":
        return _one_or_zero(sg, value, term)
    if term.how == "add":
        return _zero_or_masked(sg, value, term)
    fill = number(_element(sg, term.fill, term, grid)) if term.fill is not None else 0.0
    if not term.after and _zero_or_masked(sg, fill, term) is not False:
        raise Refusal(
            f"masked scores are replaced by {fill}, which does not remove them (needed: -inf or <= {MASKED:g}).", label(term.node)
        )
    return truth(value) if term.how == "where" else negation(truth(value))


def _element(sg: SymbolicGraph, tensor: gs.Tensor, term: MaskTerm, grid: Grid) -> Value:
    at, lengths = term.at or grid.at, term.lengths or grid.scores
    try:
        for k, length in enumerate(sg.known_shape(tensor, term.node)[::-1], 1):
            if (length.value or 0) > 1 and lengths[-k].value is not None and length != lengths[-k]:
                raise Stuck(term.node, f"its length {length} is not that of the scores ({lengths[-k]})")
        return sg.value(tensor, broadcast_index(sg, term.node, tensor, at, lengths))
    except Either:
        raise
    except (Stuck, IndexError) as stuck:
        node = stuck.node if isinstance(stuck, Stuck) else term.node
        why = stuck.why if isinstance(stuck, Stuck) else f"{tensor.name} has more axes than the scores"
        what = "what is added to the scores (a mask or a bias)" if term.how == "add" else "the mask"
        raise Refusal(f"{what} cannot be followed: {why}.", label(node)) from None


def _zero_or_masked(sg: SymbolicGraph, value: Value, term: MaskTerm) -> Formula:
    """Of a number that is added to a score: True where it is 0, False where it removes the score."""
    value = number(value)
    if isinstance(value, Ite):
        return choose(value.condition, _zero_or_masked(sg, value.then, term), _zero_or_masked(sg, value.other, term))
    real = float(value.value) if isinstance(value, Poly) and value.value is not None else value
    if isinstance(real, float):
        if real == 0:
            return True
        if real * term.factor <= MASKED:
            return False
        raise Refusal(
            f"an added mask has the value {real:g}, which neither keeps a score (0) nor removes it (-inf or <= {MASKED:g}).",
            label(term.node),
        )
    assert isinstance(value, Poly)
    raise Refusal(f"what is added to the scores is not a mask of 0 and -inf but a bias: {value}.", _source(sg, value) or label(term.node))


def _one_or_zero(sg: SymbolicGraph, value: Value, term: MaskTerm) -> Formula:
    """Of a number that a score is multiplied by: True where it is 1, False where it is 0."""
    value = number(value)
    if isinstance(value, Ite):
        return choose(value.condition, _one_or_zero(sg, value.then, term), _one_or_zero(sg, value.other, term))
    real = value.value if isinstance(value, Poly) else value
    if real in (0, 1):
        return real == 1
    raise Refusal(
        f"its {'probabilities' if term.after else 'scores'} are multiplied by {value}, which is neither one constant number nor part of a mask of 0 and 1.",
        (_source(sg, value) if isinstance(value, Poly) else "") or label(term.node),
    )


def _require_removed(visible: Formula, kept: Formula, causal: Formula, term: MaskTerm) -> None:
    """Every score that a mask makes 0 is removed by the other terms."""
    found = tuple(dict.fromkeys((*atoms(visible), *atoms(kept))))
    _refuse_too_many(found, term.node)
    for facts in _assignments(found, causal):
        if evaluate(visible, facts) and not evaluate(kept, facts):
            what = "its probabilities makes some of them 0 that the mask of its scores keeps" if term.after else ""
            what = what or "that its scores are multiplied by makes some of them 0, which does not remove them"
            raise Refusal(f"a mask {'on ' if term.after else ''}{what}.", label(term.node))


def _source(sg: SymbolicGraph, p: Poly) -> str:
    """The node that makes an element of which nothing is known."""
    return next((label(producer(sg.tensors[s.tensor])) for s in p.symbols if isinstance(s, Load) and s.tensor in sg.tensors), "")


def _split_off_causal(sg: SymbolicGraph, visible: Formula, causal: Formula, grid: Grid, terms: list[MaskTerm]) -> KeyCondition | None:
    """The condition on keys alone that `visible` is equal to, joined with `causal`; None when there is no such condition.

    Raises:
        Refusal: there is none.
    """
    where = label(terms[0].node) if terms else ""
    if not terms and causal is not True:
        raise Refusal("it has no mask: every row sees every key (bidirectional or cross attention).", where)
    found = atoms(visible)
    _refuse_too_many(found, terms[0].node if terms else None)
    on_keys = tuple(a for a in found if a != causal and _on_keys_only(a, grid))
    rows = [(facts, evaluate(visible, facts)) for facts in _assignments(found, causal)]
    unknown = next((a for a in found if a not in on_keys and _loads(a) and _matters(a, rows)), None)
    if unknown is not None:
        names = ", ".join(sorted({name for s in _loads(unknown) for name in _sources(sg, s.tensor)}))
        raise Refusal(f"its mask depends on the values of {names} ({unknown}), of which nothing is proved.", _origin(sg, unknown, where))
    shifted = next((a for a in found if a != causal and _is_shifted_causal(a, grid) and _matters(a, rows)), None)
    if shifted is not None:
        raise Refusal(f"its mask is not the lower-right causal one: it is {shifted}, needed is {causal}.", _origin(sg, shifted, where))
    if any(value and not _holds(causal, facts) for facts, value in rows):
        raise Refusal("its mask is not causal: a row sees keys that come after it (bidirectional, prefix or cross attention).", where)
    table: dict[tuple[bool, ...], dict[bool, list[dict[Atom, bool]]]] = {}
    for facts, value in rows:
        if _holds(causal, facts):
            table.setdefault(tuple(facts[a] for a in on_keys), {}).setdefault(value, []).append(facts)
    keys: dict[tuple[bool, ...], bool] = {}
    for row, by_value in table.items():
        if len(by_value) == 2:
            atom, seen_if = _closest_difference(found, by_value[True], by_value[False])
            raise Refusal(_explain(atom, causal, grid, seen_if), _origin(sg, atom, where))
        keys[row] = next(iter(by_value))
    if all(keys.values()):
        return None
    if not any(keys.values()):
        raise Refusal("its mask hides every key.", where)
    return KeyCondition(on_keys, keys)


def _refuse_too_many(found: tuple[Atom, ...], node: gs.Node | None) -> None:
    if len(found) > _MOST_ATOMS:
        raise Refusal(f"its mask has {len(found)} separate conditions; at most {_MOST_ATOMS} are looked at together.", label(node))


def _closest_difference(found: tuple[Atom, ...], seen: list[dict[Atom, bool]], hidden: list[dict[Atom, bool]]) -> tuple[Atom, bool]:
    """A comparison that decides whether a key is seen, and its truth where it is: of two cases that differ in as few as possible."""

    def differing(pair: tuple[dict[Atom, bool], dict[Atom, bool]]) -> list[Atom]:
        return [a for a in found if pair[0][a] != pair[1][a]]

    pair = min(product(seen[:_MOST_COMPARED], hidden[:_MOST_COMPARED]), key=lambda p: len(differing(p)))
    atom = differing(pair)[0]
    return atom, pair[0][atom]


def _beyond(atom: Atom, grid: Grid) -> Poly:
    """How many keys earlier than causality a comparison `kv <= q + ...` ends."""
    return atom.poly - (grid.kv - grid.q - (grid.keys - grid.rows))


def _is_shifted_causal(atom: Atom, grid: Grid) -> bool:
    """`kv <= q + n` for lengths n that are not those of causality."""
    beyond = _beyond(atom, grid)
    return (
        isinstance(atom, LessEqual)
        and beyond.value is None
        and not any(isinstance(s, (Index, Load, Quotient, Remainder)) for s in beyond.symbols)
    )


def _holds(causal: Formula, facts: dict[Atom, bool]) -> bool:
    return evaluate(causal, facts)


def _loads(atom: Atom) -> list[Load]:
    return [s for s in atom.poly.symbols if isinstance(s, Load)]


def _sources(sg: SymbolicGraph, name: str) -> set[str]:
    """The graph inputs whose values a tensor is made from; the tensor itself when there are none."""
    found: set[str] = set()
    stack, seen = [sg.tensors[name]], set()
    while stack:
        tensor = stack.pop()
        if tensor.name in sg.inputs:
            found.add(tensor.name)
        node = producer(tensor)
        if node is not None and id(node) not in seen and node.op not in ("Shape", "Size"):
            seen.add(id(node))
            stack += list(node.inputs)
    return found or {name}


def _origin(sg: SymbolicGraph, atom: Atom, otherwise: str) -> str:
    return label(sg.origin[atom]) if atom in sg.origin else _source(sg, atom.poly) or otherwise


def _matters(atom: Atom, rows: list[tuple[dict[Atom, bool], bool]]) -> bool:
    """Two assignments that can hold and differ in this comparison alone make different values."""
    values: dict[frozenset[tuple[Atom, bool]], bool] = {}
    return any(values.setdefault(frozenset((a, v) for a, v in facts.items() if a != atom), value) != value for facts, value in rows)


def _assignments(found: tuple[Atom, ...], causal: Formula) -> Iterator[dict[Atom, bool]]:
    """All truths of the comparisons that can hold together, as far as it can be told from those of one integer with different
    numbers, and from pairs of others."""
    everything = list(found)
    if not isinstance(causal, bool) and causal not in found and isinstance(causal, (LessEqual, Equal)):
        everything.append(causal)
    rules = [rule for a, b in combinations(everything, 2) for rule in (*_implied(a, b), *_implied(b, a))]
    groups: dict[Poly, list[tuple[Atom, int, int]]] = {}
    for atom in everything:
        offset = dict(atom.poly.terms).get((), 0)
        integer = atom.poly - offset
        sign = 1 if not integer.terms or integer.terms[0][1] > 0 else -1
        groups.setdefault(integer * sign, []).append((atom, sign, offset))
    for truths in product(*map(_truths_of_one_integer, groups.values())):
        facts = {
            atom: truth
            for group, part in zip(groups.values(), truths, strict=True)
            for (atom, _, _), truth in zip(group, part, strict=True)
        }
        if all(facts[b] == then for a, b, then in rules if facts[a]):
            yield facts


def _truths_of_one_integer(group: list[tuple[Atom, int, int]]) -> list[tuple[bool, ...]]:
    """The truths that comparisons `sign * x + offset` <= 0 or == 0 take together for some integer x."""
    changes = {-sign * offset + step for _, sign, offset in group for step in (-1, 0, 1)}

    def holds(atom: Atom, value: int) -> bool:
        return value <= 0 if isinstance(atom, LessEqual) else value == 0

    return list(dict.fromkeys(tuple(holds(atom, sign * x + offset) for atom, sign, offset in group) for x in sorted(changes)))


def _implied(a: Atom, b: Atom) -> Iterator[tuple[Atom, Atom, bool]]:
    """What the truth of one comparison says of another: (a, b, the truth of b)."""
    if isinstance(b, Equal):
        return
    for p in (a.poly, -a.poly) if isinstance(a, Equal) else (a.poly,):
        if is_nonnegative(p - b.poly):  # b.poly <= p <= 0
            yield a, b, True
        if isinstance(a, Equal) and is_nonnegative(b.poly - p - 1):  # b.poly >= p + 1 > 0
            yield a, b, False


def _on_keys_only(atom: Atom, grid: Grid) -> bool:
    """The comparison reads elements that are the same for every row and head."""
    positions = index_variables(atom.poly)
    return bool(_loads(atom)) and all(poly(i) in (grid.b, grid.kv) for i in positions)


def _explain(atom: Atom, causal: Formula, grid: Grid, seen_if: bool) -> str:
    """What a condition that full causal attention does not have means; `seen_if` is its truth where the key is seen."""
    if any(isinstance(s, (Quotient, Remainder)) for s in atom.poly.symbols):
        return f"its mask is cut into chunks or strides ({atom})."
    if not isinstance(atom, LessEqual):
        return f"its mask has a condition that full causal attention does not have ({atom})."
    beyond = _beyond(atom, grid).value
    if beyond is None:
        return f"its mask has a condition that full causal attention does not have ({atom if seen_if else Not(atom)})."
    if seen_if:
        return f"its mask hides the last {beyond} of the keys that are not after the row ({atom}; needed is {causal})."
    return f"its mask is a sliding window of {beyond} keys ({Not(atom)})."
