"""Compare rewritten models with full attention on real prompts: logits, recall, loss, continuation, density and CRA.

Writes check.json, pictures and report.html; the exit status is the gate."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa_export.cli.common import add_check_arguments, add_output_arguments, check_options, emit, progress_bar
from sa_export.errors import GateError, UserError

if TYPE_CHECKING:
    from sa_export.check.run import CheckOptions, Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("full", type=Path, help="the original ONNX model (full attention)")
    parser.add_argument("rewritten", type=Path, nargs="+", help="rewritten models; NAME=FILE names one in the report")
    add_output_arguments(parser, "folder to make")
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "tensorrt", "tensorrt_rtx"),
        default="onnxruntime",
        type=lambda name: {"trt": "tensorrt", "trt_rtx": "tensorrt_rtx"}.get(name, name),
        help="with tensorrt (or trt) the rewritten models are engines of `sa-export build`, and the original may be a dense one",
    )
    add_check_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from sa_export.check.run import Subject, run_check
    from sa_export.report import text_table

    options = check_options(args)
    subjects = []
    for item in args.rewritten:
        name, equals, file = str(item).partition("=")
        path = Path(file if equals else name)
        subjects.append(Subject(name if equals else path.name.removesuffix(".onnx"), path))
    names = [s.name for s in subjects]
    if len(set(names)) < len(names):
        raise UserError(f"Two models would both be called {max(names, key=names.count)}; name them with NAME=FILE.")
    if args.runtime != "onnxruntime":
        return _engines(args, subjects, options)
    result = run_check(
        args.full,
        subjects,
        args.output,
        options,
        tokenizer_folder=args.tokenizer,
        command=args.command,
        force=args.force,
        progress=progress_bar(args),
    )
    emit(args, text_table(result) + f"\nreport: {args.output / 'report.html'}", result.to_dict())
    if not result.ok:
        raise GateError(f"the check was not passed; {args.output / 'report.html'} shows which gate and where.")
    return 0


def _engines(args: argparse.Namespace, subjects: Sequence[Subject], options: CheckOptions) -> int:
    """Engines against full attention, on a GPU."""
    import os
    from dataclasses import asdict

    # Polygraphy reads this when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(args.runtime == "tensorrt_rtx"))
    from sa_export.tensorrt.compare import compare, result_text

    results = compare(
        args.full,
        [(s.name.removesuffix(".plan"), s.model) for s in subjects],
        args.output,
        options,
        tokenizer_folder=args.tokenizer,
        force=args.force,
        progress=progress_bar(args),
    )
    text = f"{result_text(results)}\nwritten: {args.output / 'engines.json'}, {args.output / 'polygraphy.sh'}"
    emit(args, text, [asdict(r) | {"ok": r.ok} for r in results])
    if not all(r.ok for r in results):
        raise GateError("the check was not passed; the table above shows which gate and which engine.")
    return 0
