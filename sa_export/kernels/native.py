"""The kernel library: where it is, its C structs, and loading it."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from sa_export.errors import UserError

__all__ = ["ABI_VERSION", "BlockLists", "PrefillParams", "Problem", "Support", "Tensor", "find_library", "load", "message_of"]

ABI_VERSION = 3
_NAME = "libsample_attention_kernels.so"
_VARIABLE = "SA_EXPORT_KERNELS"
_MESSAGE_BYTES = 512  # of sa_support.text too


class Problem(ctypes.Structure):
    """`sa_problem` of plugins/include/sample_attention/types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("policy", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("alpha", "alpha_slash", "max_density")),
        *((name, ctypes.c_int32) for name in ("stride", "sample_rows", "value_weight", "segment")),
        *((name, ctypes.c_float) for name in ("sample_ratio", "window_ratio")),
        *((name, ctypes.c_int32) for name in ("block_q", "block_k", "window", "sink", "dense_rows", "min_length")),
        *((name, ctypes.c_int32) for name in ("has_key_mask", "has_certificate", "path")),
        ("scratch_bytes", ctypes.c_int64),
    ]


class Support(ctypes.Structure):
    """`sa_support`."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("code", "path", "select_path", "reserved")),
        ("text", ctypes.c_char * _MESSAGE_BYTES),
    ]


class Tensor(ctypes.Structure):
    """`sa_tensor`: a device pointer and strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("stride_b", "stride_h", "stride_s"))]


class BlockLists(ctypes.Structure):
    """`sa_block_lists`."""

    _fields_ = [
        ("counts", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("first_tile", "tiles", "capacity")),
    ]


class PrefillParams(ctypes.Structure):
    """`sa_prefill_params`."""

    _fields_ = [
        ("problem", Problem),
        *((name, Tensor) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_void_p) for name in ("alpha", "bounds", "lse", "alpha_slash", "key_mask", "certificate")),
        *((name, ctypes.c_void_p) for name in ("host_alpha", "host_alpha_slash")),
    ]


def find_library() -> Path:
    """The library's path: the environment variable SA_EXPORT_KERNELS, or the installed package.

    Raises UserError with the cure when there is none.
    """
    if named := os.environ.get(_VARIABLE):
        if not Path(named).is_file():
            raise UserError(f"{_VARIABLE} is {named!r}, which is not a file; set it to the path of {_NAME}, or unset it.")
        return Path(named)
    installed = Path(__file__).resolve().parent.parent / "lib" / _NAME
    if not installed.is_file():
        raise UserError(
            f"The CUDA kernels are not built ({_NAME} is not in {installed.parent}); install with SA_CUDA=ON and nvcc on the PATH, "
            f"or build with cmake and set {_VARIABLE} to the library."
        )
    return installed


@cache
def load() -> ctypes.CDLL:
    """The opened library, its signatures set and its ABI version checked. Raises UserError."""
    path = find_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error}; rebuild it on this machine.") from None
    pointer, size, text, code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int32
    problem, params, lists = ctypes.POINTER(Problem), ctypes.POINTER(PrefillParams), ctypes.POINTER(BlockLists)
    workspace = (pointer, ctypes.c_int64)
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "sa_abi_version": (code, ()),
        "sa_build_info": (text, ()),
        "sa_supports": (code, (problem, code, ctypes.POINTER(Support))),
        "sa_path_name": (text, (code,)),
        "sa_is_full": (code, (problem,)),
        "sa_workspace_bytes": (ctypes.c_int64, (problem,)),
        "sa_chunk_tiles": (code, (problem,)),
        "sa_mass_rows": (code, (problem, code)),
        "sa_run": (code, (params, *workspace, pointer, text, size)),
        "sa_sample": (code, (params, code, code, pointer, *workspace, pointer, text, size)),
        "sa_filter": (code, (params, pointer, lists, *workspace, pointer, text, size)),
        "sa_attend": (code, (params, lists, *workspace, pointer, text, size)),
        "sa_decode": (code, (params, *workspace, pointer, text, size)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if (version := library.sa_abi_version()) != ABI_VERSION:
        raise UserError(f"{path} has ABI version {version}, this package needs {ABI_VERSION}; rebuild the library from the same sources.")
    return library


def message_of(name: str, *arguments: object) -> tuple[int, str]:
    """Calls a function that ends in (message, size); returns its code and its sentence."""
    buffer = ctypes.create_string_buffer(_MESSAGE_BYTES)
    code = getattr(load(), name)(*arguments, buffer, _MESSAGE_BYTES)
    return code, buffer.value.decode()
