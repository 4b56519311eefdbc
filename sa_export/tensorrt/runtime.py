"""Which TensorRT builds, and the environment of the processes that use it.

TensorRT is used in processes of their own: its parser ends the process on some errors, and polygraphy chooses between TensorRT and
TensorRT for RTX when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory

from sa_export.errors import UserError
from sa_export.versions import installed

__all__ = ["MINIMUM", "RUNTIMES", "Runtime", "environment", "find_runtime", "installed_runtimes"]

RUNTIMES = ("tensorrt", "tensorrt_rtx")
"""Names of the Python modules: TensorRT, and TensorRT for RTX, which builds without a GPU."""

MINIMUM = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 4)}
"""First versions whose parser prefers the plugin to the function body of a node with `plugin_namespace`."""

_PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_CURE = {
    "tensorrt": "pip install 'sa-export[tensorrt]', or take --runtime tensorrt_rtx (GeForce RTX; it also builds on a machine without a GPU)",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}


@dataclass(frozen=True)
class Runtime:
    """A TensorRT that is installed. `version` is the package's, empty when it does not say."""

    name: str
    version: str


def installed_runtimes() -> list[Runtime]:
    """Those of `RUNTIMES` that are installed, TensorRT first; nothing is imported."""
    found = []
    for name in RUNTIMES:
        if util.find_spec(name) is not None:
            found.append(Runtime(name, next((v for p in _PACKAGES[name] if (v := installed(p))), "")))
    return found


def find_runtime(name: str) -> Runtime:
    """The installed TensorRT of this name.

    Raises:
        UserError: it is not installed, or too old for the plugin to be found.
    """
    runtime = next((r for r in installed_runtimes() if r.name == name), None)
    if runtime is None:
        raise UserError(f"{name} is not installed: {_CURE[name]}.")
    check_version(runtime)
    return runtime


def check_version(runtime: Runtime) -> None:
    """Raises UserError for a version below `MINIMUM`; a version that is not known passes."""
    numbers = tuple(int(part) for part in runtime.version.split(".")[:2] if part.isdigit())
    least = MINIMUM[runtime.name]
    if len(numbers) == 2 and numbers < least:
        raise UserError(
            f"{runtime.name} is version {runtime.version}; allowed is {'.'.join(map(str, least))} or newer: {_CURE[runtime.name].split(',')[0]}."
        )


@contextmanager
def environment(name: str) -> Iterator[dict[str, str]]:
    """The environment for a child process that uses this TensorRT.

    The parser of TensorRT for RTX opens `libtensorrt_rtx.so`, a name that its wheel does not ship, and ends the process when it is
    not found. A folder that holds that name as a link to the wheel's library goes to the child's search path for as long as the block lasts.
    """
    variables = dict(os.environ, POLYGRAPHY_USE_TENSORRT_RTX=str(int(name == "tensorrt_rtx")))
    library = _rtx_library() if name == "tensorrt_rtx" else None
    if library is None:
        yield variables
        return
    with TemporaryDirectory(prefix="sa-export-") as folder:
        (Path(folder) / "libtensorrt_rtx.so").symlink_to(library)
        variables["LD_LIBRARY_PATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        yield variables


def _rtx_library() -> Path | None:
    spec = util.find_spec("tensorrt_rtx_libs")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(place).glob("libtensorrt_rtx.so.*"))
        if found and not (Path(place) / "libtensorrt_rtx.so").exists():
            return found[0].resolve()
    return None
