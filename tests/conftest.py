"""Where the native libraries are: what the environment says, else what `make kernels` built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BUILT = Path(__file__).resolve().parents[1] / "build/kernels/plugins"
_LIBRARIES = {
    "SA_EXPORT_KERNELS": _BUILT / "libsample_attention_kernels.so",
    "SA_EXPORT_TRT_PLUGIN": _BUILT / "tensorrt/libsample_attention_trt.so",
    "SA_EXPORT_TRT_SHIM": _BUILT / "tensorrt/driver/libsample_attention_shim.so",
}


def pytest_configure(config: pytest.Config) -> None:
    for variable, library in _LIBRARIES.items():
        if library.is_file():
            os.environ.setdefault(variable, str(library))
