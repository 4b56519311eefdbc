"""The kernels on torch CUDA tensors, by pointer, on torch's current stream.

Letters: B batch, Hq query heads, Hkv key/value heads, S query rows, T keys, D and Dv head sizes, nQ query tiles, nK key blocks.
A call allocates what the caller does not pass (outputs, workspace); pass them to capture a CUDA graph or to time the kernels alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from graph_passes.op import Policy
from sa_export.errors import UserError
from sa_export.kernels.native import BlockLists, PrefillParams, Problem, Tensor, load, message_of
from sa_export.kernels.native import Support as _SupportStruct

if TYPE_CHECKING:
    import torch

__all__ = [
    "Call",
    "Lists",
    "Support",
    "attend",
    "build_info",
    "decode",
    "filter_blocks",
    "is_full",
    "make_problem",
    "prefill",
    "run",
    "sample",
    "supports",
    "workspace_bytes",
]

_POLICY_CODES = {"dense": 0, "residue": 1, "tile": 2, "column_slash": 3, "stripe_window": 4}
_DTYPE_CODES = {"float16": 0, "bfloat16": 1, "float32": 2}
_PATH_CODES = {"auto": 0, "sm90": 1, "sm80": 2, "generic": 3}


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
    value_dim: int | None = None,
    key_mask: bool = False,
    certificate: bool = False,
    path: str = "auto",
    scratch_bytes: int = 0,
) -> Problem:
    """A problem as the library sees it.

    dtype: "float16", "bfloat16" or "float32"; scale: 1/sqrt(head_dim) when None; policy: dense when None; value_dim: head_dim when None;
    key_mask, certificate: whether the call brings them; path: "auto" (the fastest), "sm90", "sm80" or "generic".
    """
    if path not in _PATH_CODES:
        raise UserError(f"path is {path!r}; allowed: {', '.join(_PATH_CODES)}.")
    policy = policy or Policy(policy="dense")
    return Problem(
        dtype=_DTYPE_CODES.get(dtype, -1),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        scale=head_dim**-0.5 if scale is None and head_dim > 0 else scale or 0.0,
        softcap=softcap,
        policy=_POLICY_CODES[policy.policy],
        # Per-head values travel as a device array. One head below 1 is enough for the problem not to be full attention.
        alpha=min(policy.alpha),
        alpha_slash=min(policy.alpha_slash),
        max_density=policy.max_density,
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
        has_key_mask=int(key_mask),
        has_certificate=int(certificate),
        path=_PATH_CODES[path],
        scratch_bytes=scratch_bytes,
    )


def build_info() -> str:
    """What the library was built for."""
    return load().sa_build_info().decode()


class Support(NamedTuple):
    """Whether and how a problem is computed.

    path: the kernels of attention or decode ("sm90", "sm80", "generic"; "none" when refused). select_path: those of sampling and filtering
    ("none" when nothing is selected). why: refused: the reason, in one sentence; else what kept a faster path out, or "".
    """

    ok: bool
    path: str
    select_path: str
    why: str


def supports(problem: Problem, compute_capability: int = 90) -> Support:
    """What the library does with the problem on a device of this compute capability (90 for 9.0; 0: not known yet). Needs no device."""
    answer = _SupportStruct()
    code = load().sa_supports(ctypes.byref(problem), compute_capability, ctypes.byref(answer))
    path, select_path = (load().sa_path_name(p).decode() for p in (answer.path, answer.select_path))
    return Support(code == 0, path, select_path, answer.text.decode(errors="replace"))


def is_full(problem: Problem) -> bool:
    """Whether the problem is full attention, exactly, by its policy and shape."""
    return bool(load().sa_is_full(ctypes.byref(problem)))


def workspace_bytes(problem: Problem) -> int:
    """Bytes of workspace of every stage, for this problem and for smaller batch, queries and keys; 0 when it is not supported."""
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

    query [B, Hq, S, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv]: float16, bfloat16 or float32 on one CUDA device, last dimension contiguous.
    key_mask: bool [B, T], true = real token, or None. bounds: int32 [B, 2], first real key and one past the last, instead of a mask, or None.
    lse: float32 [B, Hq, S] to be filled, or None. certificate: True, or float32 [B, Hq, 2] to be filled; then in `certificate`.
    path: "auto", or the kernels to use; `support` says which were chosen and why.
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
        key_mask: torch.Tensor | None = None,
        bounds: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        certificate: torch.Tensor | bool | None = None,
        workspace: torch.Tensor | None = None,
        path: str = "auto",
        scratch_bytes: int = 0,
    ) -> None:
        import torch

        if key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3] or key.shape[0] != query.shape[0]:
            raise UserError(
                f"query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}; "
                "allowed are [B, Hq, S, D], [B, Hkv, T, D] and [B, Hkv, T, Dv]."
            )
        policy = (policy or Policy(policy="dense")).for_heads(query.shape[1])
        certificate = None if certificate is False else certificate
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
            value_dim=value.shape[3],
            key_mask=key_mask is not None,
            certificate=certificate is not None,
            path=path,
            scratch_bytes=scratch_bytes,
        )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.device.type != "cuda" or tensor.dtype != query.dtype or tensor.stride(-1) != 1:
                raise UserError(
                    f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; "
                    f"allowed is {query.dtype} on a CUDA device with a contiguous last dimension."
                )
        if key_mask is not None and (
            key_mask.dtype != torch.bool
            or key_mask.shape != (key.shape[0], key.shape[2])
            or key_mask.device != query.device
            or not key_mask.is_contiguous()
        ):
            raise UserError(
                f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)} on {key_mask.device}; "
                f"allowed is a contiguous torch.bool of [{key.shape[0]}, {key.shape[2]}] on {query.device}."
            )
        major, minor = torch.cuda.get_device_capability(query.device)
        self.support = supports(self.problem, 10 * major + minor)
        if not self.support.ok:
            raise UserError(self.support.why)
        shape = (*query.shape[:3], value.shape[3])
        self.output = torch.empty(shape, dtype=query.dtype, device=query.device) if output is None else output
        self.lse = lse
        if certificate is True:
            certificate = torch.empty(*query.shape[:2], 2, dtype=torch.float32, device=query.device)
        self.certificate = certificate
        size = workspace_bytes(self.problem)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=query.device) if workspace is None else workspace
        self.alpha, self.alpha_slash = (
            torch.tensor(values, dtype=torch.float32, device=query.device) if len(values) > 1 else None
            for values in (policy.alpha, policy.alpha_slash)
        )
        self.kept = (query, key, value, bounds, lse, key_mask)
        self.params = PrefillParams(
            problem=self.problem,
            query=_tensor(query),
            key=_tensor(key),
            value=_tensor(value),
            output=_tensor(self.output),
            alpha=_address(self.alpha),
            bounds=_address(bounds),
            lse=_address(lse),
            alpha_slash=_address(self.alpha_slash),
            key_mask=_address(key_mask),
            certificate=_address(self.certificate),
        )
        self.tiles = -(-query.shape[2] // policy.block_q)
        self.blocks = -(-key.shape[2] // policy.block_k)
        self.device = query.device
        self.whole = policy.policy in ("column_slash", "stripe_window")

    @property
    def chunk_tiles(self) -> int:
        """Query tiles that one sample() takes at most."""
        return load().sa_chunk_tiles(ctypes.byref(self.problem))

    def run(self) -> torch.Tensor:
        """The whole operator, decode included; returns output [B, Hq, S, Dv]."""
        return self._run("sa_run")

    prefill = run

    def decode(self) -> torch.Tensor:
        """Full attention of at most 16 rows; returns output."""
        return self._run("sa_decode")

    def attend(self, lists: Lists | None = None) -> torch.Tensor:
        """Attention over listed blocks, or over all of them; returns output. Tiles that the lists do not describe are not written."""
        return self._run("sa_attend", None if lists is None else ctypes.byref(lists.struct()))

    def sample(self, first_tile: int = 0, tiles: int | None = None, mass: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted block masses, float32 [B, Hq, tiles, nK]; column_slash and stripe_window: [B, Hq, 2 or 1, nK] of the whole call.

        What no selection depends on may stay as it is (0 unless mass is given): heads and tiles that keep all blocks, blocks behind a tile.
        """
        import torch

        if tiles is None:
            tiles = self.tiles if self.whole else min(self.tiles - first_tile, self.chunk_tiles)
        if mass is None:
            rows = load().sa_mass_rows(ctypes.byref(self.problem), tiles)
            mass = torch.zeros(self.problem.batch, self.problem.heads, rows, self.blocks, device=self.device)
        self._run("sa_sample", first_tile, tiles, mass.data_ptr())
        return mass

    def filter(self, mass: torch.Tensor, first_tile: int = 0, lists: Lists | None = None) -> Lists:
        """Block lists of the tiles that mass describes (see `sample`)."""
        import torch

        if lists is None:
            counts = torch.empty(*mass.shape[:2], self.tiles if self.whole else mass.shape[2], dtype=torch.int32, device=self.device)
            lists = Lists(counts, torch.empty(*counts.shape, self.blocks, dtype=torch.int32, device=self.device), first_tile)
        self._run("sa_filter", mass.data_ptr(), ctypes.byref(lists.struct()))
        return lists

    def _stream(self) -> int:
        import torch

        return torch.cuda.current_stream(self.device).cuda_stream

    def _run(self, name: str, *arguments: object) -> torch.Tensor:
        workspace = (self.workspace.data_ptr(), self.workspace.numel())
        code, sentence = message_of(name, ctypes.byref(self.params), *arguments, *workspace, self._stream())
        if code != 0:
            raise UserError(sentence)
        return self.output


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, policy: Policy | None = None, **options: object) -> torch.Tensor:
    """SampleAttention of docs/op.md; options as `Call`. Returns [B, Hq, S, Dv]."""
    return Call(query, key, value, policy, **options).run()  # type: ignore[arg-type]


prefill = run


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

    if call.whole:
        return stage(call, 0)
    return torch.cat([stage(call, first) for first in range(0, call.tiles, call.chunk_tiles)], dim=2)


def _tensor(tensor: torch.Tensor) -> Tensor:
    # The stride of a dimension of size 1 is never stepped over and may be anything: 0 is what every check accepts.
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return Tensor(data=tensor.data_ptr(), stride_b=strides[0], stride_h=strides[1], stride_s=strides[2])


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
