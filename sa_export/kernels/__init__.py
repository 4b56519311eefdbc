"""The CUDA kernels of the operator, called from Python on torch tensors (ctypes; importing this package loads nothing).

The library is libsample_attention_kernels.so of `plugins/`; `SA_EXPORT_KERNELS` names another file.
"""

from sa_export.kernels.native import Problem, find_library
from sa_export.kernels.ops import (
    Call,
    Lists,
    Support,
    attend,
    build_info,
    decode,
    filter_blocks,
    is_full,
    make_problem,
    prefill,
    run,
    sample,
    supports,
    workspace_bytes,
)

__all__ = [
    "Call",
    "Lists",
    "Problem",
    "Support",
    "attend",
    "build_info",
    "decode",
    "filter_blocks",
    "find_library",
    "is_full",
    "make_problem",
    "prefill",
    "run",
    "sample",
    "supports",
    "workspace_bytes",
]
