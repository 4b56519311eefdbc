"""Give the weights of a checkpoint to models that were exported with --from-config, and to their rewritten versions."""

from __future__ import annotations

import argparse
from pathlib import Path

from sa_export.cli.common import add_checkpoint_arguments, add_report_arguments, add_weights_argument, emit, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="ONNX", help="models of one folder; their weights are written or linked beside them"
    )
    add_checkpoint_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the first model with the torch model")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from sa_export.hf.attach import attach_weights

    result = attach_weights(
        args.models,
        args.model,
        weights=args.weights,
        cache_dir=args.cache_dir,
        revision=args.revision,
        token=args.token,
        trust_remote_code=args.trust_remote_code,
        verify=not args.no_verify,
        progress=progress_bar(args),
    )
    lines = [f"{path}: weights attached ({result.placement.how})" for path in result.models]
    if result.verification is not None:
        worst = result.verification.worst
        lines.append(f"{result.models[0].name} compared with the torch model: worst {worst.name}, {worst.relative:.2g} of the scale")
    lines += [f"note: {note}" for note in result.notes]
    value = {
        "models": [str(path) for path in result.models],
        "weights": result.placement.as_dict(),
        "verification": result.verification.as_dict() if result.verification else None,
        "notes": list(result.notes),
    }
    emit(args, "\n".join(lines), value)
    return 0
