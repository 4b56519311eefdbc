"""Weights that lie beside a model: they are checked and shared, never read.

ONNX (External Data) gives each tensor a file relative to the model's folder, an offset and a length. The file may lie in the
folder or below it. ONNX's checker (seen in 1.23) and ONNX Runtime refuse paths and symbolic links that leave it; the checker
also refuses a hard-linked file, and then the original model with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from graph_passes.errors import GraphError

__all__ = ["PENDING", "WEIGHTS", "ExternalTensor", "bring", "can_clone", "external_tensors", "is_pending", "place", "verify"]

WEIGHTS = ("share", "copy", "hardlink")
"""How a model written to another folder gets its weights. `share`: the file itself where the new folder reaches it, else a
copy-on-write clone that takes no space where the file system can make one, else a refusal. `hardlink`: the ONNX checker then
refuses both models, ONNX Runtime runs them."""

PENDING = "sample_attention.weights_pending"
"""Key of a model's metadata that says that its weights are attached later: their files need not exist yet."""

_FICLONE = 0x40049409  # <linux/fs.h>


@dataclass(frozen=True)
class ExternalTensor:
    """Where one tensor's bytes lie."""

    tensor: onnx.TensorProto
    location: str
    offset: int
    length: int


def external_tensors(model: onnx.ModelProto) -> Iterator[ExternalTensor]:
    """The tensors of a model, subgraphs included, whose bytes lie in other files.

    Raises:
        GraphError: an entry has no location, or an offset or a length that is no number.
    """
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        needed = _size(tensor)
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
        except ValueError:
            raise GraphError(
                f"The tensor {tensor.name} has an external offset or length that is no number; export the model again."
            ) from None
        if not entries.get("location"):
            raise GraphError(
                f"The tensor {tensor.name} is stored outside of the model, but the model does not say where; export the model again."
            )
        yield ExternalTensor(tensor, entries["location"], offset, max(length, needed))


def is_pending(model: onnx.ModelProto) -> bool:
    """Whether the model waits for its weights (`PENDING`)."""
    return any(p.key == PENDING for p in model.metadata_props)


def verify(model: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """Checks that every external file exists and is long enough, without reading it; nothing is asked of a pending model.

    Args:
        model: a model whose external data are not loaded.
        folder: the folder of the model's file.

    Returns:
        For each location its size in bytes.

    Raises:
        GraphError: a file is missing, too short, or lies where ONNX does not allow it.
    """
    if is_pending(model):
        return {}
    ends: dict[str, tuple[int, str]] = {}
    for item in external_tensors(model):
        end = item.offset + item.length
        if end > ends.get(item.location, (-1, ""))[0]:
            ends[item.location] = (end, item.tensor.name)
    sizes: dict[str, int] = {}
    for location, (end, name) in ends.items():
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise GraphError(
                f"The model keeps weights in {location}, but ONNX allows only files inside the model's folder; "
                f"save the model again with its weights beside it."
            )
        path = folder / location
        if not path.is_file():
            raise GraphError(f"The weights file {path} is missing (it holds {name}); put it beside the model or export the model again.")
        sizes[location] = path.stat().st_size
        if sizes[location] < end:
            raise GraphError(
                f"The weights file {path} has {sizes[location]} bytes, but {name} ends at byte {end}: "
                f"it is cut off or belongs to another model; copy or export it again."
            )
    return sizes


def place(model: onnx.ModelProto, source: Path, target: Path, weights: str = "share") -> list[Path]:
    """Makes the external files of `model` reachable from another folder.

    Args:
        model: locations are rewritten in place where the file is reached by another path.
        source, target: folders of the original and of the new model, both existing.
        weights: one of `WEIGHTS`.

    Returns:
        The files that were made.

    Raises:
        GraphError: `weights` is unknown, the files cannot be shared, or a different file stands in the way.
    """
    if weights not in WEIGHTS:
        raise GraphError(f"weights is {weights!r}; allowed is one of {', '.join(WEIGHTS)}.")
    items = list(external_tensors(model))
    if target.resolve() == source.resolve():
        return []
    if is_pending(model):
        raise GraphError(
            f"The model in {source} has no weights yet; write the output into the same folder, so that weights can be attached to both."
        )
    made: list[Path] = []
    try:
        for location in dict.fromkeys(item.location for item in items):
            file = (source / location).resolve()
            if weights == "share" and file.is_relative_to(target.resolve()):
                below = file.relative_to(target.resolve()).as_posix()
                for item in items:
                    if item.location == location:
                        _relocate(item.tensor, below)
                continue
            new = target / location
            if new.exists():
                if new.samefile(file):
                    continue
                raise GraphError(
                    f"{new} exists and is not the weights file of this model; choose another output folder or move that file away."
                )
            new.parent.mkdir(parents=True, exist_ok=True)
            made.append(new)
            bring(file, new, {"share": "clone"}.get(weights, weights))
    except BaseException:
        for new in made:
            new.unlink(missing_ok=True)
        raise
    return made


def bring(file: Path, new: Path, how: str) -> None:
    """Makes the file appear as `new`: a "clone", a "copy" or a "hardlink".

    Raises:
        GraphError: the file system cannot, or there is no space.
    """
    _BRING[how](file, new)


def can_clone(file: Path, folder: Path) -> bool:
    """Whether `folder` can hold a copy-on-write clone of the file."""
    probe = folder / f".{file.name}.{os.getpid()}.clone"
    try:
        _share_blocks(file, probe)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _share_blocks(file: Path, new: Path) -> None:
    with file.open("rb") as source, new.open("wb") as target:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())


def _clone(file: Path, new: Path) -> None:
    """A copy-on-write clone: the blocks are shared by the file system, no byte is copied."""
    try:
        _share_blocks(file, new)
    except OSError:
        new.unlink(missing_ok=True)
        raise GraphError(
            f"The weights {file} cannot be shared with a model in {new.parent}, since ONNX allows only files inside the model's "
            f"folder; write the output into {file.parent} or a folder above it, or ask for a copy of the weights ({_mib(file)})."
        ) from None


def _copy(file: Path, new: Path) -> None:
    free = shutil.disk_usage(new.parent).free
    if free < file.stat().st_size:
        raise GraphError(
            f"{new.parent} has {free / 2**20:.0f} MiB free, but the weights {file.name} take {_mib(file)}; "
            f"free some space or choose another folder."
        )
    shutil.copyfile(file, new)


def _mib(file: Path) -> str:
    return f"{file.stat().st_size / 2**20:.0f} MiB"


def _hardlink(file: Path, new: Path) -> None:
    try:
        os.link(file, new)
    except OSError as error:
        raise GraphError(
            f"The weights {file} cannot be hard-linked to {new} ({error.strerror}); both must lie on one file system, or ask for a copy."
        ) from None


_BRING = {"clone": _clone, "copy": _copy, "hardlink": _hardlink}


def _relocate(tensor: onnx.TensorProto, location: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def _size(tensor: onnx.TensorProto) -> int:
    count = 1
    for n in tensor.dims:
        count *= n
    bits = _BITS.get(tensor.data_type)
    return 0 if bits is None else -(-count * bits // 8)


def _bits() -> dict[int, int]:
    """Width of each element type: two or four elements of the narrow ones share a byte."""
    narrow = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
    out: dict[int, int] = {}
    for name, number in onnx.TensorProto.DataType.items():
        if name in narrow:
            out[number] = narrow[name]
        elif name not in ("UNDEFINED", "STRING"):
            out[number] = 8 * onnx.helper.tensor_dtype_to_np_dtype(number).itemsize
    return out


_BITS = _bits()


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sub in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(sub)
