"""Times the kernels against cuDNN through PyTorch and prints one table.

Usage: python plugins/dev/measure.py [dense] [attend] [sample] [whole] [decode] [million]

bf16, B = 1, 32 query / 8 key-value heads of 128, causal; medians over CUDA events after warm-up. SA_EXPORT_KERNELS names the library.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

from graph_passes.op import Policy
from sa_export.kernels import Call, Lists, filter_blocks

HEADS, KV_HEADS, D = 32, 8, 128
KIB = 1024


def median_ms(run: Callable[[], object], budget_ms: float = 250.0) -> float:
    """Median time of one call: warm-up, then as many timed calls as fit the budget (5 to 30)."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    count = int(min(30, max(5, budget_ms / max(start.elapsed_time(end), 1e-3))))
    times = []
    for _ in range(count):
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random_inputs(n: int, t: int | None = None, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = lambda heads, rows: torch.randn(batch, heads, rows, D, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return shape(HEADS, n), shape(KV_HEADS, t or n), shape(KV_HEADS, t or n)


def planted_inputs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sink, recent tokens, and for each key/value head a few stripes that every query of the head looks for; one diffuse head in eight.

    The first 32 columns carry rotated positions (local attention decays over about 1000 tokens), the others content.
    """
    torch.manual_seed(seed)
    q, k, v = (x.float() for x in random_inputs(n))
    position = torch.arange(n, device="cuda", dtype=torch.float32)[:, None]
    angle = position * torch.logspace(-2.0, -4.0, 16, device="cuda")
    rotated = torch.cat([angle.cos(), angle.sin()], -1)
    q[..., :32], k[..., :32] = 3.0 * rotated, 3.0 * rotated
    for kv in range(KV_HEADS):
        direction = torch.nn.functional.normalize(torch.randn(D - 32, device="cuda"), dim=0)
        stripes = torch.randperm(n, device="cuda")[: max(n // 2048, 4)]
        strength = 0.0 if kv == KV_HEADS - 1 else 12.0
        k[:, kv, stripes, 32:] += strength * direction
        k[:, kv, :4, 32:] += 12.0 * direction
        q[:, kv * 4 : kv * 4 + 4, :, 32:] += 12.0 * direction
    return tuple(x.bfloat16() for x in (q, k, v))


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def tflops(n: int, ms: float) -> float:
    return 4 * HEADS * D * (n * (n + 1) / 2) / ms / 1e9


def dense() -> None:
    for n in (1 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB):
        q, k, v = random_inputs(n)
        ours, theirs = median_ms(Call(q, k, v).attend), median_ms(cudnn(q, k, v))
        rates = f"ours {ours:8.3f} ms {tflops(n, ours):4.0f} TF/s   cudnn {theirs:8.3f} ms {tflops(n, theirs):4.0f} TF/s"
        print(f"dense   {n:7d}  {rates}   {theirs / ours:.3f}x")


def random_lists(n: int, keep: float) -> tuple[Lists, float]:
    tiles, blocks = n // 128, n // 64
    last = torch.arange(1, tiles + 1, device="cuda")[:, None] * 2
    index = torch.arange(blocks, device="cuda")
    mask = ((torch.rand(1, HEADS, tiles, blocks, device="cuda") < keep) | (index >= last - 2)) & (index < last)
    counts = mask.sum(-1, dtype=torch.int32)
    order = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True).int()
    return Lists(counts, order), counts.sum().item() / (HEADS * last.sum().item())


def attend() -> None:
    for n in (32 * KIB, 64 * KIB):
        q, k, v = random_inputs(n)
        call = Call(q, k, v, Policy(policy="dense"))
        full = median_ms(call.attend)
        for keep in (0.1, 0.2, 0.4):
            lists, density = random_lists(n, keep)
            ms = median_ms(lambda call=call, lists=lists: call.attend(lists))
            rate = f"{tflops(n, ms) * density:4.0f} TF/s on kept   {density * full / ms:.3f} of our dense rate"
            print(f"attend  {n:7d}  density {density:.3f}  {ms:8.3f} ms {rate}")
            del lists


def stages(n: int, policy: Policy, inputs: tuple[torch.Tensor, ...], label: str) -> None:
    call = Call(*inputs, policy)
    lists = filter_blocks(*inputs, policy)
    blocks = torch.arange(1, n // 128 + 1, device="cuda").sum().item() * 2 * HEADS
    density = lists.counts.sum().item() / blocks
    tiles = min(call.chunk_tiles, call.tiles)
    mass = call.sample(0, tiles)
    share = tiles / call.tiles
    sample_ms = median_ms(lambda: call.sample(0, tiles, mass))
    chunk_lists = Lists(lists.counts[:, :, :tiles].contiguous(), lists.indices[:, :, :tiles].contiguous())
    filter_ms = median_ms(lambda: call.filter(mass, 0, chunk_lists))
    attend_ms = median_ms(lambda: call.attend(lists))
    total, theirs = median_ms(call.prefill), median_ms(cudnn(*inputs))
    times = f"sample {sample_ms:7.3f}  filter {filter_ms:6.3f}  attend {attend_ms:8.3f}  total {total:8.3f} ms   cudnn {theirs:8.3f} ms"
    # sample and filter were timed on the first chunk of tiles, the later ones cost more each: compare with total - attend.
    alone = f"stages alone {100 * (sample_ms + filter_ms) / theirs:.1f} % for {share:.2f} of the tiles"
    search = f"search {100 * (total - attend_ms) / theirs:.1f} % ({alone})"
    print(f"{label} {n:7d}  density {density:.3f}  {times}   {search}   {theirs / total:.2f}x")


RESIDUE = Policy(policy="residue", stride=16, min_length=0)
TILE = Policy(policy="tile", sample_rows=32, min_length=0)


def sample() -> None:
    for n in (8 * KIB, 32 * KIB, 128 * KIB):
        inputs = random_inputs(n)
        stages(n, RESIDUE.replace(alpha=(0.5,)), inputs, "residue")
        if n <= 32 * KIB:
            stages(n, TILE.replace(alpha=(0.5,)), inputs, "tile   ")


def whole() -> None:
    for n in (4 * KIB, 8 * KIB, 32 * KIB, 128 * KIB):
        inputs = planted_inputs(n)
        for policy in (RESIDUE, TILE):
            stages(n, policy.replace(alpha=(0.9,)), inputs, f"planted {policy.policy:8s}")


def decode() -> None:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda a=source, b=target: b.copy_(a))
    rate = 2 * source.numel() / copy / 1e9
    del source, target
    for batch in (1, 8):
        q, k, v = random_inputs(1, 128 * KIB, batch)
        call = Call(q, k, v)
        ms = median_ms(call.decode)
        got = 2 * k.numel() * 2 / ms / 1e9
        print(f"decode  {128 * KIB:7d}  batch {batch}  {ms:7.4f} ms  {got:.2f} TB/s   {got / rate:.3f} of the copy rate {rate:.2f} TB/s")


def million() -> None:
    n = 1024 * KIB
    inputs = planted_inputs(n)
    call = Call(*inputs, RESIDUE)
    call.prefill()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call.prefill()
    end.record()
    end.synchronize()
    print(f"million {n:7d}  workspace {call.workspace.numel() / 2**20:.0f} MiB  total {start.elapsed_time(end):.0f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    parts = {f.__name__: f for f in (dense, attend, sample, whole, decode, million)}
    for name in sys.argv[1:] or ["dense", "attend", "sample", "whole", "decode"]:
        try:
            parts[name]()
        except Exception as error:  # one part that fails must not hide the others' figures
            print(name, "failed:", type(error).__name__, error)
        torch.cuda.empty_cache()
