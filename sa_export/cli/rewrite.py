"""Replace each attention site by one SampleAttention node; the weights stay in the original's data file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_export.cli.common import add_output_arguments, add_policy_arguments, add_standard_argument, default_policy, emit
from sa_export.errors import GateError

if TYPE_CHECKING:
    from graph_passes.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file")
    add_output_arguments(
        parser, "ONNX file to write, in the folder of the original so that both share its weights (default: MODEL.sa.onnx)", required=False
    )
    add_policy_arguments(parser)
    add_standard_argument(parser)
    parser.add_argument("--allow-no-match", action="store_true", help="write the file even when no site was rewritten")
    parser.add_argument(
        "--weights",
        choices=("share", "copy", "hardlink"),
        default="share",
        help="how the file reaches its weights from another folder (default share)",
    )
    parser.add_argument(
        "--lint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask TensorRT's parser what it refuses, where tensorrt or tensorrt-rtx is installed; it never fails the rewrite",
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="also write the report of every site to this file")


def run(args: argparse.Namespace) -> int:
    import json

    from graph_passes.pipeline import rewrite
    from sa_export.errors import UserError

    if args.report is not None and args.report.exists() and not args.force:
        raise UserError(f"{args.report} exists; choose another file or add --force to replace it.")
    output = args.output or args.model.with_name(args.model.stem + ".sa.onnx")
    report = rewrite(
        args.model,
        output,
        configuration(args),
        force=args.force,
        allow_no_match=args.allow_no_match,
        weights=args.weights,
        standard=args.standard,
    )
    judged = _tensorrt(report.output) if args.lint else None
    emit(
        args,
        report.as_text() + (f"\n{judged[0]}" if judged else ""),
        {**report.as_dict(), **({"tensorrt": judged[1]} if judged else {})},
    )
    if args.report is not None:
        args.report.write_text(json.dumps(report.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    if not report.ok and not args.allow_no_match:
        raise GateError("no attention site was rewritten; the list above says why (--allow-no-match writes the file all the same).")
    return 0


def _tensorrt(path: Path | None) -> tuple[str, Any] | None:
    """What the installed TensorRT says of the new model, as text and as plain values; None when none is installed."""
    from sa_export.tensorrt.lint import lint, lint_text
    from sa_export.tensorrt.runtime import installed_runtimes

    if path is None or not installed_runtimes():
        return None
    try:
        result = lint(path)
    except Exception as error:  # the model is written; a judge that stumbles must not take that back
        return f"TensorRT's parser could not be asked ({type(error).__name__}: {error})", None
    return lint_text(result), result.as_dict()


def configuration(args: argparse.Namespace) -> Config:
    """attention.yaml (`--config`) with the options of the command line over its defaults."""
    import dataclasses

    from graph_passes.config import Config, load_config

    config = load_config(args.config) if args.config is not None else Config()
    values = default_policy(args)
    return dataclasses.replace(config, defaults=config.defaults.replace(**values)) if values else config
