"""The terminal table, and the words that it shares with the page."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from sa_export.check.result import Gate
from sa_export.report import text_table
from sa_export.report.wording import count, gate_failure, gate_limit, join, percent, quantity, scientific, seconds, verdict
from tests.sa_export.report import report_samples as samples


def demo_result() -> samples.CheckResult:
    a, b = (samples.candidate(n, (4096, 2048), {}, maps=0) for n in ("residue", "column_slash"))
    return samples.result([a, replace(b, gated=False)])


def test_table_is_aligned_and_sorted_by_length() -> None:
    result = demo_result()
    lines = text_table(result, colour=False).splitlines()
    assert set(lines[2]) == {"-"}
    rows = lines[3:7]
    assert [line.split()[:2] for line in rows] == [
        ["2048", "residue"],
        ["2048", "column_slash"],
        ["4096", "residue"],
        ["4096", "column_slash"],
    ]
    # Columns of figures end where their headings end, columns of words begin where their headings begin.
    ends = [m.end() for m in re.finditer(r"\S+", lines[0])]
    starts = [m.start() for m in re.finditer(r"\S+", lines[0])]
    for line in rows:
        spans = [m.span() for m in re.finditer(r"\S+(?: %)?", line)]
        assert len(spans) == 11
        assert [b for i, (_, b) in enumerate(spans) if i not in (1, 10)] == [e for i, e in enumerate(ends) if i not in (1, 10)]
        assert [spans[i][0] for i in (1, 10)] == [starts[i] for i in (1, 10)]


def test_table_values_and_verdicts() -> None:
    result = demo_result()
    text = text_table(result, colour=False)
    row = result.candidates[0].lengths[0]
    line = next(x for x in text.splitlines() if x.split()[:2] == ["4096", "residue"])
    assert line.split() == [
        "4096", "residue", f"{row.density:.3f}", f"{row.cra_mean:.3f}", f"{row.cra_min:.3f}", "2.1557", f"{row.loss:.4f}",
        f"{100 * row.loss_change:+.2f}", "%", "206/208", "206/208", "pass",
    ]  # fmt: skip
    assert next(x for x in text.splitlines() if x.split()[:2] == ["4096", "column_slash"]).endswith(" (fail)")
    assert "(pass), (fail): shown for comparison, does not decide" in text
    assert "alpha = 1 is full attention, cases within tolerance: residue 5/5, column_slash 5/5" in text
    assert text.splitlines()[-1].startswith("FAIL  residue at 2048 tokens: density 0.3")


def test_every_failure_has_its_line() -> None:
    c = samples.candidate("residue", (4096,), {}, maps=0)
    exact = [replace(c.exact[0], relative=2e-3), *c.exact[1:]]
    row = replace(c.lengths[0], gates=[Gate("density", 0.4, "<=", 0.35), Gate("mean KL", math.nan, "<=", 0.02), Gate("x", 1.0, ">=", 0.5)])
    lines = text_table(samples.result([replace(c, exact=exact, lengths=[row])]), colour=False).splitlines()
    assert lines[3].endswith("  FAIL")
    assert lines[-4:] == [
        "alpha = 1 is full attention, cases within tolerance: residue 4/5",
        "FAIL  residue at alpha = 1, prefill: the relative difference 0.002 is above the tolerance 0.0001, 20 times as much.",
        "FAIL  residue at 4096 tokens: density 0.4 is above the limit 0.35 by 0.05.",
        "FAIL  residue at 4096 tokens: mean KL could not be measured (allowed: at most 0.02).",
    ]


def test_pass_and_nothing_decided() -> None:
    c = samples.candidate("residue", (4096,), {}, maps=0)
    assert (
        text_table(samples.result([c]), colour=False)
        .splitlines()[-1]
        .startswith("PASS  residue is within all 5 limits at 4096 tokens and ")
    )
    open_ = replace(c, exact=[], lengths=[replace(c.lengths[0], gates=[], loss=math.nan, needles=0)])
    lines = text_table(samples.result([open_]), colour=False).splitlines()
    assert lines[3].split()[6:] == ["n/a", "n/a", "n/a", "n/a", "no", "gate"]
    assert lines[-1] == "NOT DECIDED  Nothing was decided: no threshold was set."
    assert text_table(samples.result([]), colour=False).splitlines()[-1].startswith("NOT DECIDED")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colour_only_on_a_terminal(
    stream: io.StringIO, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    result = demo_result()
    text = text_table(result)
    assert ("\x1b[" in text) is expected
    assert re.sub(r"\x1b\[\d+m", "", text) == text_table(result, colour=False)


def test_words() -> None:
    assert [percent(x, 2, signed=True) for x in (0.0, -1e-9, 0.00125, -0.02, math.nan)] == [
        "+0.00 %",
        "+0.00 %",
        "+0.12 %",
        "-2.00 %",
        "n/a",
    ]
    assert [scientific(x) for x in (0.0, 1.21e-5, math.nan)] == ["0", "1.2e-05", "n/a"]
    assert [count(3, 4), count(0, 0)] == ["3/4", "n/a"]
    assert [seconds(x) for x in (0.014, 2.64, 19.44, 295.2, math.nan)] == ["0.01", "2.6", "19.4", "295", "n/a"]
    assert [join(["a"]), join(["a", "b"]), join(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_gate_is_spelled_in_percent_only_if_it_is_the_rows_own_figure() -> None:
    c = samples.candidate("residue", (4096,), {}, maps=0)
    row = replace(c.lengths[0], loss_full=2.0, loss=2.04, recalled=103, recalled_full=206)
    assert [quantity(g, row) for g in c.lengths[0].gates[2:]] == ["top1", "kl_mean", "density"]
    assert quantity(Gate("loss rise", 0.02, "<=", 0.005), row) is None  # 2.04 / 2.0 - 1 is not 0.02 in binary
    own = Gate("loss rise", row.loss_change, "<=", 0.005)
    assert gate_failure(c, row, own) == "residue at 4096 tokens: loss rise +2.00 % is above the limit +0.50 % by 1.5 percentage points"
    assert gate_failure(c, row, Gate("loss", 3.5, "<=", 3.0)) == "residue at 4096 tokens: loss 3.5 is above the limit 3 by 0.5"
    recall = Gate("needle recall / full", 0.5, ">=", 0.99)
    assert (
        gate_failure(c, row, recall)
        == "residue at 4096 tokens: needle recall / full 50.0 % is below the limit 99.0 % by 49 percentage points"
    )
    assert gate_limit(recall, row) == "at least 99.0 %"
    near = gate_failure(c, row, Gate("density", 0.3500001, "<=", 0.35))
    assert near.endswith("density 0.35 is above the limit 0.35 by 1e-07")


def test_verdict_counts_only_what_is_gated() -> None:
    good = samples.candidate("residue", (4096,), {}, maps=0)
    bad = samples.candidate("column_slash", (4096,), {}, maps=0)
    assert verdict(samples.result([good, replace(bad, gated=False)])).passed is True
    said = verdict(samples.result([good, bad]))
    assert said.passed is False
    assert len(said.failures) == sum(not g.ok for g in bad.lengths[0].gates)
    assert verdict(samples.result([replace(good, gated=False)])).passed is None


def test_importing_the_report_is_light() -> None:
    code = "import sys, sa_export.report; print([m for m in ('numpy', 'matplotlib', 'tqdm', 'torch', 'onnx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
