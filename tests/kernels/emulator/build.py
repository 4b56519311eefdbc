"""Builds the kernels as a CPU library: the sources of plugins/ with the PTX wrappers replaced by the headers of this folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGINS = HERE.parents[2] / "plugins"
_DYNAMIC_SHARED = "extern __shared__ __align__(1024) unsigned char raw[];"


def cuda_include() -> Path | None:
    """The folder of cuda.h, next to nvcc or at CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    return next((Path(h) / "include" for h in homes if h and (Path(h) / "include/cuda.h").is_file()), None)


def cutlass_include() -> Path | None:
    """The folder of cute/tensor.hpp, from CUTLASS_ROOT or the nvidia-cutlass wheel."""
    roots = [Path(os.environ["CUTLASS_ROOT"])] if "CUTLASS_ROOT" in os.environ else []
    if spec := importlib.util.find_spec("cutlass_library"):
        roots.append(Path(spec.origin or ".").parent / "source")
    return next((r / "include" for r in roots if (r / "include/cute/tensor.hpp").is_file()), None)


def _filled(template: Path, values: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda m: values[m[1]], template.read_text())


def build(folder: Path, head_dims: Sequence[int]) -> Path:
    """Compiles into `folder`; returns the library. Raises CalledProcessError with the compiler's words."""
    tree = folder / "plugins"
    shutil.copytree(PLUGINS, tree)
    for name in ("ptx", "launch", "gmma", "mma_sm80"):
        shutil.copy(HERE / f"overlay_{name}.cuh", tree / "kernels/common" / f"{name}.cuh")
    for name in ("device.h", "runtime.cpp"):
        shutil.copy(HERE / name, tree / "kernels/common" / name)
    shutil.copy(HERE / "overlay_ptx.cuh", tree / "kernels/common/overlay_ptx.cuh")
    for source in (*tree.rglob("*.cuh"), *tree.rglob("*.cu")):
        source.write_text(source.read_text().replace(_DYNAMIC_SHARED, ""))
    # As plugins/CMakeLists.txt does: the mma.sync kernels take head sizes 64 and 128.
    instances = {"instance": head_dims, "instance_sm80": [d for d in head_dims if d in (64, 128)]}
    built = {}
    for name, dims in zip(("SA", "SA_SM80"), instances.values(), strict=True):
        built[f"{name}_HEAD_DIM_CALLS"] = " ".join(f"X({d})" for d in dims)
        built[f"{name}_HEAD_DIMS_TEXT"] = ", ".join(map(str, dims)) or "none"
    (tree / "built.h").write_text(_filled(tree / "core/built.h.in", built))
    sources = [
        tree / "c_abi/c_api.cpp",
        *sorted((tree / "core").glob("*.cpp")),
        *sorted((tree / "kernels").rglob("*.cu")),
        tree / "kernels/common/runtime.cpp",
    ]
    for name, dims in instances.items():
        for d in dims:
            for code, element in ((0, "half_t"), (1, "bfloat16_t")):
                source = tree / f"{name}_{element}_{d}.cu"
                values = {"SA_ELEMENT": f"cute::{element}", "SA_DTYPE": str(code), "SA_HEAD_DIM": str(d)}
                source.write_text(_filled(tree / f"core/{name}.cu.in", values))
                sources.append(source)
    system = (cutlass_include(), cuda_include(), cuda_include() / "cccl")  # CUDA 13 keeps cuda/std in cccl
    includes = [f"-I{p}" for p in (tree, tree / "include")] + [f"-isystem{p}" for p in system]
    flags = ["-std=c++17", "-O2", "-w", "-fPIC", "-DNDEBUG", "-x", "c++", "-include", str(tree / "kernels/common/device.h"), *includes]
    objects = []
    for source in sources:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name}: {done.stderr[:4000]}")
        objects.append(str(target))
    library = folder / "libsample_attention_emulated.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects], check=True)
    return library


def shared(head_dims: Sequence[int]) -> Path:
    """As build(), once for all test processes and sessions that see the same sources: the library lies in the system's folder for temporary files."""
    digest = hashlib.sha256(repr(tuple(head_dims)).encode())
    for source in sorted(
        path for folder in (PLUGINS, HERE) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ):
        digest.update(source.read_bytes())
    home = Path(tempfile.gettempdir()) / f"sa-emulator-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    target = home / f"{digest.hexdigest()[:16]}.so"
    with open(home / f"{target.stem}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=home) as folder:
                build(Path(folder), head_dims).replace(target)
    return target
