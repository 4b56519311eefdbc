"""Build a TensorRT engine of a (rewritten) model, with profiles for prefill, chunked prefill and decode.

Prints the equal trtexec and polygraphy commands. --dense builds full attention from the same file, for comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sa_export.cli.common import add_output_arguments, emit, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, as rewrite writes it")
    add_output_arguments(parser, "engine to write (default: MODEL.plan); OUTPUT.json beside it describes it", required=False)
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and the commands, build nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what TensorRT printed")
    group = parser.add_argument_group("what the engine takes")
    group.add_argument("--max-batch-size", type=int, default=1, metavar="N", help="sequences of a call (default 1)")
    group.add_argument("--max-seq-len", type=int, default=4096, metavar="N", help="tokens of a sequence, answer included (default 4096)")
    group.add_argument("--opt-batch-size", type=int, metavar="N", help="batch that the engine is tuned for (default 1)")
    group.add_argument("--opt-seq-len", type=int, metavar="N", help="prompt that the engine is tuned for (default: half of --max-seq-len)")
    group.add_argument(
        "--max-chunk-len", type=int, metavar="N", help="tokens of a call that goes on with a cache (default: 2048, at most --max-seq-len)"
    )
    group = parser.add_argument_group("how it is built")
    group.add_argument(
        "--runtime",
        choices=("tensorrt", "tensorrt_rtx"),
        default="tensorrt",
        help="tensorrt builds for the GPU at hand; tensorrt_rtx (GeForce RTX) needs no GPU (default tensorrt)",
    )
    group.add_argument(
        "--plugin", type=Path, metavar="FILE", help="plugin library (default: SA_EXPORT_TENSORRT_PLUGIN, or the installed one)"
    )
    group.add_argument("--dense", choices=("native", "decomposed"), help="full attention instead: ONNX Attention, or MatMul-Softmax-MatMul")
    group.add_argument("--dense-onnx", type=Path, metavar="FILE", help="with --dense: keep the ONNX model that is built")
    group.add_argument(
        "--compute-capability", nargs="+", default=[], metavar="X.Y", help="tensorrt_rtx: GPUs to build for, such as 8.6 (default: all)"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="file of kernel timings, read and written: later builds are faster"
    )
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch memory that layers may use (default: all of the GPU)")
    group.add_argument("--optimization-level", type=int, metavar="N", help="TensorRT's own, 0 to 5")


def run(args: argparse.Namespace) -> int:
    from sa_export.errors import UserError
    from sa_export.tensorrt.build import build_engine, capabilities_of, make_plan
    from sa_export.tensorrt.profiles import Limits

    if args.dense_onnx is not None and not args.dense:
        raise UserError("--dense-onnx keeps the model of a dense build; add --dense native or --dense decomposed.")
    plan = make_plan(
        args.model,
        args.output or args.model.with_suffix(".plan"),
        Limits(args.max_batch_size, args.max_seq_len, args.opt_batch_size, args.opt_seq_len, args.max_chunk_len),
        runtime=args.runtime,
        plugin=args.plugin,
        dense=args.dense or "",
        dense_onnx=args.dense_onnx,
        capabilities=capabilities_of(args.compute_capability),
        timing_cache=args.timing_cache,
        workspace_mib=args.workspace,
        level=args.optimization_level,
    )
    if args.dry_run:
        emit(args, _text(plan.as_dict()), plan.as_dict())
        return 0
    log = (lambda text: print(text, file=sys.stderr)) if args.verbose else (lambda _text: None)
    built = build_engine(plan, force=args.force, progress=progress_bar(args), log=log)
    emit(args, _text(built), built)
    return 0


def _text(built: dict[str, Any]) -> str:
    capabilities = ", ".join(built["compute_capabilities"]) or (
        "every GPU it knows" if built["runtime"] == "tensorrt_rtx" else "the GPU at hand"
    )
    made = f"{built['bytes'] / 2**20:.1f} MiB in {built['seconds']} s" if "bytes" in built else "not built (--dry-run)"
    lines = [f"{built['engine']}: {made}, {built['runtime']} {built['runtime_version']}, for {capabilities}"]
    if built["plugin"]:
        lines.append(f"plugin layers: {len(built['sites'])} ({built['plugin']})")
    elif built["dense"]:
        lines.append(f"full attention ({built['dense']}), no plugin")
    lines += ["", f"{'profile':<10}{'input':<28}{'min':<18}{'opt':<18}max"]
    for profile in built["profiles"]:
        shown = [n for n in profile["min"] if not n.startswith("past_key_values.")] + [n for n in profile["min"] if n.endswith(".0.key")]
        for i, name in enumerate(shown):
            shapes = ["x".join(map(str, profile[bound][name])) for bound in ("min", "opt", "max")]
            lines.append(f"{profile['name'] if not i else '':<10}{name:<28}{shapes[0]:<18}{shapes[1]:<18}{shapes[2]}")
    return "\n".join(
        [*lines, "", "the same with trtexec (TensorRT 11):", built["trtexec"], "", "the same with polygraphy:", built["polygraphy"]]
    )
