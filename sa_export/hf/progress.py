"""How long work tells its caller where it stands."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]
"""Called as `progress(stage, fraction)`: `stage` is a verb in the imperative ("trace"), `fraction` is in [0, 1] or None when unknown."""


def silent(stage: str, fraction: float | None) -> None:
    """The progress that reports to nobody."""
