"""Whether the weight files of a checkpoint are whole, told from their headers alone."""

from __future__ import annotations

import json
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from sa_export.errors import UserError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_AGAIN = "fetch or save the checkpoint again"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADER_LIMIT = 100_000_000
"""The safetensors format bounds its JSON header to this many bytes."""


def check_weights(folder: Path) -> tuple[Path, ...]:
    """The weight files that `transformers` will read from `folder`, each checked to be complete.

    A safetensors file is an 8-byte little-endian length N, N bytes of JSON, and tensors at the offsets that the JSON names
    (safetensors format, version 0.3 and later); a file shorter than its offsets promise is truncated. No tensor is read.

    Raises:
        UserError: no weights, a shard is missing, or a file is truncated or corrupt.
    """
    for name in _SINGLE:
        if (path := folder / name).is_file():
            _check_file(path)
            return (path,)
        if (index := folder / f"{name}.index.json").is_file():
            return _check_shards(index)
    raise UserError(
        f"{folder} has config.json but no weights (model.safetensors, pytorch_model.bin or their shards); "
        f"give a complete checkpoint, or ask for random weights (--random-weights)."
    )


def _check_shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a valid index of weight shards; {_AGAIN}.") from error
    paths = tuple(index.parent / name for name in names)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{index.parent} lacks the weight shard {missing[0]}{more} that {index.name} names; {_AGAIN}.")
    held = {path.name: _check_file(path) for path in paths}
    for tensor, name in weight_map.items():
        tensors = held[name]
        if tensors is not None and tensor not in tensors:
            raise UserError(f"{index.parent / name} lacks the tensor {tensor} that {index.name} puts there; {_AGAIN}.")
    return paths


def _check_file(path: Path) -> frozenset[str] | None:
    """The names of the tensors in a safetensors file; None for a pickle, which is only checked to be a whole archive."""
    if path.suffix == ".safetensors":
        return _safetensors_names(path)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or corrupt (not a PyTorch archive); {_AGAIN}.")
    return None


def stored_dtype(files: tuple[Path, ...]) -> str | None:
    """The element type (float32, float16 or bfloat16) of most bytes in checked safetensors files; None for other files."""
    held: Counter[str] = Counter()
    for path in files:
        if path.suffix != ".safetensors":
            return None
        for entry in safetensors_header(path).values():
            held[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    known = {name: count for name, count in held.items() if name in _FLOATS}
    return _FLOATS[max(known, key=lambda name: known[name])] if known else None


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name -> dtype, shape, data_offsets of each tensor of a checked safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def _safetensors_names(path: Path) -> frozenset[str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= _HEADER_LIMIT:
            raise UserError(f"{path} is truncated or corrupt: its first 8 bytes are no safetensors header length; {_AGAIN}.")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path} is truncated: its header has {length} bytes, the whole file {size}; {_AGAIN}.")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is corrupt: its safetensors header is not readable; {_AGAIN}.") from error
    if size != end:
        state = "truncated" if size < end else "corrupt"
        raise UserError(f"{path} is {state}: its header accounts for {end} bytes, the file has {size}; {_AGAIN}.")
    return frozenset(header)
