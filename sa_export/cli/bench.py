"""Time the attention op beside cuDNN and FlashAttention-2 on this machine's GPU, search included.

The inputs have planted structure (seeded), or come from a model that reads a prompt. The table goes to the terminal; with --output, CSV, JSON and a picture are kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sa_export.cli.common import add_report_arguments, emit, progress_bar
from sa_export.errors import UserError

_PRESETS = {"default": "", "tile": "policy=tile", "dense": "policy=dense"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("attention",), help="what is timed")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768, 131072], metavar="N", help="tokens (default 8192 32768 131072)"
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="SPEC",
        help="a policy to time, repeatable: default, tile, dense, or attributes of docs/op.md such as "
        "policy=tile,sample_rows=16,alpha=0.9 (default: default and tile)",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="capture queries, keys and values from this checkpoint instead of planting structure"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="with --model: the layer to capture (default: the middle one)")
    parser.add_argument("--noise", action="store_true", help="independent normal numbers instead: the worst case, nothing can be dropped")
    shape = parser.add_argument_group("shape (not with --model)")
    shape.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default 32)")
    shape.add_argument("--kv-heads", type=int, default=8, metavar="N", help="key/value heads (default 8)")
    shape.add_argument("--head-size", type=int, default=128, metavar="N", help="default 128")
    shape.add_argument("--batch", type=int, default=1, metavar="N", help="default 1")
    shape.add_argument("--stripe-share", type=float, default=0.03, metavar="X", help="share of key blocks with a stripe (default 0.03)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to make, with attention.csv, attention.json and attention.png"
    )
    parser.add_argument("--force", action="store_true", help="replace an output that an earlier run of this tool wrote")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    policies = {spec: _policy(spec) for spec in args.policy or ["default", "tile"]}
    _refuse_bad_shape(args)
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench attention needs a CUDA GPU and found none; run it on the machine that will serve the model.")
    from sa_export.bench.attention import measure_length
    from sa_export.bench.output import text_table, write_folder
    from sa_export.files import check_replaceable, staged_folder
    from sa_export.kernels import build_info

    if args.output is not None:
        check_replaceable(args.output, force=args.force, owner=_ours)
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": build_info(),
        "command": args.command,
        "policies": {name: policy.as_dict() for name, policy in policies.items()},
    }
    progress = progress_bar(args)
    rows = []
    for length in sorted(set(args.lengths)):
        rows += measure_length(_inputs(args, length), policies, progress=progress)
        torch.cuda.empty_cache()
    if args.output is not None:
        with staged_folder(args.output, force=args.force, owner=_ours) as folder:
            write_folder(folder, rows, environment)
    head = f"{environment['gpu']}, torch {environment['torch']}, cuDNN {environment['cudnn']}; {rows[0].source}"
    emit(args, f"{head}\n{text_table(rows)}", {"environment": environment, "rows": [r.to_dict() for r in rows]})
    return 0


def _ours(folder: Path) -> set[str] | None:
    names = {"attention.csv", "attention.json", "attention.png"}
    return names if (folder / "attention.json").is_file() else None


def _inputs(args: argparse.Namespace, length: int) -> Any:
    import torch

    from sa_export.bench import inputs

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    if args.model is not None:
        return inputs.captured(args.model, length, layer=args.layer, dtype=dtype, device="cuda", seed=args.seed)
    shape = {"heads": args.heads, "kv_heads": args.kv_heads, "head_size": args.head_size, "batch": args.batch}
    if args.noise:
        return inputs.noise(length, **shape, dtype=dtype, device="cuda", seed=args.seed)
    return inputs.planted(length, **shape, dtype=dtype, device="cuda", seed=args.seed, stripe_share=args.stripe_share)


def _policy(spec: str) -> Any:
    """The policy that a specification names."""
    from graph_passes.op import Policy

    values: dict[str, Any] = {}
    for item in filter(None, _PRESETS.get(spec, spec).split(",")):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals or name not in Policy.__dataclass_fields__ or name.startswith("_"):
            raise UserError(
                f"--policy {spec}: {item!r} is no attribute of a policy; "
                f"allowed are {', '.join(_PRESETS)} or NAME=VALUE pairs such as policy=tile,sample_rows=16."
            )
        try:
            values[name] = text if name == "policy" else json.loads(text)
        except ValueError:
            raise UserError(f"--policy {spec}: {name} is {text!r}; give a number.") from None
    return Policy(**values)


def _refuse_bad_shape(args: argparse.Namespace) -> None:
    for name in ("heads", "kv_heads", "head_size", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed is an integer >= 1.")
    if args.heads % args.kv_heads:
        raise UserError(f"--heads is {args.heads}, which is no multiple of --kv-heads {args.kv_heads}; give a multiple.")
    if min(args.lengths) < 256:
        raise UserError(f"--lengths has {min(args.lengths)}; allowed are lengths of at least 256 tokens.")
    if not 0 < args.stripe_share <= 1:
        raise UserError(f"--stripe-share is {args.stripe_share}; allowed is a number in (0, 1].")
    if args.model is not None and args.noise:
        raise UserError("--model and --noise were both given; choose where the inputs come from.")
    if args.layer is not None and args.model is None:
        raise UserError("--layer goes with --model; give the checkpoint to capture from.")
