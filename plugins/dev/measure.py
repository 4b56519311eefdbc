"""Times the kernels against cuDNN through PyTorch and prints one table.

Usage: python plugins/dev/measure.py [dense] [attend] [sample] [whole] [break_even] [decode] [million]

bf16, B = 1, 32 query / 8 key-value heads of 128, causal; medians over CUDA events after warm-up. SA_EXPORT_KERNELS names the library. Inputs are those of
sa_export.bench.inputs: `noise` has no structure; `planted` (sinks, local attention, stripes, slashes, diffuse heads; seed 0) comes to a density near 0.12 under
`residue` with stride 16 and alpha 0.75.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from graph_passes.op import Policy
from sa_export.bench.inputs import Inputs, noise, planted
from sa_export.bench.timing import median_ms, medians_ms
from sa_export.kernels import Call, Lists, filter_blocks

HEADS, KV_HEADS, D = 32, 8, 128
KIB = 1024


def inputs(make: Callable[..., Inputs], n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make(n, heads=HEADS, kv_heads=KV_HEADS, head_size=D, batch=1, dtype=torch.bfloat16, device="cuda", seed=0)
    return x.query, x.key, x.value


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
        q, k, v = inputs(noise, n)
        ours, theirs = medians_ms([Call(q, k, v).attend, cudnn(q, k, v)])
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


def chosen_lists(x: tuple[torch.Tensor, ...], n: int, target: float) -> tuple[Lists, float]:
    """What `residue` keeps of the inputs under the alpha that comes nearest to a density."""
    low, high = 0.0, 1.0
    for _ in range(12):
        alpha = (low + high) / 2
        lists = filter_blocks(*x, RESIDUE.replace(alpha=(alpha,), dense_rows=128))
        density = lists.counts.sum().item() / causal_blocks(n)
        low, high = (alpha, high) if density < target else (low, alpha)
    return lists, density


def attend() -> None:
    """Rate on the kept blocks: lists that the search chose on structured inputs, and random ones, which have no locality."""
    for n in (32 * KIB, 64 * KIB, 128 * KIB):
        x = inputs(planted, n)
        call = Call(*x, Policy(policy="dense"))
        makers = {"chosen": lambda keep, n=n, x=x: chosen_lists(x, n, keep), "random": lambda keep, n=n: random_lists(n, keep)}
        for kind, make in makers.items():
            if kind == "random" and n > 64 * KIB:
                continue
            for keep in (0.1, 0.2, 0.4):
                lists, density = make(keep)
                ms, full = medians_ms([lambda call=call, lists=lists: call.attend(lists), call.attend])
                rate = f"{tflops(n, ms) * density:4.0f} TF/s on kept   {density * full / ms:.3f} of our dense rate"
                print(f"attend  {n:7d}  {kind} lists  density {density:.3f}  {ms:8.3f} ms {rate}", flush=True)
                del lists


def causal_blocks(n: int) -> int:
    """Key blocks of 64 that begin at or before the last row of each query tile of 128, over all heads."""
    tiles = -(-n // 128)
    return HEADS * tiles * (tiles + 1)


def stages(n: int, policy: Policy, x: tuple[torch.Tensor, ...], label: str) -> None:
    call, lists = Call(*x, policy), filter_blocks(*x, policy)
    density = lists.counts.sum().item() / causal_blocks(n)
    steps = {"total": call.run, "attend": lambda: call.attend(lists)}
    if call.chunk_tiles >= call.tiles:
        mass = call.sample()
        steps |= {"sample": lambda: call.sample(0, call.tiles, mass), "filter": lambda: call.filter(mass, 0, lists)}
    names = [*steps, "cudnn"]
    ms = dict(zip(names, medians_ms([*steps.values(), cudnn(*x)], budget_ms=800), strict=True))
    total, theirs, search = ms["total"], ms["cudnn"], ms["total"] - ms["attend"]
    times = f"total {total:8.3f} ms  attend {ms['attend']:8.3f}  search {search:7.3f} ms, {100 * search / theirs:4.1f} % of cudnn"
    if "sample" in ms:
        times += f"  (sample {ms['sample']:7.3f}  filter {ms['filter']:6.3f}, {100 * (ms['sample'] + ms['filter']) / theirs:4.1f} %)"
    print(f"{label:22s} {n:7d}  density {density:.3f}  {times}   cudnn {theirs:8.3f} ms  {theirs / total:.2f}x", flush=True)


RESIDUE = Policy(policy="residue", stride=16, min_length=0, alpha=(0.75,))
TILE = Policy(policy="tile", min_length=0)


def sample() -> None:
    for n in (8 * KIB, 32 * KIB, 128 * KIB):
        x = inputs(noise, n)
        stages(n, RESIDUE, x, "noise residue")
        if n <= 32 * KIB:
            for rows in (16, 32, 64):
                stages(n, TILE.replace(sample_rows=rows), x, f"noise tile {rows}")


def whole() -> None:
    for n in (8 * KIB, 32 * KIB, 64 * KIB, 128 * KIB):
        x = inputs(planted, n)
        for policy in (RESIDUE, TILE):
            stages(n, policy, x, f"planted {policy.policy}")


def break_even() -> None:
    """The default policy as it is, and `residue` at every length, against cuDNN."""
    default = Policy()
    for n in (1 * KIB, 2 * KIB, 4 * KIB, 6 * KIB, 8 * KIB, 16 * KIB):
        for make in (planted, noise):
            x = inputs(make, n)
            *times, theirs = medians_ms([Call(*x, default).run, Call(*x, RESIDUE).run, cudnn(*x)])
            ours = dict(zip(("default", "residue"), times, strict=True))
            speed = "  ".join(f"{name} {ms:7.3f} ms {theirs / ms:.2f}x" for name, ms in ours.items())
            print(f"break_even {make.__name__:8s} {n:7d}  {speed}   cudnn {theirs:7.3f} ms", flush=True)


def decode() -> None:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda a=source, b=target: b.copy_(a))
    rate = 2 * source.numel() / copy / 1e9
    del source, target
    for batch in (1, 8):
        q, k, v = (
            torch.randn(batch, heads, rows, D, device="cuda", dtype=torch.bfloat16)
            for heads, rows in ((HEADS, 1), *[(KV_HEADS, 128 * KIB)] * 2)
        )
        call = Call(q, k, v)
        ms = median_ms(call.decode)
        got = 2 * k.numel() * 2 / ms / 1e9
        print(f"decode  {128 * KIB:7d}  batch {batch}  {ms:7.4f} ms  {got:.2f} TB/s   {got / rate:.3f} of the copy rate {rate:.2f} TB/s")


def million() -> None:
    n = 1024 * KIB
    call = Call(*inputs(planted, n), RESIDUE)
    call.run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call.run()
    end.record()
    end.synchronize()
    print(f"million {n:7d}  workspace {call.workspace.numel() / 2**20:.0f} MiB  total {start.elapsed_time(end):.0f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    parts = {f.__name__: f for f in (dense, attend, sample, whole, break_even, decode, million)}
    for name in sys.argv[1:] or ["dense", "attend", "sample", "whole", "break_even", "decode"]:
        try:
            parts[name]()
        except Exception as error:  # one part that fails must not hide the others' figures
            print(name, "failed:", type(error).__name__, error)
        torch.cuda.empty_cache()
