"""The sections of the page that are words and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sa_export.check.result import Candidate, CheckResult, LengthResult
from sa_export.report.markup import Child, Html, element, fragment, table
from sa_export.report.page import fold, note, section
from sa_export.report.table import rows_by_length
from sa_export.report.wording import (
    MISSING,
    count,
    decision,
    fixed,
    gate_limit,
    gate_value,
    join,
    percent,
    quantity,
    scientific,
    seconds,
    verdict,
)

__all__ = ["exact_section", "limits_section", "main_section", "repeat_section", "settings_section", "verdict_block"]


def _mark(ok: bool, counts: bool, word: str | None = None) -> Html:
    """Pass or fail as a sign (and a word, where there is room) as well as in a colour; grey when it does not decide."""
    word = (" pass" if ok else " fail") if word is None else word
    return element("span", ("✓" if ok else "✗") + word, class_=("good" if ok else "bad") if counts else "grey")


def verdict_block(result: CheckResult) -> Html:
    """The verdict and, below it, the few figures that most readers came for."""
    said = verdict(result)
    kind, word = {True: ("pass", "PASS"), False: ("fail", "FAIL"), None: ("open", "NOT DECIDED")}[said.passed]
    others = element("ul", [element("li", f) for f in said.failures[1:]]) if len(said.failures) > 1 else None
    banner = element("div", element("b", word), element("p", said.sentence), others, class_=f"verdict {kind}")
    shown = [c for c in result.candidates if c.gated and c.lengths] or [c for c in result.candidates if c.lengths]
    if not shown:
        return banner
    row = max(shown[0].lengths, key=lambda r: r.length)
    tiles = [
        (
            f"{row.density:.1%}".replace("%", " %") if row.density == row.density else MISSING,
            "of full attention's pairs computed (density)",
        ),
        (percent(row.loss_change, 2, signed=True), "change of the loss on ordinary text"),
        (count(row.recalled, row.needles), f"needles recalled; full attention {count(row.recalled_full, row.needles)}"),
        (fixed(row.cra_mean), f"attention kept by the mean row; worst row {fixed(row.cra_min)}"),
    ]
    grid = element(
        "div", [element("div", element("b", figure), element("span", words), class_="tile") for figure, words in tiles], class_="tiles"
    )
    return fragment(banner, note(f"{shown[0].name} at {row.length} tokens, its longest prompts:"), grid)


def _figures(candidate: Candidate, row: LengthResult) -> Iterator[Child]:
    """The cells of one row; a figure whose gate failed is marked."""
    failed = {quantity(g, row) for g in row.gates if not g.ok}

    def cell(text: Child, *fields: str) -> Html:
        return element("td", text, class_="bad" if failed & set(fields) and candidate.gated else None)

    yield cell(fixed(row.density), "density")
    yield cell(fixed(row.cra_mean), "cra_mean")
    yield cell(fixed(row.cra_min), "cra_min")
    yield fixed(row.loss_full, 4)
    yield fixed(row.loss, 4)
    yield cell(percent(row.loss_change, 2, signed=True), "loss_change")
    yield count(row.recalled_full, row.needles)
    yield cell(count(row.recalled, row.needles), "recall_ratio")
    yield cell(percent(row.top1, 1), "top1")
    yield cell(scientific(row.kl_mean), "kl_mean", "kl_max")
    yield count(row.greedy_same, row.greedy_tokens)
    yield seconds(row.seconds_full)
    yield seconds(row.seconds)


_COLUMNS = (
    ("", ("length", "candidate", "verdict", "density")),
    ("CRA", ("mean", "min")),
    ("loss", ("full", "sample", "change")),
    ("needles", ("full", "sample")),
    ("", ("top-1", "KL", "greedy")),
    ("seconds", ("full", "sample")),
)
_TERMS = (
    ("Density", "is the share of full attention's (query, key) pairs that is computed: 1 is full attention, less is cheaper."),
    (
        "CRA",
        "(cumulative residual attention) is the share of a query's true attention that falls on the keys that are read: 1 means that "
        "nothing was lost. Min is the worst query.",
    ),
    ("Loss", "is the cross-entropy, in nats a token, of the ordinary text in the last half of the prompts: lower is better."),
    ("Needles", "are facts hidden in the prompt and asked for later: one counts only if every digit of the answer is right."),
    (
        "Top-1",
        "is the share of positions where both models put the same token first; KL is how far apart their predictions are "
        "(mean, nats a token).",
    ),
    ("Greedy", "is how many tokens of the continuation are full attention's, up to the first that differs."),
)


def main_section(result: CheckResult) -> Html:
    words = {1, 2}
    names = [name for _, group in _COLUMNS for name in group]
    body: list[Html] = []
    previous = None
    for c, r in rows_by_length(result):
        mark = _mark(all(g.ok for g in r.gates), c.gated) if r.gates else element("span", decision(c, r), class_="grey")
        cells = [str(r.length), c.name, mark, *_figures(c, r)]
        tds = [
            x if isinstance(x, Html) and x.startswith("<td") else element("td", x, class_="w" if i in words else None)
            for i, x in enumerate(cells)
        ]
        body.append(element("tr", tds, class_="first" if previous not in (None, r.length) else None))
        previous = r.length
    top = [
        element("th", element("span", name), colspan=len(group), class_="g") if name else element("th", colspan=len(group))
        for name, group in _COLUMNS
    ]
    head = [element("th", n, scope="col", class_="w" if i in words else None) for i, n in enumerate(names)]
    inner = element(
        "table", element("thead", element("tr", top, class_="groups"), element("tr", head)), element("tbody", body), class_="main"
    )
    prompts = sorted({(r.length, r.prompts) for _, r in rows_by_length(result)})
    amount = join([f"{n} of {length} tokens" for length, n in prompts]) if prompts else "none were run"
    shown = [c.name for c in result.candidates if not c.gated]
    return section(
        "Results",
        element("p", f"Each row compares one rewritten model (“sample”) with the original (“full”) on the same prompts: {amount}."),
        element("div", inner, class_="scroll", tabindex="0"),
        note(f"{join(shown)}: for comparison only; a grey verdict does not decide.") if shown else None,
        element("div", [element("p", element("dfn", term), f" {what}", class_="note") for term, what in _TERMS], class_="words"),
        _gates(result),
    )


def _gates(result: CheckResult) -> Child:
    """Each gate beside its limit: a row a (length, candidate), a column a figure."""
    rows = [(c, r) for c, r in rows_by_length(result) if r.gates]
    if not rows:
        return note("No limit was set: the figures are shown, and none of them decides.")
    names = list(dict.fromkeys(g.name for _, r in rows for g in r.gates))
    limits = {n: {gate_limit(g, r) for _, r in rows for g in r.gates if g.name == n} for n in names}
    head = ["length", "candidate", *(fragment(n, element("br"), element("small", *limits[n])) if len(limits[n]) == 1 else n for n in names)]

    def cell(c: Candidate, r: LengthResult, name: str) -> Html:
        gates = [g for g in r.gates if g.name == name]
        own = len(limits[name]) > 1
        parts = [
            fragment(gate_value(g, r), " ", _mark(g.ok, c.gated, ""), element("small", " ", gate_limit(g, r)) if own else None)
            for g in gates
        ]
        return element("td", parts or "–", class_="bad" if c.gated and any(not g.ok for g in gates) else None)

    lines = [[str(r.length), c.name, *(cell(c, r, n) for n in names)] for c, r in rows]
    return fragment(element("h3", "Limits"), table(head, lines, words=(1,)))


def exact_section(result: CheckResult) -> Html:
    title, several = "Is the rewriting exact?", len(result.candidates) > 1
    explain = element(
        "p",
        "With alpha = 1 every key block is kept, so the rewritten graph must be the same function as the original. "
        "This proves the rewriting (masks, scales, caches, padding) apart from the quality of the selection.",
    )
    cases = list(dict.fromkeys((e.name, e.tolerance) for c in result.candidates for e in c.exact))
    if not cases:
        return section(title, explain, element("p", "It was not measured in this run."))
    head: list[Child] = ["case", "tolerance"]
    for c in result.candidates:
        head += [fragment(c.name, element("br"), "relative") if several else "relative", "largest"]
    rows = []
    for name, tolerance in cases:
        row: list[Child] = [name, f"{tolerance:.0e}"]
        for c in result.candidates:
            case = next((e for e in c.exact if (e.name, e.tolerance) == (name, tolerance)), None)
            if case is None:
                row += ["–", "–"]
                continue
            relative = fragment(scientific(case.relative), " ", _mark(case.ok, c.gated, ""))
            row += [element("td", relative, class_="bad" if c.gated and not case.ok else None), scientific(case.max_abs)]
        rows.append(row)
    return section(
        title,
        explain,
        table(head, rows, words=(0,)),
        note("Largest: the largest difference of a logit. Relative: that over the largest logit of the original. Attended positions only."),
    )


def _spelled(value: Any) -> str:
    """A setting as people write it; a list of one repeated number is given once."""
    if isinstance(value, (list, tuple)):
        if value and all(v == value[0] for v in value):
            return _spelled(value[0]) + (f" ({len(value)} heads alike)" if len(value) > 1 else "")
        return ", ".join(_spelled(v) for v in value)
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def _setting_cell(value: Any) -> Child:
    """One setting in a table; a long list (a value a head) is folded behind its range."""
    text = _spelled(value)
    if len(text) <= 40:
        return text
    numbers = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
    title = f"{len(value)} values, {min(value):g} to {max(value):g}" if numbers else f"{text[:32]}…"
    return element("td", fold(title, text), class_="w long")


def _runs(ids: list[str], every: list[str]) -> str:
    """Site ids, neighbours joined: `a to c, e`."""
    if ids == every:
        return f"all {len(every)} sites" if len(every) > 1 else every[0]
    place = {s: i for i, s in enumerate(every)}
    runs: list[list[str]] = []
    for s in ids:
        if runs and place[s] == place[runs[-1][-1]] + 1:
            runs[-1].append(s)
        else:
            runs.append([s])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(r) for r in runs)


def _settings(candidate: Candidate) -> Html:
    """What all sites share, and a row for each group of sites that differs from the others."""
    sites = {site: values if isinstance(values, dict) else {"value": values} for site, values in candidate.settings.items()}
    if not sites:
        return element("p", "No site was rewritten.")
    groups: dict[str, list[str]] = {}
    for site, values in sites.items():
        groups.setdefault(json.dumps(values, sort_keys=True, default=str), []).append(site)
    first = [sites[g[0]] for g in groups.values()]
    given: dict[str, set[str]] = {}  # a dense site has few settings: what it does not have, it does not contradict
    for values in first:
        for key, value in values.items():
            given.setdefault(key, set()).add(json.dumps(value, default=str))
    shared = {key: next(v[key] for v in first if key in v) for key, seen in given.items() if len(seen) == 1}
    varied = [key for key in given if key not in shared]
    every = list(sites)
    chips = (
        element("p", [fragment(element("code", f"{k}: {_spelled(v)}"), " ") for k, v in shared.items()], class_="chips") if shared else None
    )
    if not varied:
        return fragment(note(f"The same at {_runs(every, every)}:"), chips)
    rows: list[list[Child]] = []
    for group, values in zip(groups.values(), first, strict=True):
        rows.append(
            [element("td", _runs(group, every), class_="w long"), *(_setting_cell(values[k]) if k in values else "–" for k in varied)]
        )
    same = note("The same at every site that uses it:") if shared else None
    return fragment(table(["sites", *varied], rows, words=range(len(varied) + 1)), same, chips)


def settings_section(result: CheckResult) -> Html:
    parts = [fragment(element("h3", c.name), note("Model: ", element("code", c.model)), _settings(c)) for c in result.candidates]
    if result.declined:
        rows = [
            [element("td", d.get("id", "?"), class_="w"), element("td", element("code", d.get("node", "?")), class_="w long"),
             element("td", d.get("reason", "?"), class_="w long")]
            for d in result.declined
        ]  # fmt: skip
        left = fragment(
            element(
                "p",
                "These sites were not rewritten, because something about them was not proved from the graph. They run as in the original.",
            ),
            table(["site", "node", "reason"], rows, words=(0, 1, 2)),
        )
    else:
        left = element("p", "None: every attention site that was found was rewritten.")
    return section("Settings", parts, element("h3", "Sites left as they were"), left)


def limits_section() -> Html:
    lines = [
        "The seconds are wall time of this check on the machine named below. Where ONNX Runtime runs the operator's function body, it "
        "computes every score and then masks most of them: these seconds say nothing about the speed of a GPU kernel. Density says how "
        "much work a kernel may skip.",
        "The figures hold for this model, these prompts and these lengths. A longer prompt or another kind of text is another measurement.",
        "Needles are synthetic. They show whether far facts stay reachable, not how well the model reasons about them.",
        "Alpha is a target for the sampled mass, not a promise about every row: the worst row's CRA can be far below it.",
    ]
    return section("What this report does not show", element("ul", [element("li", line, class_="note") for line in lines]))


def repeat_section(result: CheckResult) -> Html:
    facts = [
        ["full model", result.full],
        *([c.name, c.model] for c in result.candidates),
        ["machine", result.machine],
        ["seed", str(result.seed)],
    ]
    rows = [
        [element("td", a, class_="w"), element("td", element("code", b), class_="w long")]
        for a, b in [*facts, *map(list, result.versions.items())]
    ]
    body = element("table", element("tbody", [element("tr", r) for r in rows]))
    return section("To repeat it", element("pre", result.command), element("div", body, class_="scroll", tabindex="0"))
