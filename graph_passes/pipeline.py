"""The two verbs on a model file: `inspect` lists its attention sites, `rewrite` replaces them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from graph_passes import external_data, in_memory, model_io, opset
from graph_passes.config import Config, load_config
from graph_passes.errors import GraphError
from graph_passes.op import Policy
from graph_passes.passes.expand import MICROSOFT
from graph_passes.report import InspectReport, RewriteReport

__all__ = ["inspect", "rewrite"]

logger = logging.getLogger(__name__)


@dataclass
class _Opened:
    """A model, of an opset that has bodies unless `not_raised` says why it cannot be, and what was found in it."""

    model: onnx.ModelProto
    not_raised: GraphError | None
    found: in_memory.Examined
    report: InspectReport


def inspect(path: str | Path) -> InspectReport:
    """Lists every attention of a model. Weights are not read. Opsets 11 to 17 are looked at as `opset` raises them.

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
    standard: bool = False,
) -> RewriteReport:
    """Replaces each attention site of a model by one `SampleAttention` node. Weights are neither read nor copied unless asked.

    A model of opset 11 to 17 is raised to 18 on the way, or refused where it would not compute the same.

    Args:
        path: an ONNX model.
        out: the new model.
        config: what each site gets, or a path of `attention.yaml`; None is the default policy for every site.
        force: replace an existing file.
        allow_no_match: write the model even when no site is rewritten.
        weights: how the new model reaches its external weights from another folder, see `external_data.WEIGHTS`.
        standard: write the other operators of ONNX Runtime (`com.microsoft`) as standard ones too, where a rule for them exists.

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
    if opened.not_raised is not None and policies:
        raise opened.not_raised
    model = _rewritten(opened, policies, standard) if policies or standard else model_io.load(path)
    model_io.check_structure(model, opened.model)
    made = external_data.place(model, path.parent, out.parent, weights)
    try:
        model_io.write(model, out)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        raise
    locations = tuple(dict.fromkeys(item.location for item in external_data.external_tensors(model)))
    return RewriteReport(
        opened.report, policies, skipped, out, locations, opened.report.nodes, len(model.graph.node), opset.opset_of(model)
    )


def _open(path: Path) -> _Opened:
    model = model_io.load(path)
    version, nodes, not_raised = opset.opset_of(model), len(model.graph.node), None
    try:
        opset.raise_opset(model)
    except GraphError as error:
        not_raised = error
    graph = model_io.import_graph(model)
    found = in_memory.examine(graph, path.parent, model.functions)
    return _Opened(model, not_raised, found, InspectReport(path, version, nodes, found.sites, found.declined, str(not_raised or "")))


def _rewritten(opened: _Opened, policies: Mapping[str, Policy], standard: bool) -> onnx.ModelProto:
    from graph_passes import body

    in_memory.replace(opened.found, policies, standard=standard)
    model = model_io.export_graph(opened.found.graph, opened.model)
    model_io.drop_import(model, MICROSOFT)
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
