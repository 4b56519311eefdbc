"""Weights beside a model: checked, shared, never read and never copied unasked."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes import external_data
from graph_passes.errors import GraphError
from graph_passes.pipeline import inspect, rewrite
from tests.graph_passes import builder, running

DATA = "weights.data"
BYTES = 64 * 16 * 4


def model_with_weights(
    folder: Path, *, location: str = DATA, offset: int = 4096, size: int | None = None, shape: tuple[int, ...] = (64, 16)
) -> Path:
    """An attention beside a look-up in a weight of another file.

    The file holds random numbers, or with `size` given that many bytes of a hole.
    """
    model = builder.attention()
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for k, v in (("location", location), ("offset", str(offset)), ("length", str(4 * int(np.prod(shape))))):
        weight.external_data.add(key=k, value=v)
    model.graph.initializer.append(weight)
    model.graph.node.append(helper.make_node("Gather", ["weight", "attention_mask"], ["looked_up"], name="look_up"))
    model.graph.output.append(helper.make_tensor_value_info("looked_up", TensorProto.FLOAT, [None] * 3))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    if ".." not in location and not location.startswith("/"):
        (folder / location).parent.mkdir(exist_ok=True, parents=True)
        if size is None:
            content = np.random.default_rng(0).standard_normal(shape).astype(np.float32).tobytes()
            (folder / location).write_bytes(bytes(offset) + content)
        else:
            with (folder / location).open("wb") as file:
                os.truncate(file.fileno(), size)
    return path


def equal(path: Path, out: Path) -> None:
    data = builder.feeds(onnx.load(path, load_external_data=False), 2, 24, 3, pad="left")
    expected, got = running.Session(path)(data), running.Session(out)(data)
    assert (expected["looked_up"] == got["looked_up"]).all()
    assert np.abs(got["looked_up"]).min() > 0


def test_same_folder_shares_the_file(tmp_path: Path) -> None:
    path = model_with_weights(tmp_path)
    before = {f: f.stat().st_ino for f in tmp_path.iterdir()}
    out, report = running.rewritten(path)
    assert report.weights == (DATA,)
    assert {f: f.stat().st_ino for f in tmp_path.iterdir() if f != out} == before
    a, b = ({t.name: t for t in onnx.load(p, load_external_data=False).graph.initializer}["weight"] for p in (path, out))
    assert a.SerializeToString() == b.SerializeToString()
    assert onnx.load(out).graph.initializer  # ONNX itself finds the weights
    equal(path, out)


def test_a_folder_above_reaches_down(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = model_with_weights(inner)
    out = tmp_path / "model.sa.onnx"
    report = rewrite(path, out, running.EXACT)
    assert report.weights == (f"inner/{DATA}",)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["inner", "model.sa.onnx"]
    equal(path, out)


def can_clone(folder: Path) -> bool:
    with (folder / "a").open("wb") as a, (folder / "b").open("wb") as b:
        try:
            fcntl.ioctl(b.fileno(), external_data._FICLONE, a.fileno())
        except OSError:
            return False
        return True


def test_another_folder_gets_a_clone_or_a_refusal(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    path = model_with_weights(here)
    if can_clone(tmp_path):
        rewrite(path, there / "model.sa.onnx", running.EXACT)
        equal(path, there / "model.sa.onnx")
        return
    with pytest.raises(GraphError, match=r"cannot be shared .* ask for a copy of the weights"):
        rewrite(path, there / "model.sa.onnx", running.EXACT)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("weights", ["copy", "hardlink"])
def test_another_folder_when_asked(weights: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    path = model_with_weights(here, location="deep/weights.data")
    out = there / "model.sa.onnx"
    rewrite(path, out, running.EXACT, weights=weights)
    assert (there / "deep" / DATA).samefile(here / "deep" / DATA) == (weights == "hardlink")
    equal(path, out)
    if weights == "hardlink":
        rewrite(path, out, running.EXACT, weights=weights, force=True)  # the link that is there already is the file


def test_a_stranger_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (there / DATA).write_text("mine")
    with pytest.raises(GraphError, match="is not the weights file of this model"):
        rewrite(model_with_weights(here), there / "model.sa.onnx", running.EXACT, weights="copy")
    assert (there / DATA).read_text() == "mine"
    assert not (there / "model.sa.onnx").exists()


def test_a_failed_write_takes_its_weights_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    path = model_with_weights(here)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GraphError, match="no space is left on the disk"):
        rewrite(path, there / "model.sa.onnx", running.EXACT, weights="copy")
    assert list(there.iterdir()) == []


def test_unknown_way_of_sharing(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="allowed is one of share, copy, hardlink"):
        rewrite(model_with_weights(tmp_path), tmp_path / "o.onnx", weights="symlink")


def test_missing(tmp_path: Path) -> None:
    path = model_with_weights(tmp_path)
    (tmp_path / DATA).unlink()
    with pytest.raises(GraphError, match=r"weights file .*weights\.data is missing \(it holds weight\)"):
        inspect(path)


def test_cut_off(tmp_path: Path) -> None:
    path = model_with_weights(tmp_path, size=4096 + BYTES - 1)
    with pytest.raises(GraphError, match=f"has {4096 + BYTES - 1} bytes, but weight ends at byte {4096 + BYTES}"):
        inspect(path)
    model_with_weights(tmp_path, size=4096 + BYTES)
    assert inspect(path).ok


def test_a_length_that_is_too_small_for_the_shape_does_not_hide_a_cut(tmp_path: Path) -> None:
    path = model_with_weights(tmp_path, size=4096 + 8)
    model = onnx.load(path, load_external_data=False)
    next(e for t in model.graph.initializer for e in t.external_data if e.key == "length").value = "8"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="is cut off"):
        inspect(path)


@pytest.mark.parametrize("location", ["../weights.data", "/weights.data"])
def test_outside_of_the_folder(location: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="only files inside the model's folder"):
        inspect(model_with_weights(tmp_path, location=location))


def test_widths_of_element_types() -> None:
    """Five elements: narrow types share bytes."""
    sizes = {
        "FLOAT": 20,
        "FLOAT16": 10,
        "BFLOAT16": 10,
        "DOUBLE": 40,
        "INT8": 5,
        "BOOL": 5,
        "INT4": 3,
        "UINT4": 3,
        "FLOAT8E4M3FN": 5,
        "COMPLEX64": 40,
    }
    for name, size in sizes.items():
        assert external_data._size(TensorProto(data_type=TensorProto.DataType.Value(name), dims=[5])) == size, name


# VmHWM is this program's own peak; ru_maxrss would count the process that it was forked from.
MEASURE = """
import re, sys
from pathlib import Path
from graph_passes.pipeline import rewrite
report = rewrite(Path(sys.argv[1]), Path(sys.argv[2]))
assert report.rewritten == 1
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_peak_memory_with_two_gigabytes_of_weights(tmp_path: Path) -> None:
    elements = 2**31 // 4
    path = model_with_weights(tmp_path, size=4096 + 2**31, shape=(elements // 1024, 1024))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "out.onnx")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) < 300, "MiB; the limit that is promised is 500"
    assert (tmp_path / "out.onnx").stat().st_size < 2**20
    assert (tmp_path / DATA).stat().st_blocks * 512 < 2**20, "the sparse file was filled"
