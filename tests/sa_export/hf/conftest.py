"""Tiny random models with a tokenizer, saved as checkpoints, and their exports; each is made once a session."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.sa_export.hf.models import save_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint with grouped queries, float32."""
    return save_checkpoint(tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="session")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint: layer 0 full, layer 1 with a window of 8 tokens; no tokenizer."""
    return save_checkpoint(
        tmp_path_factory.mktemp("qwen2") / "checkpoint",
        "Qwen2Config",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        tokenizer=False,
    )


@pytest.fixture(scope="session")
def loaded(llama: Path, sliding: Path) -> Callable[..., Any]:
    """`loaded(dtype, name)`: the checkpoint of that name, loaded once for each dtype."""
    from sa_export.hf.load import load_checkpoint

    held: dict[tuple[str, str], Any] = {}

    def get(dtype: str = "float32", name: str = "llama") -> Any:
        if (dtype, name) not in held:
            held[dtype, name] = load_checkpoint({"llama": llama, "sliding": sliding}[name], dtype=dtype)
        return held[dtype, name]

    return get


@dataclass
class Heard:
    """What an export told its caller, and what it let through to the terminal and to Python's warnings."""

    progress: list[tuple[str, float | None]] = field(default_factory=list)
    printed: bytes = b""
    warnings: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def heard() -> dict[Path, Heard]:
    """What was heard of each export, by its folder."""
    return {}


@pytest.fixture(scope="session")
def exported(loaded: Callable[..., Any], heard: dict[Path, Heard], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`exported(dtype, name, **options)`: an `ExportResult`, made once for each set of arguments; not to be changed in place."""
    from sa_export.hf.export import export_onnx

    held: dict[str, Any] = {}

    def get(dtype: str = "float32", name: str = "llama", **options: Any) -> Any:
        key = json.dumps([dtype, name, options], sort_keys=True)
        if key not in held:
            folder = tmp_path_factory.mktemp("export") / "new" / "out"
            checkpoint = loaded(dtype, name)
            ears = heard[folder] = Heard()
            with warnings.catch_warnings(record=True) as caught, captured(tmp_path_factory.mktemp("terminal") / "text") as text:
                warnings.simplefilter("always")
                held[key] = export_onnx(checkpoint, folder, progress=lambda *at: ears.progress.append(at), **options)
            ears.printed = text.read_bytes()
            ears.warnings = [str(warning.message) for warning in caught]
        return held[key]

    return get


@contextmanager
def captured(path: Path) -> Iterator[Path]:
    """Sends file descriptors 1 and 2 into a file until the block ends."""
    saved = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield path
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), saved, strict=True):
                os.dup2(source, target)
                os.close(source)
