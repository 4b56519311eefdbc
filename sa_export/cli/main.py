"""Entry point of `sa-export`: dispatch, errors to one sentence, exit status (0 ok, 1 gate failed, 2 usage or bad input)."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence

VERBS = ("convert", "export", "attach", "inspect", "rewrite", "check", "build", "plot", "bench", "doctor")

EPILOG = """exit status: 0 ok, 1 a gate failed (or nothing was rewritten), 2 wrong usage or input

the usual way, in one verb:   sa-export convert --model DIR_OR_HUB_ID --output out
step by step:                 export -> inspect -> (edit attention.yaml) -> rewrite -> check
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; importing the verbs' modules imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="sa-export",
        description="Exports a Hugging Face LLM to ONNX, rewrites its attention into SampleAttention, and proves the result against full attention.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name in VERBS:
        module = importlib.import_module(f"sa_export.cli.{name}")
        text = (module.__doc__ or "").strip()
        verb = verbs.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit status."""
    arguments = [_hyphens(a) for a in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.version:
        from sa_export.versions import installed

        print(f"sa-export {installed('sa-export') or '(not installed)'}")
        return 0
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2

    from graph_passes.errors import GraphError
    from sa_export.errors import GateError, UserError

    args.command = shlex.join(["sa-export", *arguments])
    try:
        return int(args.run(args))
    except (UserError, GraphError) as error:
        print(f"sa-export {args.verb}: {error}", file=sys.stderr)
        return 2
    except GateError as error:
        print(f"sa-export {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sa-export {args.verb}: interrupted; nothing half-written was kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _hyphens(argument: str) -> str:
    """`--max_seq_len=x_y` -> `--max-seq-len=x_y`: options may be spelled either way, values stay."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
