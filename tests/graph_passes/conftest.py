"""Exports are made once and kept in pytest's cache until the exporter or its versions change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.graph_passes.exporters import EXPORTS, export, key


@pytest.fixture(scope="session")
def exported(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Path of an export by its name in `exporters.EXPORTS`; not to be changed in place."""
    folder = Path(request.config.cache.mkdir("exports"))

    def get(name: str) -> Path:
        path = folder / f"{key(EXPORTS[name])}.onnx"
        if not path.exists():
            export(EXPORTS[name], path)
        return path

    return get
