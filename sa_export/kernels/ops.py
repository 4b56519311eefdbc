"""The kernels on torch CUDA tensors, by pointer, on torch's current stream.

Letters: B batch, Hq query heads, Hkv key/value heads, S query rows, T keys, D head size, nQ query tiles, nK key blocks.
A call allocates what the caller does not pass (outputs, workspace); pass them to capture a CUDA graph or to time the kernels alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.op import Policy
from sa_export.errors import UserError
from sa_export.kernels.native import BlockLists, PrefillParams, Problem, Tensor, load, message_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Call",
    "Lists",
    "attend",
    "build_info",
    "decode",
    "filter_blocks",
    "is_full",
    "make_problem",
    "prefill",
    "sample",
    "supports",
    "workspace_bytes",
]

_POLICY_CODES = {"dense": 0, "residue": 1, "tile": 2, "column_slash": 3, "stripe_window": 4}
_DTYPE_CODES = {"float16": 0, "bfloat16": 1}


def make_problem(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    policy: Policy | None = None,
    *,
    dtype: str = "bfloat16",
    scale: float | None = None,
    softcap: float = 0.0,
    scratch_bytes: int = 0,
) -> Problem:
    """A problem as the library sees it. dtype: "float16" or "bfloat16"; scale: 1/sqrt(head_dim) when None; policy: dense when None."""
    policy = policy or Policy(policy="dense")
    return Problem(
        dtype=_DTYPE_CODES.get(dtype, -1),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None and head_dim > 0 else scale or 0.0,
        softcap=softcap,
        policy=_POLICY_CODES[policy.policy],
        # Per-head values travel as a device array. One head below 1 is enough for the problem not to be full attention.
        alpha=min(policy.alpha),
        stride=policy.stride,
        sample_rows=policy.sample_rows,
        value_weight=policy.value_weight,
        segment=policy.segment,
        sample_ratio=policy.sample_ratio,
        window_ratio=policy.window_ratio,
        block_q=policy.block_q,
        block_k=policy.block_k,
        window=policy.window,
        sink=policy.sink,
        dense_rows=policy.dense_rows,
        min_length=policy.min_length,
        scratch_bytes=scratch_bytes,
    )


def build_info() -> str:
    """What the library was built for."""
    return load().sa_build_info().decode()


def supports(problem: Problem, compute_capability: int = 90) -> tuple[bool, str]:
    """Whether the library computes the problem on a device of this compute capability (90 for 9.0), and if not, why. Needs no device."""
    code, sentence = message_of("sa_supports", ctypes.byref(problem), compute_capability)
    return code == 0, sentence


def is_full(problem: Problem) -> bool:
    """Whether the problem is full attention, exactly, by its policy and shape."""
    return bool(load().sa_is_full(ctypes.byref(problem)))


def workspace_bytes(problem: Problem) -> int:
    """Bytes of workspace of every stage; 0 when the problem is not supported."""
    return load().sa_workspace_bytes(ctypes.byref(problem))


@dataclass(frozen=True)
class Lists:
    """Block lists on the device: counts int32 [B, Hq, tiles], indices int32 [B, Hq, tiles, nK], for tiles first_tile onwards."""

    counts: torch.Tensor
    indices: torch.Tensor
    first_tile: int = 0

    def struct(self) -> BlockLists:
        return BlockLists(
            counts=self.counts.data_ptr(),
            indices=self.indices.data_ptr(),
            first_tile=self.first_tile,
            tiles=self.counts.shape[2],
            capacity=self.indices.shape[3],
        )


class Call:
    """One prepared call: the parameters and the tensors that they point to. Reusable; running it does nothing but launch kernels.

    query [B, Hq, S, D], key and value [B, Hkv, T, D]: float16 or bfloat16 on one CUDA device, last dimension contiguous.
    bounds: int32 [B, 2] on the device, first real key and one past the last, or None. lse: float32 [B, Hq, S] to be filled, or None.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        policy: Policy | None = None,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        bounds: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        scratch_bytes: int = 0,
    ) -> None:
        import torch

        if key.shape != value.shape:
            raise UserError(f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; the kernels need equal shapes.")
        policy = (policy or Policy(policy="dense")).for_heads(query.shape[1])
        self.problem = make_problem(
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[2],
            key.shape[2],
            query.shape[3],
            policy,
            dtype=str(query.dtype).removeprefix("torch."),
            scale=scale,
            softcap=softcap,
            scratch_bytes=scratch_bytes,
        )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.device.type != "cuda" or tensor.dtype != query.dtype or tensor.stride(-1) != 1:
                raise UserError(
                    f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; "
                    f"allowed is {query.dtype} on a CUDA device with a contiguous last dimension."
                )
        ok, why = supports(
            self.problem, 10 * torch.cuda.get_device_capability(query.device)[0] + torch.cuda.get_device_capability(query.device)[1]
        )
        if not ok:
            raise UserError(why)
        self.output = torch.empty_like(query, memory_format=torch.contiguous_format) if output is None else output
        self.lse = lse
        size = workspace_bytes(self.problem)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=query.device) if workspace is None else workspace
        self.alpha = torch.tensor(policy.alpha, dtype=torch.float32, device=query.device) if len(policy.alpha) > 1 else None
        self.kept = (query, key, value, bounds, lse)
        self.params = PrefillParams(
            problem=self.problem,
            query=_tensor(query),
            key=_tensor(key),
            value=_tensor(value),
            output=_tensor(self.output),
            alpha=None if self.alpha is None else self.alpha.data_ptr(),
            bounds=None if bounds is None else bounds.data_ptr(),
            lse=None if lse is None else lse.data_ptr(),
        )
        self.tiles = -(-query.shape[2] // policy.block_q)
        self.blocks = -(-key.shape[2] // policy.block_k)
        self.device = query.device

    @property
    def chunk_tiles(self) -> int:
        """Query tiles that one sample() takes at most."""
        return load().sa_chunk_tiles(ctypes.byref(self.problem))

    def prefill(self) -> torch.Tensor:
        """The whole operator; returns output [B, Hq, S, D]."""
        return self._run("sa_prefill")

    def decode(self) -> torch.Tensor:
        """Full attention of at most 16 rows; returns output."""
        return self._run("sa_decode")

    def attend(self, lists: Lists | None = None) -> torch.Tensor:
        """Attention over listed blocks, or over all of them; returns output. Tiles that the lists do not describe are not written."""
        return self._run("sa_attend", None if lists is None else ctypes.byref(lists.struct()))

    def sample(self, first_tile: int = 0, tiles: int | None = None, mass: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted block masses, float32 [B, Hq, tiles, nK]."""
        import torch

        tiles = min(self.tiles - first_tile, self.chunk_tiles) if tiles is None else tiles
        if mass is None:
            mass = torch.zeros(self.problem.batch, self.problem.heads, tiles, self.blocks, device=self.device)
        self._run("sa_sample", first_tile, tiles, mass.data_ptr())
        return mass

    def filter(self, mass: torch.Tensor, first_tile: int = 0, lists: Lists | None = None) -> Lists:
        """Block lists of the tiles that mass [B, Hq, tiles, nK] describes."""
        import torch

        if lists is None:
            counts = torch.empty(mass.shape[:3], dtype=torch.int32, device=self.device)
            lists = Lists(counts, torch.empty(mass.shape, dtype=torch.int32, device=self.device), first_tile)
        self._call("sa_filter", ctypes.byref(self.params), mass.data_ptr(), ctypes.byref(lists.struct()), self._stream())
        return lists

    def _stream(self) -> int:
        import torch

        return torch.cuda.current_stream(self.device).cuda_stream

    def _run(self, name: str, *arguments: object) -> torch.Tensor:
        self._call(name, ctypes.byref(self.params), *arguments, self.workspace.data_ptr(), self.workspace.numel(), self._stream())
        return self.output

    @staticmethod
    def _call(name: str, *arguments: object) -> None:
        code, sentence = message_of(name, *arguments)
        if code != 0:
            raise UserError(sentence)


def prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: Policy | None = None, **options: object) -> torch.Tensor:
    """SampleAttention of docs/op.md; options as `Call`. Returns [B, Hq, S, D]."""
    return Call(query, key, value, policy, **options).prefill()  # type: ignore[arg-type]


def sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: Policy, **options: object) -> torch.Tensor:
    """Stage 1 alone, for every tile; options as `Call`."""
    return _whole(Call(query, key, value, policy, **options), Call.sample)  # type: ignore[arg-type]


def filter_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: Policy, **options: object) -> Lists:
    """Stages 1 and 2, for every tile; options as `Call`."""
    call = Call(query, key, value, policy, **options)  # type: ignore[arg-type]
    return call.filter(_whole(call, Call.sample))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: Policy, lists: Lists | None = None, **options: object
) -> torch.Tensor:
    """Stage 3 alone; options as `Call`."""
    return Call(query, key, value, policy, **options).attend(lists)  # type: ignore[arg-type]


def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
    """Full attention of at most 16 query rows; options as `Call`."""
    return Call(query, key, value, None, **options).decode()  # type: ignore[arg-type]


def _whole(call: Call, stage: Callable[[Call, int], torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([stage(call, first) for first in range(0, call.tiles, call.chunk_tiles)], dim=2)


def _tensor(tensor: torch.Tensor) -> Tensor:
    # The stride of a dimension of size 1 is never stepped over and may be anything: 0 is what every check accepts.
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return Tensor(data=tensor.data_ptr(), stride_b=strides[0], stride_h=strides[1], stride_s=strides[2])
