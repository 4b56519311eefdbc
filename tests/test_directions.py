"""Who may know whom.

Python: samples -> sa_export -> graph_passes. Heavy packages are imported inside of functions, so that `sa-export --help` is
instant.

C++: adapters (tensorrt, onnxruntime, c_abi) -> core -> kernels -> kernels/common; the public headers know none of them, and only
its own adapter knows a framework.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NEVER = {
    "graph_passes": {
        "torch",
        "transformers",
        "sa_export",
        "tests",
        "samples",
        "tensorrt",
        "onnxruntime",
        "polygraphy",
        "matplotlib",
        "safetensors",
    },
    "sa_export": {"tests", "samples"},
}
HEAVY = {
    "torch",
    "transformers",
    "onnxruntime",
    "tensorrt",
    "matplotlib",
    "polygraphy",
    "safetensors",
    "onnxscript",
    "tokenizers",
    "triton",
    "scipy",
}

LAYERS = ("include", "kernels/common", "kernels", "core", "adapter")
ADAPTERS = ("tensorrt", "onnxruntime", "c_abi", "triton")
FRAMEWORKS = {"tensorrt": r"NvInfer|NvOnnx", "onnxruntime": r"onnxruntime", "torch": r"torch/|ATen/|c10/"}


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Top-level name of each imported package, whether it is imported when the module is, and the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = path.relative_to(ROOT).parts[0]
    lazy: set[int] = set()
    for node in ast.walk(tree):
        is_typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            body = node.body if isinstance(node.body, list) else [node.body]
            lazy |= {id(inner) for part in body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{package}." if node.level else str(node.module)]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module")
            and node.args
        ):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str) else []
        else:
            continue
        yield from ((n.split(".")[0], id(node) not in lazy, node.lineno) for n in names)


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", NEVER)
def test_packages_know_only_what_lies_below(package: str) -> None:
    files = python_files(package)
    assert files
    wrong = [f"{f.relative_to(ROOT)}:{line} imports {name}" for f in files for name, _, line in imports(f) if name in NEVER[package]]
    assert not wrong


@pytest.mark.parametrize("package", NEVER)
def test_heavy_packages_are_imported_late(package: str) -> None:
    wrong = [
        f"{f.relative_to(ROOT)}:{line} imports {name} at module level"
        for f in python_files(package)
        for name, early, line in imports(f)
        if early and name in HEAVY
    ]
    assert not wrong


def test_graph_passes_runs_without_heavy_packages() -> None:
    """The whole package is imported with the heavy ones made unimportable."""
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in python_files("graph_passes")]
    code = f"""
import importlib, sys
for name in {sorted(HEAVY | {"sa_export"})!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def layer_of(path: Path) -> tuple[int, str]:
    """Height of a file of `plugins`, and its adapter."""
    parts = path.relative_to(ROOT / "plugins").parts
    if parts[0] in ADAPTERS:
        return LAYERS.index("adapter"), parts[0]
    if parts[:2] == ("kernels", "common"):
        return LAYERS.index("kernels/common"), ""
    return LAYERS.index(parts[0]), ""


def cpp_files() -> list[Path]:
    folders = ("include", "kernels", "core", *ADAPTERS)
    kinds = {".h", ".hpp", ".cuh", ".cu", ".cpp", ".cc", ".in"}
    return sorted(f for folder in folders for f in (ROOT / "plugins" / folder).rglob("*") if f.suffix in kinds)


def included(path: Path) -> Iterator[tuple[Path, int]]:
    """The files of `plugins` that a file includes, with the line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        if found is None:
            continue
        places = (path.parent, ROOT / "plugins", ROOT / "plugins/include", ROOT / "plugins/core", ROOT / "plugins/kernels")
        target = next((p for place in places if (p := (place / found[1]).resolve()).is_file()), None)
        if target is not None and target.is_relative_to(ROOT / "plugins"):
            yield target, number


def test_cpp_layers() -> None:
    wrong = []
    for file in cpp_files():
        height, adapter = layer_of(file)
        for target, line in included(file):
            below, other = layer_of(target)
            if below > height or (other and other != adapter):
                wrong.append(f"{file.relative_to(ROOT)}:{line} includes {target.relative_to(ROOT)}")
    assert not wrong


def test_only_adapters_know_frameworks() -> None:
    wrong = []
    for file in cpp_files():
        _, adapter = layer_of(file)
        for framework, pattern in FRAMEWORKS.items():
            if framework != adapter:
                text = file.read_text(encoding="utf-8")
                wrong += [f"{file.relative_to(ROOT)} includes {m[1]}" for m in re.finditer(rf'#\s*include\s*[<"](({pattern})[^>"]*)', text)]
    assert not wrong
