"""Judges every frozen graph and writes docs/families.md: families by exporters, what is rewritten, what is declined and why, and equality.

    python -m tests.data.table                              # two minutes
    python -m tests.data.table --rtx --plugin LIBRARY       # and whether TensorRT-RTX's parser takes the rewritten graphs

The second needs the tensorrt_rtx wheel and the built plugin library; without it the section of the last such run stays as it is.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.data import truth
from tests.data.families import FAMILIES, FULL, HEAD_SIZE
from tests.data.frozen import GRAPHS, Frozen, frozen, read_manifest, thaw
from tests.data.judge import SITUATIONS, Judgement, judge, tolerance
from tests.data.make import NARROW, ROUTES, WIDE
from tests.data.routes import handwritten

__all__ = ["main"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
RTX_ROUTES = ("dynamo-sdpa-20", "optimum", "genai-fp32-cpu")
_START, _END = "<!-- rtx -->", "<!-- end of rtx -->"

_TITLES = {
    "dynamo-sdpa-20": "torch.onnx dynamo, sdpa, 20",
    "torchscript-eager-18": "TorchScript, eager, 18",
    "optimum": "optimum-onnx",
    "genai-fp32-cpu": "onnxruntime-genai, fp32 CPU",
}
_SHORT = {**{kind: kind for kind in truth.REASONS}, "alibi": "ALiBi"}


@dataclass(frozen=True)
class Row:
    """What is said of one graph."""

    graph: Frozen
    kinds: tuple[str, ...]
    rewritten: int
    wrong: int
    """Layers that are full causal and declined, or not and rewritten."""
    result: Judgement

    @property
    def full(self) -> int:
        return self.kinds.count(FULL)

    @property
    def cell(self) -> str:
        others = list(dict.fromkeys(" + ".join(_SHORT[p] for p in k.split("+")) for k in self.kinds if k != FULL))
        text = f"{self.rewritten}/{len(self.kinds)}" + (f" ({', '.join(others)})" if others else "")
        if self.wrong:
            text += f" **{self.wrong} wrongly**"
        if not self.rewritten:
            return text
        if not self.compared:
            return text + ", not run"
        worst = f"{self.result.worst:.0e}" if self.result.worst else "0"
        return f"{text}, {worst}" if self.result.equal else f"{text}, **{self.result.broken or worst}**"

    @property
    def compared(self) -> bool:
        """Some call ran on both graphs."""
        return any(not d.skipped for d in self.result.differences)


def look(graph: Frozen) -> Row:
    """Judges one graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(thaw(graph.path))
        result = judge(path, head_size=FAMILIES[graph.family].head_size if graph.family in FAMILIES else HEAD_SIZE)
    kinds = truth.layers(graph.route, graph.family)
    sites = {s.id for s in result.report.inspection.sites}
    wrong = sum((kind == FULL) != (f"layers.{i}" in sites) for i, kind in enumerate(kinds))
    return Row(graph, kinds, result.report.rewritten, wrong, result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.data.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--graphs", type=Path, default=GRAPHS, help="another folder of frozen graphs")
    parser.add_argument("--rtx", action="store_true", help="also run TensorRT-RTX's parser")
    parser.add_argument("--plugin", type=Path, help="the TensorRT plugin library, for --rtx")
    given = parser.parse_args(arguments)
    if given.rtx and given.plugin is None:
        parser.error("--rtx needs --plugin LIBRARY")
    rows = []
    for graph in frozen(given.graphs):
        rows.append(look(graph))
        print(f"{graph.id}: {rows[-1].cell}", flush=True)
    manifest = read_manifest(given.graphs)
    rtx = list(_rtx(given.graphs, given.plugin.absolute())) if given.rtx else _kept(given.output)
    given.output.write_text(
        "\n".join([*_head(rows), *_wide(rows, manifest), *_narrow(rows), *_hand(rows), *_changes(), *rtx, *_runs(manifest)]) + "\n"
    )
    print(f"{given.output}")
    return 1 if any(r.wrong or not r.result.equal for r in rows) else 0


def _head(rows: Sequence[Row]) -> Iterable[str]:
    full, done = sum(r.full for r in rows), sum(r.rewritten for r in rows)
    ran = sum(r.compared for r in rows)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("onnx", "onnxruntime"))
    families = {r.graph.family for r in rows} & set(FAMILIES)
    yield "# Families and exporters"
    yield ""
    yield (
        f"Written by `python -m tests.data.table` on {datetime.date.today().isoformat()} with {versions}, from the {len(rows)} frozen graphs in "
        f"`tests/data/graphs`: {len(families)} families of tiny random models, {len({r.graph.route for r in rows})} export routes. "
        f"{done} of {full} full-causal layers are rewritten; {ran} graphs were run beside their originals in ONNX Runtime on a CPU."
    )
    yield ""
    yield (
        "A cell: layers rewritten / attention layers (why the others are declined), and the largest difference from the original file at alpha 1, as a share of the largest "
        f"magnitude, over {'; '.join(SITUATIONS)} (as far as the graph's inputs allow). Allowed are {tolerance(False):g} in float32 and {tolerance(True):g} in float16. "
        "`-`: the exporter does not make this model. *not run*: ONNX Runtime does not run the original on a CPU."
    )


