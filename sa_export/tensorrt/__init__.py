"""TensorRT engines of rewritten models: build, lint, comparison, and what polygraphy needs. Importing this package loads nothing heavy."""

from pathlib import Path

__all__ = ["POLYGRAPHY_PLUGINS"]

POLYGRAPHY_PLUGINS = Path(__file__).parent / "polygraphy_plugins"
"""The folder for `polygraphy plugin list|match|replace --plugin-dir`."""
