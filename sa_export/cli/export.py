"""Export a Hugging Face causal LM to ONNX, with its KV cache, and compare the file with the torch model on the spot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sa_export.cli.common import add_model_arguments, add_output_arguments, emit, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_output_arguments(parser, "folder to make")


def run(args: argparse.Namespace) -> int:
    result = export(args, args.output, progress_bar(args))
    emit(args, summary(result), as_dict(result))
    return 0


def export(args: argparse.Namespace, output: Path, progress: Any, may_replace: tuple[str, ...] = ()) -> Any:
    """Loads and exports what the model arguments name; also the first step of `convert`."""
    from sa_export.hf.export import check_options, check_output, export_onnx
    from sa_export.hf.load import load_checkpoint

    # Refused before time is spent on loading.
    check_output(Path(output).expanduser().absolute(), Path(args.model).expanduser(), force=args.force, may_replace=may_replace)
    check_options(args.opset, args.attention, args.logits, args.weights, single_file=args.single_file)
    checkpoint = load_checkpoint(
        args.model,
        dtype=args.dtype,
        cache_dir=args.cache_dir,
        revision=args.revision,
        token=args.token,
        trust_remote_code=args.trust_remote_code,
        random_weights=args.random_weights,
        from_config=args.from_config,
        deferred=True,
        num_layers=args.num_layers,
        progress=progress,
    )
    return export_onnx(
        checkpoint,
        output,
        opset=args.opset,
        attention=args.attention,
        logits=args.logits,
        single_file=args.single_file,
        weights=args.weights,
        force=args.force,
        may_replace=may_replace,
        verify=not args.no_verify,
        progress=progress,
    )


def summary(result: Any) -> str:
    lines = [
        f"{result.model_path}: {result.parameters / 1e6:.2f} M parameters, {result.dtype}, opset {result.opset}, attention {result.attention}, logits {result.logits}"
    ]
    if result.weights.how == "none":
        lines.append("no weights yet: inspect and rewrite work, sa-export attach adds them")
    elif result.verification is None and not any(note.startswith("Not compared") for note in result.notes):
        lines.append("not compared with the torch model (--no-verify)")
    if result.verification is not None:
        for case in result.verification.as_dict()["cases"]:
            lines.append("  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in case.items()))
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)


def as_dict(result: Any) -> dict[str, Any]:
    import json

    return dict(json.loads((result.folder / "export.json").read_text(encoding="utf-8")), folder=str(result.folder))
