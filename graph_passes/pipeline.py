"""The two verbs on a model file: `inspect` lists its attention sites, `rewrite` replaces them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from graph_passes import external_data, model_io
from graph_passes.config import Config, load_config
from graph_passes.errors import GraphError
from graph_passes.passes.remove_dead_nodes import remove_dead_nodes
from graph_passes.passes.replace_sites import replace_sites
from graph_passes.passes.reroute_shapes import reroute_shapes
from graph_passes.patterns.find import find
from graph_passes.report import InspectReport, RewriteReport
from graph_passes.symbolic.graph import SymbolicGraph

__all__ = ["inspect", "rewrite"]

logger = logging.getLogger(__name__)


@dataclass
class _Opened:
    model: onnx.ModelProto
    graph: gs.Graph
    symbolic: SymbolicGraph
    report: InspectReport


def inspect(path: str | Path) -> InspectReport:
    """Lists every attention of a model. Weights are not read.

    Args:
        path: an ONNX model.

    Raises:
        GraphError: the file is missing, is no ONNX model, or lacks weights.
    """
    return _open(Path(path)).report


def rewrite(
    path: str | Path,
    out: str | Path,
    config: Config | str | Path | None = None,
    *,
    force: bool = False,
    allow_no_match: bool = False,
    weights: str = "share",
) -> RewriteReport:
    """Replaces each attention site of a model by one `SampleAttention` node. Weights are neither read nor copied unless asked.

    Args:
        path: an ONNX model.
        out: the new model.
        config: what each site gets, or a path of `attention.yaml`; None is the default policy for every site.
        force: replace an existing file.
        allow_no_match: write the model even when no site is rewritten.
        weights: how the new model reaches its external weights from another folder, see `external_data.WEIGHTS`.

    Returns:
        The report; `report.ok` is false when no site was rewritten, and then nothing is written without `allow_no_match`.

    Raises:
        GraphError: something of the above cannot be used; no file is left behind.
    """
    path, out = Path(path), Path(out)
    config = config if isinstance(config, Config) else Config() if config is None else load_config(config)
    _check_output(path, out, force)
    opened = _open(path)
    sites = opened.report.sites
    policies = config.policies(sites, opened.report.declined)
    skipped = tuple(s.id for s in sites if s.id not in policies)
    report = RewriteReport(opened.report, policies, skipped, nodes_before=opened.report.nodes, nodes_after=opened.report.nodes)
    if not policies and not allow_no_match:
        return report
    model = _rewritten(opened, policies) if policies else opened.model
    model_io.check_structure(model, opened.model)
    made = external_data.place(model, path.parent, out.parent, weights)
    try:
        model_io.write(model, out)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise
    locations = tuple(dict.fromkeys(item.location for item in external_data.external_tensors(model)))
    return RewriteReport(opened.report, policies, skipped, out, locations, opened.report.nodes, len(model.graph.node))


def _open(path: Path) -> _Opened:
    model = model_io.load(path)
    graph = model_io.import_graph(model)
    symbolic = SymbolicGraph(graph, path.parent)
    sites, declined = find(symbolic, model.functions)
    return _Opened(model, graph, symbolic, InspectReport(path, graph.opset, len(graph.nodes), tuple(sites), tuple(declined)))


def _rewritten(opened: _Opened, policies: dict) -> onnx.ModelProto:
    from graph_passes import body

    chosen = [s for s in opened.report.sites if s.id in policies]
    reroute_shapes(opened.graph, opened.symbolic, chosen)
    replace_sites(opened.graph, chosen, policies)
    remove_dead_nodes(opened.graph)
    model = model_io.export_graph(opened.graph, opened.model)
    body.attach(model)
    return model


def _check_output(path: Path, out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise GraphError(f"The folder {out.parent} does not exist; make it or choose another.")
    if out.is_dir():
        raise GraphError(f"{out} is a folder; give the path of a file that ends in .onnx.")
    if out.exists():
        if path.exists() and out.samefile(path):
            raise GraphError(f"{out} is the model itself; give another output, the original stays as the reference of every check.")
        if not force:
            raise GraphError(f"{out} exists; choose another name, or pass --force to replace it.")
