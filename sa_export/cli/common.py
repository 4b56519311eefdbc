"""Argument groups that several verbs share, each defined once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa_export.errors import UserError

__all__ = [
    "add_check_arguments",
    "add_checkpoint_arguments",
    "add_model_arguments",
    "add_output_arguments",
    "add_policy_arguments",
    "add_report_arguments",
    "add_standard_argument",
    "add_weights_argument",
    "check_options",
    "default_policy",
    "emit",
    "progress_bar",
]


def add_output_arguments(parser: argparse.ArgumentParser, what: str, *, required: bool = True) -> None:
    """-o/--output, --force, --json, -q/--quiet."""
    parser.add_argument("-o", "--output", type=Path, required=required, metavar="PATH", help=what)
    parser.add_argument("--force", action="store_true", help="replace an output that an earlier run of this tool wrote")
    add_report_arguments(parser)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, -q/--quiet."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it is reached."""
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint: a folder, or a hub id")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings (default: refuse)")
    group.add_argument("--cache-dir", metavar="DIR", help="where hub downloads are kept")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument("--token", metavar="TOKEN", help="hub token for gated models")


def add_weights_argument(parser: argparse._ActionsContainer) -> None:
    """--weights of `export` and `attach`."""
    parser.add_argument(
        "--weights",
        choices=("auto", "reference", "hardlink", "copy"),
        default="auto",
        help="where the weights are: in the checkpoint's files when its folder is the output (reference), in hard links to them, "
        "or in a copy (default auto: reference, else a clone, a hard link above 2 GiB, a copy below)",
    )


