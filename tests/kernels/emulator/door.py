"""The emulated library as the kernels' Python door sees it, for one test module."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sa_export.kernels import native
from tests.kernels.emulator.build import cuda_include, cutlass_include, shared

HEAD_DIMS = (64, 96)
"""The same for every module, so that a session builds one library."""


@contextmanager
def emulated_library(what: str, **environment: str) -> Iterator[None]:
    """Points the door at the emulated library, or skips the test with the reason. what: the kernels that are then not emulated."""
    for tool, found in (("g++", shutil.which("g++")), ("the CUDA headers", cuda_include()), ("the CUTLASS headers", cutlass_include())):
        if not found:
            pytest.skip(f"{tool} were not found: {what} were not emulated")
    # SA_EMULATED_KERNELS names a library that an earlier build() left, for work on the tests alone.
    path = os.environ.get("SA_EMULATED_KERNELS") or shared(HEAD_DIMS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SA_EXPORT_KERNELS": str(path), **environment}.items():
            patch.setenv(name, value)
        native.load.cache_clear()
        yield
    native.load.cache_clear()
