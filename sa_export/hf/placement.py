"""Where an exported graph's weights lie: in the checkpoint's own files where ONNX allows it, in a data file otherwise.

ONNX reaches external data in the model's folder and below it. onnx 1.23 (`onnx.load`, `onnx.checker`) and ONNX Runtime 1.31 refuse
paths that leave the folder and links that do; onnx refuses hard-linked files as well, ONNX Runtime reads them. Neither asks for an
alignment of the offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graph_passes import external_data
from graph_passes.errors import GraphError
from sa_export.errors import UserError
from sa_export.files import check_space
from sa_export.hf.origin import Origin
from sa_export.hf.progress import Progress

__all__ = ["HARDLINK_BYTES", "WEIGHTS", "Placement", "place"]

WEIGHTS = ("auto", "reference", "hardlink", "copy")
"""`reference`: the checkpoint's files as they lie, for an output in their folder. `hardlink`: a second name of each file in the output
folder. `copy`: a data file. `auto`: by reference in the checkpoint's folder; elsewhere a copy-on-write clone where the file system can
make one, a hard link for weights above `HARDLINK_BYTES`, a copy for less."""
HARDLINK_BYTES = 2**31
_CHUNK = 2**25
_ALIGNMENT = 4096


@dataclass(frozen=True)
class Placement:
    """Where the weights of an export are, in bytes."""

    how: str
    """"reference", "clone", "hardlink" or "copy"; "inside" the model file; "none": to be attached later."""
    files: tuple[str, ...] = ()
    """External files, relative to the model's folder."""
    referenced: int = 0
    """In the checkpoint's files, neither read nor written."""
    written: int = 0
    """Written by the export."""
    converted: int = 0
    """Of those, in another element type than the checkpoint's."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "files": list(self.files)}


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight of the graphs: its tensor protos, and what its values come from."""

    protos: tuple[Any, ...]
    tensor: Any
    origin: Origin | None

    @property
    def bytes(self) -> int:
        return int(self.tensor.numel()) * int(_torch_type(self.protos[0].data_type).itemsize)

    @property
    def same_type(self) -> bool:
        return bool(self.tensor.dtype == _torch_type(self.protos[0].data_type))


def place(
    models: Sequence[Any],
    tensors: Mapping[str, Any],
    where: Mapping[str, Origin],
    folder: Path,
    data_file: str,
    *,
    how: str,
    checkpoint: Path,
    named: str,
    progress: Progress,
) -> Placement:
    """Gives the pending weights of graphs their values, and changes the graphs in place to say where they are.

    Args:
        models: `onnx.ModelProto`s of one folder; weights of one name are the same weight in all of them.
        tensors: the values, by the names of the weights; those with an origin are not touched.
        where: where tensors lie on disk.
        folder: of the models. Files are made in it.
        data_file: name of the file for weights that are written.
        how: one of `WEIGHTS`, or "inside".
        checkpoint: the folder of the weight files.
        named: how the user named the checkpoint, for sentences.
        progress: stage "write".

    Raises:
        UserError: a weight is missing or has another shape, `how` is not possible, or there is no space.
    """
    weights = _match(models, tensors, where, named)
    if how == "inside":
        for weight in weights.values():
            _put_inside(weight)
        return Placement("inside", written=sum(w.bytes for w in weights.values()))
    kept = {name: w for name, w in weights.items() if w.origin is not None and w.same_type}
    chosen = _choose(how, kept, folder, checkpoint, named) if kept else "copy"
    if chosen == "copy":
        kept = {}
    _bring(chosen, kept, folder, checkpoint)
    for weight in kept.values():
        assert weight.origin is not None
        _relocate(weight, weight.origin.path.relative_to(checkpoint).as_posix(), weight.origin.offset)
    rest = {name: w for name, w in weights.items() if name not in kept}
    # A stage is named to the user by the folder that it is made in; both are on one disk.
    check_space(folder.parent if folder.suffix == ".partial" else folder, sum(w.bytes for w in rest.values()))
    if rest:
        _write(rest, folder / data_file, progress)
    located = sorted({item.location for model in models for item in external_data.external_tensors(model)})
    return Placement(
        chosen,
        tuple(located),
        referenced=sum(w.bytes for w in kept.values()),
        written=sum(w.bytes for w in rest.values()),
        converted=sum(w.bytes for w in rest.values() if not w.same_type),
    )


def _match(models: Sequence[Any], tensors: Mapping[str, Any], where: Mapping[str, Origin], named: str) -> dict[str, _Weight]:
    protos: dict[str, list[Any]] = {}
    for model in models:
        for item in external_data.external_tensors(model):
            protos.setdefault(item.tensor.name, []).append(item.tensor)
    weights = {}
    for name, found in protos.items():
        if name not in tensors:
            raise UserError(f"{named} lacks the weight {name} that the graph needs; give the checkpoint of the same configuration.")
        tensor = tensors[name]
        if list(tensor.shape) != list(found[0].dims):
            raise UserError(
                f"{named} has {name} with the shape {list(tensor.shape)}, the graph needs {list(found[0].dims)}; "
                f"give the checkpoint of the same configuration."
            )
        weights[name] = _Weight(tuple(found), tensor, where.get(name))
    return weights


