"""Replace each attention site by one SampleAttention node; the weights stay in the original's data file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sa_export.cli.common import add_output_arguments, add_policy_arguments, default_policy, emit
from sa_export.errors import GateError

if TYPE_CHECKING:
    from graph_passes.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file")
    add_output_arguments(
        parser, "ONNX file to write, in the folder of the original so that both share its weights (default: MODEL.sa.onnx)", required=False
    )
    add_policy_arguments(parser)
    parser.add_argument("--allow-no-match", action="store_true", help="write the file even when no site was rewritten")
    parser.add_argument(
        "--weights",
        choices=("share", "copy", "hardlink"),
        default="share",
        help="how the file reaches its weights from another folder (default share)",
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="also write the report of every site to this file")


def run(args: argparse.Namespace) -> int:
    import json

    from graph_passes.pipeline import rewrite
    from sa_export.errors import UserError

    if args.report is not None and args.report.exists() and not args.force:
        raise UserError(f"{args.report} exists; choose another file or add --force to replace it.")
    output = args.output or args.model.with_name(args.model.stem + ".sa.onnx")
    report = rewrite(args.model, output, configuration(args), force=args.force, allow_no_match=args.allow_no_match, weights=args.weights)
    emit(args, report.as_text(), report.as_dict())
    if args.report is not None:
        args.report.write_text(json.dumps(report.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    if not report.ok and not args.allow_no_match:
        raise GateError("no attention site was rewritten; the list above says why (--allow-no-match writes the file all the same).")
    return 0


def configuration(args: argparse.Namespace) -> Config:
    """attention.yaml (`--config`) with the options of the command line over its defaults."""
    import dataclasses

    from graph_passes.config import Config, load_config

    config = load_config(args.config) if args.config is not None else Config()
    values = default_policy(args)
    return dataclasses.replace(config, defaults=config.defaults.replace(**values)) if values else config