def _wide(rows: Sequence[Row], manifest: dict) -> Iterable[str]:
    cells = {(r.graph.route, r.graph.family): r.cell for r in rows}
    yield from ("", "## Every family", "")
    yield from _table(
        ["family", *(_TITLES[r] for r in WIDE)],
        (
            [name + (f" ({family.like})" if family.like else ""), *(cells.get((route, name), "-") for route in WIDE)]
            for name, family in FAMILIES.items()
            if not family.routes
        ),
    )
    yield from ("", "## Further families", "", "Frozen of one route each, for what is particular to their attention.", "")
    own = [(name, route) for name, family in FAMILIES.items() for route in family.routes]
    yield from _table(["family", "route", "result"], ([name, route, cells.get((route, name), "-")] for name, route in own))


def _narrow(rows: Sequence[Row]) -> Iterable[str]:
    cells = {(r.graph.route, r.graph.family): r.cell for r in rows}
    names = [r for r in ROUTES if ROUTES[r] is not handwritten]
    yield from (
        "",
        "## Every route",
        "",
        "`python -m tests.data.make --list` says what each route is called with; `tests/data/routes` how.",
        "",
    )
    yield from _table(["route", *NARROW], ([route, *(cells.get((route, f), "-") for f in NARROW)] for route in names))


def _hand(rows: Sequence[Row]) -> Iterable[str]:
    yield from ("", "## Written by hand", "")
    yield from _table(["graph", "result"], ([r.graph.family, r.cell] for r in rows if r.graph.route == "handwritten"))


def _changes() -> Iterable[str]:
    yield from ("", "## Where the exporter changed the model", "", "The file counts, not the name of the model:", "")
    for (route, family), (_, why) in truth.CHANGED.items():
        yield f"- {route}, {family}: {why}."


def _rtx(folder: Path, plugin: Path) -> Iterable[str]:
    from graph_passes.pipeline import rewrite
    from sa_export.tensorrt.child import run_task
    from tests.data.judge import EXACT

    results: dict[tuple[str, str], str] = {}
    version = ""
    for graph in frozen(folder):
        if graph.route not in RTX_ROUTES:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.onnx"
            path.write_bytes(thaw(graph.path))
            twin = path.with_suffix(".sa.onnx")
            report = rewrite(path, twin, EXACT, allow_no_match=True, standard=True)
            answer = run_task("tensorrt_rtx", "parse", {"model": str(twin), "plugin": str(plugin)})
        version = answer.result.get("version", version)
        results[graph.route, graph.family] = _verdict(answer, report.rewritten)
        print(f"RTX {graph.id}: {results[graph.route, graph.family]}", flush=True)
    yield from ("", _START, "## TensorRT-RTX's parser", "")
    yield (
        f"TensorRT-RTX {version} with the plugin library, {datetime.date.today().isoformat()}: does its parser take the rewritten graph (`rewrite --standard`), every `SampleAttention` node as a plugin layer? "
        "If not, the operator of the first node that stops it (no importer for it, and no plugin of that name). `(0)`: nothing was rewritten, the graph is the original."
    )
    yield ""
    named = [name for name in FAMILIES if any((route, name) in results for route in RTX_ROUTES)]
    yield from _table(["family", *RTX_ROUTES], ([name, *(results.get((route, name), "-") for route in RTX_ROUTES)] for name in named))
    yield _END


def _verdict(answer: object, rewritten: int) -> str:
    result, error = answer.result, answer.error  # type: ignore[attr-defined]
    if error:
        return error
    if result["ok"] and result["plugin_layers"] == rewritten:
        return "yes" if rewritten else "yes (0)"
    if result["ok"]:
        return f"{result['plugin_layers']} of {rewritten} nodes as plugin layers"
    return f"no: {result['errors'][0]['op'] if result['errors'] else 'no reason given'}"


def _kept(page: Path) -> list[str]:
    """The section of an earlier run."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if _START not in text:
        return []
    return ["", _START + text.split(_START)[1].split(_END)[0] + _END]


def _runs(manifest: dict) -> Iterable[str]:
    made: dict[tuple[str, str], list[str]] = {}
    failed: dict[str, dict[str, list[str]]] = {}
    for route, entry in manifest.items():
        made.setdefault((", ".join(f"{k} {v}" for k, v in entry["packages"].items()), entry["date"]), []).append(route)
        for family, why in entry["not exported"].items():
            failed.setdefault(route, {}).setdefault(why, []).append(family)
    yield from ("", "## Versions", "")
    yield from _table(["routes", "made with", "on"], ([", ".join(routes), *key] for key, routes in made.items()))
    yield from ("", "## What a route does not export", "", "In the exporter's words:", "")
    for route, reasons in failed.items():
        for why, which in reasons.items():
            yield f"- {route}, {', '.join(which)}: {why}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    sys.exit(main())
