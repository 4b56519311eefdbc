"""Compiles the plugin library with the reference backend, its shim and the conformance driver, with g++ alone: no nvcc, no TensorRT library.

The parts are compiled once, at the same time as far as the machine allows, into a folder that all workers of a test run share.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins/tensorrt"
CPP = ROOT / "tests/cpp"
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

_TENSORRT = ("/usr/local/tensorrt/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")
_CUDA = ("/usr/local/cuda/include", "/usr/include")
PLUGIN_SOURCES = ("parameters", "host", "call", "plugin", "entry")
BACKEND_SOURCES = ("reference", "host_api")
DRIVER_SOURCES = ("main", "life_cycle", "calls", "support/library", "backend/reference")


@dataclass(frozen=True)
class Headers:
    tensorrt: Path
    cuda: Path


def find_headers() -> Headers | str:
    """The folders, or the sentence for a skipped test."""
    if shutil.which("g++") is None:
        return "no g++: the TensorRT plugin was not compiled; install a C++17 compiler"
    roots = [os.environ[name] for name in ("TENSORRT_ROOT",) if name in os.environ]
    tensorrt = _first([*(f"{root}/include" for root in roots), *roots, *_TENSORRT], "NvInferRuntime.h")
    if tensorrt is None:
        return (
            "no TensorRT headers: the plugin was not compiled; set TENSORRT_ROOT to a folder whose include/ holds NvInfer.h "
            "(a TensorRT package, or a checkout of github.com/NVIDIA/TensorRT)"
        )
    cuda = _first(
        [*(f"{os.environ[name]}/include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ), *_CUDA], "cuda_runtime_api.h"
    )
    if cuda is None:
        return "no cuda_runtime_api.h: the TensorRT plugin was not compiled; install the CUDA toolkit, or set CUDA_HOME"
    return Headers(tensorrt, cuda)


def _first(folders: list[str], name: str) -> Path | None:
    return next((Path(folder) for folder in folders if (Path(folder) / name).is_file()), None)


def version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def _compile(source: Path, target: Path, headers: Headers, flags: tuple[str, ...], folder: Path, plugin: Path) -> Path:
    out = folder / (f"{target.name}-" + source.name.replace(".cpp", ".o"))
    common = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fvisibility=hidden", f'-DSA_VERSION="{version()}"']
    # -isystem: TensorRT's headers do not compile without warnings.
    includes = ["-isystem", headers.tensorrt, "-isystem", headers.cuda, "-I", ROOT / "plugins/include", "-I", plugin, "-I", CPP]
    # The reference is slow under a sanitizer and is not what is tested.
    flags = ("-O2",) if source.name == "reference.cpp" else flags
    command = ["g++", *common, *flags, *includes, "-c", source, "-o", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{source} does not compile cleanly:\n{done.stderr}")
    return out


def _build(target: Path, sources: list[Path], link: list[str], headers: Headers, flags: tuple[str, ...], plugin: Path = PLUGIN) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, target, headers, flags, target.parent, plugin), sources))
    done = subprocess.run(
        ["g++", *flags, *map(str, objects), *link, "-ldl", "-o", str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{target.name} does not link:\n{done.stderr}")
    return target


def build_plugin(folder: Path, headers: Headers, flags: tuple[str, ...] = ("-O1",), plugin: Path = PLUGIN) -> Path:
    """libsample_attention_trt.so. plugin: the folder of its sources (a mutant's)."""
    sources = [*(plugin / f"{name}.cpp" for name in PLUGIN_SOURCES), *(CPP / f"backend/{name}.cpp" for name in BACKEND_SOURCES)]
    link = ["-shared", f"-Wl,--version-script={plugin / 'exports.map'}", "-Wl,-z,nodelete"]
    # A sanitized library takes its run time from the program.
    link += [] if any("sanitize" in flag for flag in flags) else ["-Wl,-z,defs"]
    return _build(folder / "libsample_attention_trt.so", sources, link, headers, flags, plugin)


def rebuild_plugin(folder: Path, built: Path, headers: Headers, flags: tuple[str, ...], plugin: Path, file: str) -> Path:
    """The library of `plugin`, a copy of the sources that differs in `file` alone; every other object is that of the folder `built`."""
    folder.mkdir(parents=True)
    target = folder / "libsample_attention_trt.so"
    changed = _compile(plugin / file, target, headers, flags, folder, plugin)
    objects = [changed if o.name == changed.name else o for o in sorted(built.glob("*.o"))]
    command = [
        "g++",
        *flags,
        "-shared",
        *objects,
        f"-Wl,--version-script={plugin / 'exports.map'}",
        "-Wl,-z,nodelete",
        "-ldl",
        "-o",
        target,
    ]
    subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return target


def build_shim(folder: Path, headers: Headers) -> Path:
    return _build(folder / "libsample_attention_shim.so", [CPP / "shim.cpp", CPP / "support/library.cpp"], ["-shared"], headers, ("-O1",))


def build_driver(folder: Path, headers: Headers, flags: tuple[str, ...] = ("-O1",)) -> Path:
    return _build(folder / "plugin_driver", [CPP / f"{name}.cpp" for name in DRIVER_SOURCES], ["-rdynamic"], headers, flags)


def once(folder: Path, name: str, build) -> Path:
    """Builds into folder/name unless another worker has done so; a failed build is not tried again by the others."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done, failed = target / ".done", target / ".failed"
        if failed.exists():
            raise RuntimeError(failed.read_text())
        if not done.exists():
            try:
                done.write_text(str(build(target)))
            except RuntimeError as error:
                failed.write_text(str(error))
                raise
        return Path(done.read_text())