def _choose(how: str, kept: dict[str, _Weight], folder: Path, checkpoint: Path, named: str) -> str:
    beside = folder.samefile(checkpoint)
    files = {w.origin.path for w in kept.values() if w.origin is not None}
    linked = next((path for path in sorted(files) if path.is_symlink()), None)
    if beside and linked is not None:
        raise UserError(
            f"{linked} is a link, as in the cache of the hub, and ONNX refuses links out of the model's folder; choose another output folder."
        )
    if how == "reference" and not beside:
        raise UserError(
            f"The weights of {named} cannot be referenced from another folder, since ONNX reaches files in the model's folder only; "
            f"give {checkpoint} as the output, or another --weights ({', '.join(w for w in WEIGHTS if w != 'reference')})."
        )
    if how == "copy" or (beside and how in ("auto", "reference")):
        return "copy" if how == "copy" else "reference"
    if how == "hardlink":
        return how
    if all(external_data.can_clone(path.resolve(), folder) for path in files):
        return "clone"
    large = sum(w.bytes for w in kept.values()) > HARDLINK_BYTES
    return "hardlink" if large and all(path.stat().st_dev == folder.stat().st_dev for path in files) else "copy"


def _bring(chosen: str, kept: dict[str, _Weight], folder: Path, checkpoint: Path) -> None:
    """Makes the weight files of the checkpoint appear in `folder` under their names."""
    if chosen not in ("clone", "hardlink"):
        return
    for path in dict.fromkeys(w.origin.path for w in kept.values() if w.origin is not None):
        new = folder / path.relative_to(checkpoint)
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            external_data.bring(path.resolve(), new, chosen)
        except GraphError as error:
            raise UserError(str(error)) from None


def _write(weights: dict[str, _Weight], path: Path, progress: Progress) -> None:
    """One tensor after the other, in the order of the files they come from, a bounded piece at a time."""
    total, done = max(sum(w.bytes for w in weights.values()), 1), 0
    ordered = sorted(weights.values(), key=lambda w: (str(w.origin.path), w.origin.offset) if w.origin else ("", 0))
    with path.open("xb") as file:
        for weight in ordered:
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.seek(offset)
            for piece in _pieces(weight):
                file.write(piece)
                done += len(piece)
                progress("write", done / total)
            _relocate(weight, path.name, offset)


def _pieces(weight: _Weight) -> Iterator[memoryview]:
    """The values of a weight in the graph's element type, little-endian, in pieces of bounded size."""
    import torch

    target = _torch_type(weight.protos[0].data_type)
    source = weight.tensor.dtype

    def converted(values: Any) -> memoryview:
        return memoryview(values.to(target).view(torch.uint8).numpy())

    if weight.origin is None:
        flat = weight.tensor.detach().reshape(-1)
        step = max(_CHUNK // source.itemsize, 1)
        for start in range(0, flat.numel(), step):
            yield converted(flat[start : start + step])
        return
    # Read, not mapped: pages of a mapping count as this process's memory, those of a read go through one buffer.
    with weight.origin.path.open("rb", buffering=0) as file:
        file.seek(weight.origin.offset)
        left = weight.origin.length
        buffer = bytearray(min(_CHUNK, left))
        while left:
            view = memoryview(buffer)[: min(left, len(buffer))]
            got = file.readinto(view)
            got -= got % source.itemsize
            if not got:
                raise UserError(f"{weight.origin.path} ended while it was read; fetch or save the checkpoint again.")
            file.seek(weight.origin.offset + weight.origin.length - left + got)
            yield view[:got] if weight.same_type else converted(torch.frombuffer(view[:got], dtype=source))
            left -= got


def _put_inside(weight: _Weight) -> None:
    content = b"".join(weight_piece.tobytes() for weight_piece in _pieces(weight))
    for proto in weight.protos:
        proto.ClearField("external_data")
        proto.ClearField("data_location")
        proto.raw_data = content


def _relocate(weight: _Weight, location: str, offset: int) -> None:
    for proto in weight.protos:
        del proto.external_data[:]
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(weight.bytes))):
            entry = proto.external_data.add()
            entry.key, entry.value = key, value


def _torch_type(number: int) -> Any:
    import torch
    from onnx import TensorProto

    names = {"FLOAT": "float32", "DOUBLE": "float64", "UINT8": "uint8", "INT8": "int8"}
    name = TensorProto.DataType.Name(number)
    return getattr(torch, names.get(name, name.lower()))
