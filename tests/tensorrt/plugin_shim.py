"""One plugin object, driven from Python through tests/cpp/shim.cpp: create it from fields, give it shapes, call its enqueue."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graph_passes.op import ATTRIBUTES

# PluginFieldType and DataType of TensorRT's headers.
FLOAT32, FLOAT64, INT32, CHAR, INT64 = 1, 2, 5, 6, 10
TYPES = {"float32": 0, "float16": 1, "int32": 3, "bool": 4, "int8": 2, "bfloat16": 7, "int64": 8}
BUILD, RUNTIME = 0, 1
_MESSAGE = 4096


@dataclass(frozen=True)
class Field:
    """A plugin field: `values` are its bytes; `length` is the number of values that it claims."""

    type: int
    values: bytes | None
    length: int


def to_field(value: Any) -> Field:
    """As NVIDIA's ONNX parser makes it: INT -> INT32, FLOAT and FLOATS -> FLOAT32, STRING -> CHAR with its terminator."""
    if isinstance(value, str):
        return Field(CHAR, value.encode() + b"\0", len(value) + 1)
    if isinstance(value, int):
        return Field(INT32, np.int32(value).tobytes(), 1)
    values = np.atleast_1d(np.asarray(value, np.float32))
    return Field(FLOAT32, values.tobytes(), len(values))


def node_fields(attributes: Mapping[str, Any]) -> dict[str, Field]:
    """The fields that the parser passes for a node: its attributes but those that it looks the plugin up by."""
    return {a.name: to_field(attributes[a.name]) for a in ATTRIBUTES if not a.name.startswith("plugin_")}


@dataclass
class Layer:
    """One plugin object. `close` destroys it."""

    door: Door
    handle: int
    _shape: tuple = field(default=(), repr=False)

    def shape(self, inputs: Sequence[tuple[str, Sequence[int]]], outputs: Sequence[tuple[str, Sequence[int]]]) -> tuple[int, str]:
        """inputs, outputs: (type, shape). Returns (bytes of workspace or -1, the sentences that were logged)."""

        def flat(tensors):
            types = (ctypes.c_int32 * len(tensors))(*(TYPES[t] for t, _ in tensors))
            ranks = (ctypes.c_int32 * len(tensors))(*(len(s) for _, s in tensors))
            extents = [n for _, s in tensors for n in s]
            return len(tensors), types, ranks, (ctypes.c_int64 * len(extents))(*extents)

        message = ctypes.create_string_buffer(_MESSAGE)
        size = self.door.lib.shim_shape(self.door.library, self.handle, *flat(inputs), *flat(outputs), message, _MESSAGE)
        return size, message.value.decode().strip()

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int = 0) -> None:
        """Addresses of memory where the library works: host with the reference backend, else device. Raises RuntimeError with the sentence."""
        message = ctypes.create_string_buffer(_MESSAGE)
        addresses = [(ctypes.c_void_p * len(a))(*a) for a in (inputs, outputs)]
        if self.door.lib.shim_enqueue(self.door.library, self.handle, *addresses, workspace, stream, message, _MESSAGE):
            raise RuntimeError(message.value.decode())

    def timing_cache_id(self) -> str:
        text = ctypes.create_string_buffer(_MESSAGE)
        self.door.lib.shim_timing_cache_id(self.handle, text, _MESSAGE)
        return text.value.decode()

    def close(self) -> None:
        self.door.lib.shim_destroy(self.handle)
        self.handle = 0


class Door:
    """The shim with one plugin library open."""

    def __init__(self, shim: Path, plugin: Path) -> None:
        self.lib = ctypes.CDLL(str(shim))
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        for name, result, arguments in (
            ("open", pointer, [text, text, size]),
            ("fields", None, [pointer, text, size]),
            ("identity", None, [pointer, text, size]),
            ("create", pointer, [pointer, text, ctypes.c_int32, *[pointer] * 4, ctypes.c_int32, text, size]),
            ("destroy", None, [pointer]),
            ("timing_cache_id", None, [pointer, text, size]),
            ("shape", ctypes.c_int64, [pointer, pointer, *[ctypes.c_int32, pointer, pointer, pointer] * 2, text, size]),
            ("enqueue", ctypes.c_int32, [pointer, pointer, pointer, pointer, pointer, pointer, text, size]),
        ):
            function = getattr(self.lib, f"shim_{name}")
            function.restype, function.argtypes = result, arguments
        message = ctypes.create_string_buffer(_MESSAGE)
        self.library = self.lib.shim_open(str(plugin).encode(), message, _MESSAGE)
        if not self.library:
            raise RuntimeError(message.value.decode())

    def identity(self) -> list[str]:
        """Name, version, namespace of the creator."""
        text = ctypes.create_string_buffer(_MESSAGE)
        self.lib.shim_identity(self.library, text, _MESSAGE)
        return text.value.decode().split("|")

    def fields(self) -> list[tuple[str, int, int]]:
        """(name, type, length) of each advertised field."""
        text = ctypes.create_string_buffer(_MESSAGE)
        self.lib.shim_fields(self.library, text, _MESSAGE)
        return [(n, int(t), int(s)) for n, t, s in (line.split() for line in text.value.decode().splitlines())]

    def create(
        self, fields: Mapping[str, Field] | Sequence[tuple[str, Field]], name: str = "layer0", phase: int = BUILD
    ) -> tuple[Layer | None, str]:
        """A layer, or None and the sentence of the refusal."""
        items = list(fields.items()) if isinstance(fields, Mapping) else list(fields)
        count = len(items)
        names = (ctypes.c_char_p * count)(*(n.encode() for n, _ in items))
        types = (ctypes.c_int32 * count)(*(f.type for _, f in items))
        lengths = (ctypes.c_int32 * count)(*(f.length for _, f in items))
        # The plugin must copy what it needs: the buffers are overwritten after the call.
        buffers = [None if f.values is None else ctypes.create_string_buffer(f.values, len(f.values)) for _, f in items]
        data = (ctypes.c_void_p * count)(*(0 if b is None else ctypes.addressof(b) for b in buffers))
        message = ctypes.create_string_buffer(_MESSAGE)
        handle = self.lib.shim_create(self.library, name.encode(), count, names, types, lengths, data, phase, message, _MESSAGE)
        for b in buffers:
            if b is not None:
                ctypes.memset(b, 0xDB, len(b))
        return (Layer(self, handle) if handle else None), message.value.decode()
