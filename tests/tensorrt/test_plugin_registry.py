"""The library in the registries of real TensorRTs of both majors, through their Python bindings. Each case runs in its own process: a crash must not end the tests.

The library is built with one TensorRT's headers and must serve the others: their registry and logger have other virtual tables.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = ["lean-10.16.1.11", "lean-11.1.0.106", "lean-11.4.0.106", "rtx-1.7.1.116"]

PRELUDE = """
import ctypes, importlib, sys
import numpy as np
folder, library = sys.argv[1:3]
sys.path.insert(0, folder)
trt = importlib.import_module("tensorrt_rtx_bindings" if "rtx" in sys.argv[3] else "tensorrt_lean_bindings")

class Recorder(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, text):
        self.lines.append((severity, text))

registry = trt.get_plugin_registry()

def creator():
    return registry.get_creator("SampleAttention", "1", "")

def layer(**changes):
    from graph_passes.op import ATTRIBUTES, Policy, node_attributes
    kinds = {"FLOAT": (np.float32, trt.PluginFieldType.FLOAT32), "FLOATS": (np.float32, trt.PluginFieldType.FLOAT32),
             "INT": (np.int32, trt.PluginFieldType.INT32), "STRING": (np.int8, trt.PluginFieldType.CHAR)}
    values = {**node_attributes(Policy(), scale=0.1), **changes}
    fields, keep = [], []
    for a in ATTRIBUTES:
        if a.name.startswith("plugin_"):
            continue
        number, kind = kinds[a.onnx_type]
        value = values[a.name]
        array = np.frombuffer(value.encode() + b"\\0", np.int8).copy() if isinstance(value, str) else np.atleast_1d(np.asarray(value, number))
        keep.append(array)
        fields.append(trt.PluginField(a.name, array, kind))
    return creator().create_plugin("layer0", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
"""

LOADED = """
assert creator() is None
handle = registry.load_library(library)
assert handle is not None and creator() is not None
assert registry.load_library(library) is None  # TensorRT's answer to a second time
assert layer() is not None
assert layer(block_q=100) is None
registry.deregister_library(handle)
assert creator() is None
"""

ONLY_DLOPENED = """
ctypes.CDLL(library)  # as polygraphy --plugins and trtexec --staticPlugins do
assert creator() is not None and layer() is not None
assert layer(sink=-1) is None
ctypes.CDLL(library)
assert len([c for c in registry.all_creators if c.name == "SampleAttention"]) == 1
handle = registry.load_library(library)  # and then through the registry: the library hands its registration over
assert handle is not None and creator() is not None and layer() is not None
registry.deregister_library(handle)
assert creator() is None
"""

LOGGED = """
logger = Recorder()
builder = trt.Builder(logger)
registry.load_library(library)
assert layer(block_q=100) is None
said = [text for severity, text in logger.lines if "block_q" in text]
assert said == ["SampleAttention layer 'layer0': block_q is 100; allowed is one of 16, 32, 64, 128, 256."], logger.lines
"""

NOT_LOGGED = """
registry.load_library(library)
assert layer(block_q=100) is None
"""


def _run(folder: Path, library: Path, name: str, script: str) -> str:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script + "\nprint('done')", folder, library, name],
        capture_output=True, text=True, timeout=120, check=False, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.endswith("done\n")
    return done.stderr


@pytest.fixture(params=KNOWN)
def tensorrt(request, trt_libraries) -> tuple[Path, str]:
    """(folder with bindings, name)."""
    kind, _, version = request.param.partition("-")
    library = trt_libraries.get(request.param)
    folder = None if library is None else library.parent.parent
    if folder is None or not (folder / f"tensorrt_{kind}_bindings").is_dir():
        pytest.skip(
            f"no TensorRT {kind} {version} with bindings: its registry did not load the plugin; install the wheels, or name their folder in SA_TENSORRT_LIBS"
        )
    return folder, request.param


def test_load_library(tensorrt, plugin_library):
    stderr = _run(tensorrt[0], plugin_library, tensorrt[1], LOADED)
    assert "Segmentation" not in stderr


def test_dlopen_registers(tensorrt, plugin_library):
    _run(tensorrt[0], plugin_library, tensorrt[1], ONLY_DLOPENED)


def test_refusals_reach_tensorrts_logger(tensorrt, plugin_library):
    folder, name = tensorrt
    if name.startswith("rtx"):
        assert "block_q" not in _run(folder, plugin_library, name, LOGGED)
    else:
        # The lean runtime makes no logger known without a GPU: its finder is asked, has none, and the sentence goes to stderr.
        stderr = _run(folder, plugin_library, name, NOT_LOGGED)
        assert "SampleAttention layer 'layer0': block_q is 100; allowed is one of 16, 32, 64, 128, 256." in stderr


def test_without_tensorrt_it_loads_and_stays_silent(plugin_library):
    done = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(plugin_library)!r})"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
