"""All in one: export, inspect, rewrite and check, into one folder with an HTML report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sa_export.cli.common import (
    add_check_arguments,
    add_model_arguments,
    add_output_arguments,
    add_policy_arguments,
    add_standard_argument,
    check_options,
    emit,
    progress_bar,
)
from sa_export.errors import GateError, UserError

PAPER_POLICIES: dict[str, dict[str, Any]] = {
    # The published settings, with one selection a head: shown beside the chosen policy, they decide nothing.
    "column_slash": {"policy": "column_slash", "alpha": 0.95, "alpha_slash": 0.95, "sample_rows": 64, "segment": 2048, "dense_rows": 0},
    "stripe_window": {"policy": "stripe_window", "alpha": 0.95, "sample_ratio": 0.05, "window_ratio": 0.08, "dense_rows": 128},
}
_OWN_FILES = ("attention.yaml", "model*.sa.onnx", "rewrite.json", "check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_output_arguments(parser, "folder to make")
    add_policy_arguments(parser)
    add_standard_argument(parser)
    add_check_arguments(parser)
    parser.add_argument(
        "--compare-papers", action="store_true", help="also check the policies of the SampleAttention papers, for comparison"
    )
    parser.add_argument("--no-check", action="store_true", help="stop after rewriting")


def run(args: argparse.Namespace) -> int:
    from graph_passes.config import Config, write_config
    from graph_passes.op import Policy
    from graph_passes.pipeline import inspect, rewrite
    from sa_export.check.run import Subject, refuse_early, run_check
    from sa_export.cli.export import export, summary
    from sa_export.cli.rewrite import configuration
    from sa_export.report import text_table

    options = check_options(args)
    config = configuration(args)
    if args.logits != "all" and not args.no_check:
        raise UserError("--logits last leaves nothing to check but the last token; add --no-check, or export with --logits all.")
    if args.from_config and not args.no_check:
        raise UserError("--from-config leaves nothing to check before weights are attached; add --no-check.")
    if not args.no_check and Path(args.model).is_dir():  # minutes before the check itself would say so
        refuse_early(args.tokenizer or Path(args.model), options)
    progress = progress_bar(args)
    exported = export(args, args.output, progress, may_replace=_OWN_FILES)
    folder, model = exported.folder, exported.model_path
    text = [summary(exported)]

    progress("find attention sites", None)
    found = inspect(model)
    overrides = {entry.id: {**entry.overrides, **({"skip": True} if entry.skip else {})} for entry in config.entries}
    write_config(folder / "attention.yaml", found.sites, config.defaults, declined=found.declined, overrides=overrides)
    report = rewrite(model, folder / "model.sa.onnx", config, standard=args.standard)
    if not report.ok:
        raise GateError(f"no attention site was rewritten:\n{report.as_text()}")
    subjects = [Subject(config.defaults.policy, folder / "model.sa.onnx")]
    for name, values in PAPER_POLICIES.items() if args.compare_papers else ():
        output = folder / f"model.{name}.sa.onnx"
        rewrite(model, output, Config(defaults=Policy(min_length=config.defaults.min_length, **values)), standard=args.standard)
        subjects.append(Subject(f"{name} (paper)", output, gated=False))
    (folder / "rewrite.json").write_text(json.dumps(report.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    text.append(report.as_text())
    if args.no_check:
        emit(args, "\n".join(text), {"folder": str(folder), "rewrite": report.as_dict()})
        return 0

    declined = [{"id": d.id, "node": d.node, "reason": d.reason} for d in found.declined]
    result = run_check(
        model,
        subjects,
        folder / "check",
        options,
        tokenizer_folder=args.tokenizer,
        declined=declined,
        command=args.command,
        progress=progress,
    )
    text += ["", text_table(result), f"report: {folder / 'check' / 'report.html'}"]
    emit(args, "\n".join(text), {"folder": str(folder), "rewrite": report.as_dict(), "check": result.to_dict()})
    if not result.ok:
        raise GateError(f"the check was not passed; {folder / 'check' / 'report.html'} shows which gate and where.")
    return 0
