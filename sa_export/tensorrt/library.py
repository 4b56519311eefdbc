"""Where the plugin library is."""

from __future__ import annotations

import os
from pathlib import Path

from sa_export.errors import UserError

__all__ = ["NAME", "VARIABLE", "find_plugin"]

NAME = "libsample_attention_trt.so"
VARIABLE = "SA_EXPORT_TENSORRT_PLUGIN"


def find_plugin(given: Path | None = None) -> Path:
    """The plugin library, absolute: `given`, else the environment variable SA_EXPORT_TENSORRT_PLUGIN, else the installed package.

    Raises:
        UserError: there is none, or what was named is no file; the sentence says how to get it.
    """
    for what, named in (("--plugin", given), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            if not Path(named).is_file():
                raise UserError(f"{what} is {str(named)!r}, which is not a file; give the path of {NAME}.")
            return Path(named).resolve()
    installed = Path(__file__).resolve().parent.parent / "lib" / NAME
    if not installed.is_file():
        raise UserError(
            f"The TensorRT plugin is not built ({NAME} is not in {installed.parent}); install with the TensorRT headers and nvcc at hand, "
            f"or build it with cmake and name it with --plugin or {VARIABLE}. Without it `--dense decomposed` builds an engine with full attention."
        )
    return installed