def add_standard_argument(parser: argparse.ArgumentParser) -> None:
    """--standard of `rewrite` and `convert`."""
    parser.add_argument(
        "--standard",
        action="store_true",
        help="write ONNX Runtime's other operators (com.microsoft) as standard ones too, as TensorRT's parser needs",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is exported and how."""
    add_checkpoint_arguments(parser)
    group = parser.add_argument_group("export")
    group.add_argument(
        "--dtype",
        "--precision",
        default=None,
        metavar="TYPE",
        help="fp32, fp16 or bf16, baked into the file (default: the checkpoint's own)",
    )
    group.add_argument("--opset", type=int, default=20, help="ONNX opset, 18 to 24 (default 20)")
    group.add_argument(
        "--attention",
        choices=("sdpa", "eager", "sample"),
        default="sdpa",
        help="how the exported graph computes attention; sample writes one SampleAttention node a layer (default sdpa)",
    )
    group.add_argument(
        "--logits",
        choices=("all", "last"),
        default="all",
        help="logits of all positions, or of the last real token of each item (long prompts)",
    )
    group.add_argument("--random-weights", action="store_true", help="ignore the weights: test the model's shape from its config alone")
    group.add_argument("--from-config", action="store_true", help="no weights at all: a model of any size from its config alone")
    group.add_argument("--num-layers", type=int, metavar="N", help="with --random-weights or --from-config: only the first N layers")
    add_weights_argument(group)
    group.add_argument("--single-file", action="store_true", help="weights inside model.onnx (below 2 GiB)")
    group.add_argument("--no-verify", action="store_true", help="do not compare the export with the torch model")


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Shortcuts for the defaults of attention.yaml."""
    group = parser.add_argument_group("selection (defaults for every site; docs/op.md explains them)")
    group.add_argument("--config", type=Path, metavar="YAML", help="attention.yaml, as inspect writes it")
    group.add_argument("--policy", metavar="NAME", help="residue, tile, column_slash, stripe_window or dense")
    group.add_argument("--alpha", type=float, metavar="A", help="share of attention to keep, in (0, 1]; 1 is full attention")
    for name, text in (
        ("stride", "residue: one key in STRIDE is looked at"),
        ("sample-rows", "tile: sampled rows of each query tile; column_slash: tail rows of each segment"),
        ("block-k", "keys of a block"),
        ("window", "tokens before each tile that are always kept"),
        ("sink", "first tokens that are always kept"),
        ("dense-rows", "last rows of the prompt that attend to everything"),
        ("min-length", "shorter contexts use full attention"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)


def default_policy(args: argparse.Namespace) -> dict[str, Any]:
    """The attributes given on the command line, by their names in attention.yaml."""
    names = ("policy", "alpha", "stride", "sample_rows", "block_k", "window", "sink", "dense_rows", "min_length")
    values = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if "alpha" in values and values.get("policy") == "column_slash":
        values["alpha_slash"] = values["alpha"]
    return values


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run and which thresholds decide."""
    run = parser.add_argument_group("what is run")
    run.add_argument("--lengths", type=int, nargs="+", default=[4096], metavar="N", help="prompt lengths in tokens (default 4096)")
    run.add_argument("--prompts", type=int, default=10, metavar="N", help="prompts of each length (default 10)")
    run.add_argument("--needles", type=int, default=20, metavar="N", help="needles of each prompt (default 20)")
    run.add_argument("--greedy-tokens", type=int, default=32, metavar="N", help="tokens of the continuation that is compared (default 32)")
    run.add_argument(
        "--probed-prompts",
        type=int,
        default=1,
        metavar="N",
        help="prompts on which CRA and the error of every site are measured (default 1)",
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--text", type=Path, metavar="FILE", help="filler text of the prompts (default: Python's standard library)")
    run.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of tokenizer and config.json (default: beside the model)")
    gates = parser.add_argument_group("gates (exit status 1 when one is missed)")
    gates.add_argument(
        "--min-recall", type=float, default=0.99, metavar="X", help="least share of full attention's recalled needles (default 0.99)"
    )
    gates.add_argument("--max-loss", type=float, default=0.005, metavar="X", help="largest relative rise of the loss (default 0.005)")
    gates.add_argument(
        "--min-top1", type=float, default=0.93, metavar="X", help="least share of positions with the same arg max (default 0.93)"
    )
    gates.add_argument("--max-kl", type=float, default=0.06, metavar="X", help="largest mean KL divergence, nats a token (default 0.06)")
    gates.add_argument("--max-density", type=float, default=1.0, metavar="X", help="largest mean density (default 1: not gated)")


def check_options(args: argparse.Namespace) -> Any:
    """`CheckOptions` from the arguments of `add_check_arguments`; one sentence for values that make no sense."""
    from sa_export.check.quality import Thresholds
    from sa_export.check.run import CheckOptions

    for name, low in (("prompts", 1), ("needles", 0), ("greedy_tokens", 0), ("probed_prompts", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed is an integer >= {low}.")
    if min(args.lengths) < 64:
        raise UserError(f"--lengths has {min(args.lengths)}; allowed are lengths of at least 64 tokens.")
    text = None
    if args.text is not None:
        try:
            text = args.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--text {args.text} cannot be read as UTF-8 text ({error.__class__.__name__}); give a plain text file."
            ) from None
    return CheckOptions(
        lengths=tuple(dict.fromkeys(args.lengths)),
        prompts=args.prompts,
        needles=args.needles,
        greedy_tokens=args.greedy_tokens,
        probed_prompts=args.probed_prompts,
        seed=args.seed,
        thresholds=Thresholds(args.min_recall, args.max_loss, args.min_top1, args.max_kl, args.max_density),
        text=text,
    )


def emit(args: argparse.Namespace, text: str, value: Any) -> None:
    """The result on standard output: text for people, or `value` as JSON."""
    print(json.dumps(value, indent=1, default=str) if args.json else text)


def progress_bar(args: argparse.Namespace) -> Callable[[str, float | None], None]:
    """A callable (what is being done, share of it or None) that draws a bar on a terminal, and a line a stage elsewhere."""
    if args.quiet:
        return lambda _what, _share: None
    if not sys.stderr.isatty():
        seen: list[str] = []

        def line(what: str, _share: float | None) -> None:
            if seen[-1:] != [what]:
                seen.append(what)
                print(f"... {what}", file=sys.stderr, flush=True)

        return line

    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def draw(what: str, share: float | None) -> None:
        bar = bars.get("bar")
        if bar is None:
            bar = bars["bar"] = tqdm(
                total=100, bar_format="{desc:<40.40} {percentage:3.0f}%|{bar}| {elapsed}", leave=False, file=sys.stderr
            )
        bar.set_description_str(what, refresh=False)
        if share is not None:
            bar.n = round(100 * min(max(share, 0.0), 1.0))
        bar.refresh()

    return draw
