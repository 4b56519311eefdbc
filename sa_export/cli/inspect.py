"""List every attention site of an ONNX model: what would be rewritten, what is declined and why.

With -o the sites go to an attention.yaml that can be edited and given to rewrite."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_export.cli.common import add_output_arguments, add_policy_arguments, emit

_ALL = "*"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", help="ONNX file")
    add_output_arguments(parser, "attention.yaml to write", required=False)
    add_policy_arguments(parser)
    parser.add_argument(
        "--explain",
        nargs="?",
        const=_ALL,
        metavar="SITE",
        help="what was proved of the sites, and for declined ones (or the one of this id) how far the pattern was found and what stopped it",
    )
    parser.add_argument("--explain-output", type=Path, metavar="ONNX", help="also save the nodes around the declined SITE for a viewer")


def run(args: argparse.Namespace) -> int:
    from graph_passes.config import write_config
    from graph_passes.explain import explain, write_cut_out
    from graph_passes.pipeline import inspect
    from sa_export.cli.rewrite import configuration
    from sa_export.errors import UserError

    if args.model is None and args.explain not in (None, _ALL):  # `inspect --explain model.onnx`
        args.model, args.explain = Path(args.explain), _ALL
    if args.model is None:
        raise UserError("no model was given; give the path of an ONNX file.")
    config = configuration(args)
    report = inspect(args.model)
    text, value = report.as_text(explain=args.explain is not None), report.as_dict()
    if args.explain is not None or args.explain_output is not None:
        found = explain(args.model, report, None if args.explain in (None, _ALL) else args.explain)
        text += "".join(f"\n{e.as_text()}\n" for e in found)
        value["explained"] = [e.as_dict() for e in found]
        if args.explain_output is not None:
            if not found:
                raise UserError(f"{args.model.name} has no declined site; there is nothing to cut out.")
            write_cut_out(args.model, found[0], args.explain_output, force=args.force)
            text += f"\nwritten: {args.explain_output} ({found[0].site.id})"
    if args.output is not None:
        write_config(args.output, report.sites, config.defaults, declined=report.declined, force=args.force)
        text += f"\nwritten: {args.output}"
    emit(args, text, value)
    return 0 if report.ok else 1
