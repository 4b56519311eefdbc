"""Makes the frozen graphs anew, or shows how an exporter has drifted since.

    python -m tests.data.make --list
    python -m tests.data.make dynamo-sdpa-20 llama qwen3
    python -m tests.data.make --check dynamo-sdpa-20

Each exporter runs in an environment of its own (`tests/data/requirements/`); this command makes the graphs of one route in the
environment that it is started in.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import importlib.metadata
import io
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from tests.data import families
from tests.data.frozen import GRAPHS, freeze, frozen, read_manifest, structure, thaw, write_manifest
from tests.data.routes import genai, handwritten, hf_exporter, interface, optimum, ort, torch_onnx

__all__ = ["ROUTES", "main"]

ROUTES: dict[str, ModuleType] = {v: m for m in (torch_onnx, optimum, genai, hf_exporter, ort, interface, handwritten) for v in m.VARIANTS}
"""Name of a route -> the exporter that it belongs to."""

WIDE = ("dynamo-sdpa-20", "optimum", "genai-fp32-cpu", "torchscript-eager-18")
"""Routes that are frozen for every family that names no routes of its own; the others are frozen for `NARROW`."""
NARROW = ("llama", "qwen3", "gemma2", "gpt-oss")
OTHER = {
    "optimum-O2": ("llama", "gpt2", "gpt-neox", "bloom"),
    "optimum-O3": ("llama", "gpt2", "gpt-neox", "bloom"),
    "torchscript-eager-11": ("llama", "gpt2"),
    "torchscript-eager-14": ("llama", "gpt2", "gpt-neox"),
    "torchscript-sdpa-17": ("llama", "phi3", "mistral-window"),
    "sa-export-sample-20": ("llama", "qwen3", "gemma3", "deepseek-v3"),
}
"""Routes that take other families: optimum optimises few architectures, and our own nodes need a layer without soft-cap and sinks;
of older opsets a few are enough."""


def default_families(route: str) -> tuple[str, ...]:
    """The families that are frozen of a route."""
    if ROUTES[route] is handwritten:
        return tuple(handwritten.MODELS)
    every = [name for name, family in families.FAMILIES.items() if not family.routes]
    own = [name for name, family in families.FAMILIES.items() if route in family.routes]
    return (*(every if route in WIDE else OTHER.get(route, NARROW)), *own)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.data.make", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("route", nargs="?", help="one of --list")
    parser.add_argument("family", nargs="*", help="families; default: those that are frozen of this route")
    parser.add_argument("--all", action="store_true", help="every family")
    parser.add_argument("--output", type=Path, default=GRAPHS, help="folder of the graphs (default: the frozen ones)")
    parser.add_argument("--missing", action="store_true", help="only the graphs that are not in the folder yet")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, show what differs from the frozen graphs; exit status 1 if something does"
    )
    parser.add_argument("--list", action="store_true", help="the routes and their families")
    given = parser.parse_args(arguments)
    if given.list or not given.route:
        for route, module in ROUTES.items():
            print(f"{route:30} {module.__name__.rsplit('.', 1)[1]:12} {', '.join(default_families(route))}")
        return 0
    if given.route not in ROUTES:
        parser.error(f"there is no route {given.route!r}; allowed are {', '.join(ROUTES)}")
    known = handwritten.MODELS if ROUTES[given.route] is handwritten else families.FAMILIES
    wanted = given.family or (known if given.all else default_families(given.route))
    for name in wanted:
        if name not in known:
            parser.error(f"there is no family {name!r}; allowed are {', '.join(known)}")
    if given.missing:
        there = {f.family for f in frozen(given.output) if f.route == given.route}
        wanted = [name for name in wanted if name not in there]
    _quiet()
    return _check(given.route, wanted) if given.check else _make(given.route, wanted, given.output)


def _make(route: str, wanted: Any, folder: Path) -> int:
    failed: dict[str, str] = {}
    for family in wanted:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.onnx"
            try:
                _export(route, family, path)
                made = freeze(onnx.load(str(path)), folder, route, family)
            except Exception as error:  # exporters fail in every way; the reason goes into the manifest
                failed[family] = _first_cause(error)
                print(f"{route} {family}: not exported, {failed[family]}", flush=True)
                continue
        print(f"{made} {made.stat().st_size}", flush=True)
    _note(route, wanted, failed, folder)
    return 0


def _check(route: str, wanted: Any) -> int:
    there = {f.family: f.path for f in frozen() if f.route == route}
    differing = 0
    for family in wanted:
        if family not in there:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            old, new = Path(temporary) / "old.onnx", Path(temporary) / "new.onnx"
            old.write_bytes(thaw(there[family]))
            _export(route, family, new)
            lines = [json.dumps(structure(p), indent=1).splitlines() for p in (old, new)]
        drift = list(difflib.unified_diff(*lines, f"frozen {route}/{family}", "made now", n=0, lineterm=""))
        differing += bool(drift)
        print("\n".join(drift) if drift else f"{route}/{family}: as frozen", flush=True)
    return 1 if differing else 0


def _export(route: str, family: str, path: Path) -> None:
    """The exporters talk a great deal on both streams."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ROUTES[route].export(route, family, path)


def _note(route: str, wanted: Any, failed: dict[str, str], folder: Path) -> None:
    manifest = read_manifest(folder)
    entry = manifest.setdefault(route, {})
    entry["date"] = datetime.date.today().isoformat()
    entry["packages"] = {p: importlib.metadata.version(p) for p in ROUTES[route].PACKAGES}
    entry["not exported"] = {k: v for k, v in {**entry.get("not exported", {}), **failed}.items() if k in failed or k not in wanted}
    write_manifest(manifest, folder)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    said = re.sub(r"(/[\w.~-]+){2,}", "checkpoint", " ".join(lines[:2]))[:160]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "2")


if __name__ == "__main__":
    sys.exit(main())
