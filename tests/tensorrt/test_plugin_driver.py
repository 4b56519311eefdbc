"""The conformance driver (tests/cpp) over the plugin library: alone, and loaded by each TensorRT that is there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.tensorrt import plugin_build

MATCHES = 9000  # checks at least: a driver that stops early is no driver


@pytest.fixture(scope="module")
def sanitized(shared_folder, headers) -> tuple[Path, Path]:
    """(driver, plugin library) under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = plugin_build.SANITIZE
    driver = plugin_build.once(shared_folder, "driver_sanitized", lambda folder: plugin_build.build_driver(folder, headers, flags))
    library = plugin_build.once(shared_folder, "plugin_sanitized", lambda folder: plugin_build.build_plugin(folder, headers, flags))
    return driver, library


def _run(driver: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}
    return subprocess.run([driver, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment)


def _passed(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runtime error" not in done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[1:] == ["checks", "passed,", "0", "failed"]
    return int(last[0])


def test_alone(sanitized):
    assert _passed(_run(*sanitized)) > MATCHES


@pytest.mark.parametrize("name", ["lean-11.1", "lean-11.4", "rtx"])
def test_loaded_by_tensorrt(sanitized, trt_libraries, name):
    library = next((path for version, path in trt_libraries.items() if version.startswith(name)), None)
    if library is None:
        pytest.skip(f"no TensorRT {name}: its registry did not load the plugin; install the wheel, or name its folder in SA_TENSORRT_LIBS")
    assert _passed(_run(*sanitized, library)) > MATCHES
