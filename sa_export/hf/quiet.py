"""Third-party libraries while they work for us: silenced, and their errors cut to a sentence."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("torch", "transformers", "onnxscript", "onnx_ir", "onnx", "huggingface_hub", "httpx", "filelock")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Mutes warnings, log records and progress bars of torch, transformers, onnxscript and the hub client.

    Levels are set on the loggers that exist under these names; a logger born inside inherits them. Everything is put back on exit,
    also after an exception. What these libraries have to say that matters to a user reaches them as an exception.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    names = {n for n in logging.root.manager.loggerDict if n.split(".", 1)[0] in _NOISY} | set(_NOISY)
    levels = {name: logging.getLogger(name).level for name in names}
    hub_bars = not hub.are_progress_bars_disabled()
    model_bars = transformers_logging.is_progress_bar_enabled()
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        hub.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if hub_bars:
            hub.enable_progress_bars()
        if model_bars:
            transformers_logging.enable_progress_bar()


def sentence_of(error: BaseException) -> str:
    """The head of a library's message as one sentence: its first line, with the second where the first ends in a colon."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."
