"""The plugin library with the reference backend, and the TensorRT libraries that are there to hold it against."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.tensorrt import plugin_build


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "plugin_build"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def headers() -> plugin_build.Headers:
    found = plugin_build.find_headers()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def plugin_library(shared_folder: Path, headers: plugin_build.Headers) -> Path:
    """libsample_attention_trt.so that computes on the host."""
    return plugin_build.once(shared_folder, "plugin", lambda folder: plugin_build.build_plugin(folder, headers))


@pytest.fixture(scope="session")
def trt_libraries() -> dict[str, Path]:
    """TensorRT libraries by name, as {"lean-11.1.0.106": .../libnvinfer_lean.so.11, "rtx-1.7.1.116": .../libtensorrt_rtx.so.1}.

    Looked for in the installed wheels and in the folders that SA_TENSORRT_LIBS names (separated as PATH is), each with unpacked wheels.
    """
    folders = [Path(folder) for folder in os.environ.get("SA_TENSORRT_LIBS", "").split(os.pathsep) if folder]
    for package in ("tensorrt_lean_libs", "tensorrt_rtx_libs", "tensorrt_libs"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent.parent)
    found: dict[str, Path] = {}
    for folder in folders:
        for pattern, kind in (
            ("tensorrt_lean_libs/libnvinfer_lean.so.*", "lean"),
            ("tensorrt_rtx_libs/libtensorrt_rtx.so.*", "rtx"),
            ("tensorrt_libs/libnvinfer.so.*", "full"),
        ):
            for library in folder.glob(pattern):
                version = _wheel_version(folder, library.parent.name)
                found.setdefault(f"{kind}-{version}", library)
    return found


def _wheel_version(folder: Path, package: str) -> str:
    kind = package.removesuffix("_libs")
    return next(
        (info.name.removesuffix(".dist-info").rpartition("-")[2] for info in folder.glob(f"{kind}_cu*_libs-*.dist-info")), "unknown"
    )
