"""Show versions, GPU, plugin libraries and TensorRT: what is there, what is missing and how to get it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from importlib import util
from pathlib import Path
from typing import Any

from sa_export.cli.common import add_report_arguments, emit
from sa_export.tensorrt import POLYGRAPHY_PLUGINS
from sa_export.tensorrt.library import NAME as PLUGIN_NAME
from sa_export.tensorrt.library import VARIABLE as PLUGIN_VARIABLE
from sa_export.versions import installed

# What is needed for what: package -> (purpose, how to get it).
_REQUIRED = {
    "torch": ("export", "pip install torch"),
    "transformers": ("export", "pip install 'transformers>=5'"),
    "onnx": ("everything", "pip install onnx"),
    "onnxscript": ("export", "pip install onnxscript"),
    "onnxruntime": ("check on the CPU", "pip install onnxruntime"),
    "onnx-graphsurgeon": ("inspect, rewrite", "pip install onnx-graphsurgeon"),
    "polygraphy": ("check", "pip install polygraphy"),
    "numpy": ("everything", "pip install numpy"),
}
_OPTIONAL = {
    "tensorrt": ("engines", "pip install 'sa-export[tensorrt]' (or the TensorRT SDK)"),
    "tensorrt-rtx": ("engines for GeForce RTX", "pip install tensorrt-rtx"),
    "onnxruntime-gpu": ("check on a GPU", "pip install 'sa-export[gpu]' instead of onnxruntime"),
    "tritonclient": ("talking to Triton", "pip install 'sa-export[serve]'"),
}
_PROGRAMS = {
    "nvcc": "CUDA toolkit: needed to build the kernels",
    "cmake": "needed to build the kernels (pip install cmake)",
    "trtexec": "comes with the TensorRT SDK, not with the pip wheels",
    "tritonserver": "comes with the Triton container",
}
_WITHOUT = {
    "libsample_attention_kernels.so": "not built: ONNX Runtime runs the op as standard operators (slow, exact)",
    "libsample_attention_trt.so": "not built: sa-export build makes engines with full attention only (--dense)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    found = examine()
    lines = [
        f"{'':4}{'system':<34}{found['system']}",
        f"{'':4}{'python':<34}{found['python']}",
        f"{'':4}{'GPU':<34}{found['gpu'] or 'none found'}",
    ]
    for name, entry in found["packages"].items():
        mark = "ok" if entry["version"] else ("!!" if entry["required"] else "--")
        lines.append(
            f"{mark:<4}{name:<34}{entry['version'] or 'missing'}" + ("" if entry["version"] else f"  for {entry['for']}: {entry['get']}")
        )
    for name, entry in found["programs"].items():
        lines.append(
            f"{'ok' if entry['path'] else '--':<4}{name:<34}{entry['path'] or 'missing'}" + ("" if entry["path"] else f"  {entry['note']}")
        )
    for name, path in found["libraries"].items():
        lines.append(f"{'ok' if path else '--':<4}{name:<34}{path or _WITHOUT[name]}")
    lines.append(f"{'':4}{'polygraphy plugin --plugin-dir':<34}{found['polygraphy_plugins']}")
    missing = [n for n, e in found["packages"].items() if e["required"] and not e["version"]]
    lines.append("")
    lines.append(f"missing: {', '.join(missing)}" if missing else "export, inspect, rewrite, check and plot can run here.")
    emit(args, "\n".join(lines), found)
    return 1 if missing else 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as plain values."""
    packages = {
        name: {"version": installed(name), "required": required, "for": purpose, "get": get}
        for required, table in ((True, _REQUIRED), (False, _OPTIONAL))
        for name, (purpose, get) in table.items()
    }
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "gpu": _gpu(),
        "packages": packages,
        "programs": {name: {"path": shutil.which(name), "note": note} for name, note in _PROGRAMS.items()},
        "libraries": {name: _library(name) for name in _WITHOUT},
        "polygraphy_plugins": str(POLYGRAPHY_PLUGINS),
    }


def _gpu() -> str | None:
    """Names of the GPUs as the driver's own tool gives them; no CUDA library is loaded for it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        shown = subprocess.run(
            [program, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(line.strip() for line in shown.stdout.splitlines() if line.strip()) or None


def _library(name: str) -> str | None:
    # The library that the kernels' door would load: SA_EXPORT_KERNELS names another than the installed one.
    if name == "libsample_attention_kernels.so" and (named := os.environ.get("SA_EXPORT_KERNELS")):
        return named if Path(named).is_file() else None
    named = os.environ.get(PLUGIN_VARIABLE)
    if name == PLUGIN_NAME and named and Path(named).is_file():
        return named
    spec = util.find_spec("sa_export")
    for place in spec.submodule_search_locations or [] if spec else []:
        path = Path(place) / "lib" / name
        if path.is_file():
            return str(path)
    return None
