"""List every attention site of an ONNX model: what would be rewritten, what is declined and why.

With -o the sites go to an attention.yaml that can be edited and given to rewrite."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_export.cli.common import add_output_arguments, add_policy_arguments, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file")
    add_output_arguments(parser, "attention.yaml to write", required=False)
    add_policy_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="for declined sites, also the evidence that was found")


def run(args: argparse.Namespace) -> int:
    from graph_passes.config import write_config
    from graph_passes.pipeline import inspect
    from sa_export.cli.rewrite import configuration

    config = configuration(args)
    report = inspect(args.model)
    text = report.as_text(explain=args.explain)
    if args.output is not None:
        write_config(args.output, report.sites, config.defaults, declined=report.declined, force=args.force)
        text += f"\nwritten: {args.output}"
    emit(args, text, report.as_dict())
    return 0 if report.ok else 1
