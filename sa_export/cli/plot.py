"""Draw the report and its pictures again from a check's check.json and check.npz."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_export.cli.common import add_report_arguments, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", type=Path, help="folder of a check, or its check.json")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write to (default: beside check.json)")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from sa_export.report import render

    path = render(args.check, args.output, args.force)
    emit(args, str(path), {"report": str(path)})
    return 0
