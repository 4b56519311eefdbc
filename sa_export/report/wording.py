"""Numbers and verdicts as words: one spelling for the terminal table, the HTML page and the pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sa_export.check.result import Candidate, CheckResult, ExactCase, Gate, LengthResult

__all__ = [
    "MISSING",
    "Verdict",
    "count",
    "decision",
    "fixed",
    "gate_failure",
    "gate_limit",
    "gate_value",
    "join",
    "percent",
    "quantity",
    "scientific",
    "seconds",
    "verdict",
]

MISSING = "n/a"


def fixed(value: float, digits: int = 3) -> str:
    """`0.213`; `n/a` for a figure that could not be measured."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def scientific(value: float) -> str:
    """`1.2e-05`, and a plain `0` for an exact zero."""
    return MISSING if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def percent(value: float, digits: int = 2, signed: bool = False) -> str:
    """`0.005` as `0.50 %`."""
    if math.isnan(value):
        return MISSING
    rounded = round(100 * value, digits) + 0.0  # -0.0 is 0
    return f"{rounded:{'+' if signed else ''}.{digits}f} %"


def count(part: int, whole: int) -> str:
    """`199/200`; `n/a` when there was nothing to count."""
    return f"{part}/{whole}" if whole else MISSING


def seconds(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def join(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


_QUANTITIES = (
    ("loss_change", "loss"),
    ("recall_ratio", "recall"),
    ("recall_ratio", "needle"),
    ("top1", "top"),
    ("density", "density"),
    ("cra_mean", "cra"),
    ("cra_min", "cra"),
    ("kl_mean", "kl"),
    ("kl_max", "kl"),
)


def quantity(gate: Gate, row: LengthResult) -> str | None:
    """Which figure of the row a gate is about: an attribute of `LengthResult`, or None.

    A gate carries neither field nor unit. It is taken for a figure of the row only if its name says so and its value is that figure, so
    that no unit is guessed.
    """
    name = gate.name.lower()
    return next((field for field, word in _QUANTITIES if word in name and _same(gate.value, getattr(row, field))), None)


def _spell(value: float, field: str | None) -> str:
    if field == "loss_change":
        return percent(value, 2, signed=True)
    if field in ("recall_ratio", "top1"):
        return percent(value, 1)
    return MISSING if math.isnan(value) else f"{value:.4g}"


def gate_value(gate: Gate, row: LengthResult) -> str:
    return _spell(gate.value, quantity(gate, row))


def gate_limit(gate: Gate, row: LengthResult) -> str:
    return f"{'at most' if gate.sense == '<=' else 'at least'} {_spell(gate.limit, quantity(gate, row))}"


def gate_failure(candidate: Candidate, row: LengthResult, gate: Gate) -> str:
    """One clause: what failed, where, and by how much."""
    field, where = quantity(gate, row), f"{candidate.name} at {row.length} tokens: {gate.name}"
    if math.isnan(gate.value):
        return f"{where} could not be measured (allowed: {gate_limit(gate, row)})"
    excess = abs(gate.value - gate.limit)
    # Two figures that round alike must not read as equal: the difference then keeps its own digits.
    amount = f"{100 * excess:.2g} percentage points" if field in ("loss_change", "recall_ratio", "top1") else f"{excess:.2g}"
    side = "above" if gate.sense == "<=" else "below"
    return f"{where} {_spell(gate.value, field)} is {side} the limit {_spell(gate.limit, field)} by {amount}"


def _exact_failure(candidate: Candidate, case: ExactCase) -> str:
    where = f"{candidate.name} at alpha = 1, {case.name}"
    if math.isnan(case.relative):
        return f"{where}: the difference from the original could not be measured (allowed: at most {case.tolerance:.1g})"
    times = f", {case.relative / case.tolerance:.3g} times as much" if case.tolerance > 0 else ""
    return f"{where}: the relative difference {case.relative:.2g} is above the tolerance {case.tolerance:.1g}{times}"


@dataclass(frozen=True)
class Verdict:
    """What the whole run says.

    Attributes:
        passed: None when nothing was gated, so that nothing was decided.
        sentence: the verdict in one sentence.
        failures: one clause for each failed gate or exactness case of a gated candidate, in the order of the run.
    """

    passed: bool | None
    sentence: str
    failures: list[str]


def decision(candidate: Candidate, row: LengthResult) -> str:
    """The word in the last column of the table: a candidate shown for comparison has it in brackets."""
    if not row.gates:
        return "no gate"
    word = "pass" if all(g.ok for g in row.gates) else "FAIL"
    return word if candidate.gated else f"({word.lower()})"


def verdict(result: CheckResult) -> Verdict:
    gated = [c for c in result.candidates if c.gated]
    gates = [(c, r, g) for c in gated for r in c.lengths for g in r.gates]
    exact = [(c, e) for c in gated for e in c.exact]
    if not gates and not exact:
        why = "no threshold was set" if gated else "every candidate is shown for comparison only"
        return Verdict(None, f"Nothing was decided: {why}.", [])
    failures = [_exact_failure(c, e) for c, e in exact if not e.ok] + [gate_failure(c, r, g) for c, r, g in gates if not g.ok]
    if failures:
        more = len(failures) - 1
        return Verdict(False, failures[0] + (f"; {more} more failed" if more else "") + ".", failures)
    parts = []
    if gates:
        lengths = [str(n) for n in sorted({r.length for _, r, _ in gates})]
        parts.append(
            f"within all {len(gates)} limits at {join(lengths)} tokens" if len(gates) > 1 else f"within the limit at {lengths[0]} tokens"
        )
    if exact:
        parts.append(f"the same function as full attention at alpha = 1 in {len(exact)} of {len(exact)} cases")
    return Verdict(True, f"{join([c.name for c in gated])} {'is' if len(gated) == 1 else 'are'} {join(parts)}.", [])
