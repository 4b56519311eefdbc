"""Versions of installed packages."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

__all__ = ["installed", "versions"]


def installed(package: str) -> str | None:
    """The version of a distribution, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {name: installed(name) for name in packages}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v}}
