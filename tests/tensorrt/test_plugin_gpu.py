"""The plugin's enqueue on a GPU, with the real kernels, in numbers: errors, equality with the kernel library, time on top of it.

The conformance driver (tests/cpp) has the life cycle, graphs, streams and guards on the same library. Needs the three built libraries:
SA_EXPORT_TRT_PLUGIN (libsample_attention_trt.so), SA_EXPORT_TRT_SHIM (libsample_attention_shim.so) and SA_EXPORT_KERNELS.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import pytest

from graph_passes.op import Policy, node_attributes
from tests.tensorrt.plugin_shim import Door, node_fields, to_field

pytestmark = pytest.mark.gpu

TILE = Policy(policy="tile", sample_rows=32, min_length=0, dense_rows=64, alpha=(0.7,))
POLICIES = {
    "dense": Policy(policy="dense"),
    "tile": TILE,
    "residue": TILE.replace(policy="residue", stride=16),
    "budget": TILE.replace(policy="residue", stride=16, alpha=(0.95,), max_density=0.3),
    "column_slash": TILE.replace(policy="column_slash", segment=512),
    "stripe_window": TILE.replace(policy="stripe_window", window_ratio=0.05),
    "alpha a head": TILE.replace(alpha=(0.3, 0.9, 1.0, 0.6)),
}
# S, T, D, Dv, B, Hq, Hkv, (bounds of real keys, share of holes)
SHAPES = [
    (1, 1, 128, 128, 1, 4, 2, None, 0.0),
    (1, 2049, 128, 128, 3, 4, 1, None, 0.0),
    (1, 1500, 128, 128, 2, 4, 2, ((0, 900), (7, 1500)), 0.3),
    (16, 700, 64, 64, 2, 4, 4, None, 0.0),
    (17, 17, 64, 64, 1, 4, 2, None, 0.0),
    (113, 203, 128, 128, 2, 4, 2, ((0, 203), (50, 203)), 0.0),
    (799, 799, 128, 128, 1, 4, 2, None, 0.0),
    (1023, 1024, 128, 128, 1, 4, 4, None, 0.0),
    (640, 1700, 128, 128, 2, 4, 2, ((300, 1700), (0, 1111)), 0.0),
    (500, 900, 128, 128, 2, 4, 2, ((0, 900), (0, 900)), 0.2),
    (450, 450, 80, 80, 1, 4, 2, None, 0.0),
    (300, 500, 64, 32, 1, 4, 2, None, 0.0),
]


@pytest.fixture(scope="module")
def door() -> Door:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the plugin was not run on a GPU")
    paths = [Path(os.environ.get(name, "")) for name in ("SA_EXPORT_TRT_SHIM", "SA_EXPORT_TRT_PLUGIN", "SA_EXPORT_KERNELS")]
    if not all(path.is_file() for path in paths):
        pytest.skip(
            "SA_EXPORT_TRT_PLUGIN, SA_EXPORT_TRT_SHIM or SA_EXPORT_KERNELS names no library: build the targets plugin_driver and sample_attention_shim"
        )
    return Door(paths[0], paths[1])


class _Layer:
    """A plugin with its shapes set and its memory allocated; guards of 256 bytes stand around output and workspace."""

    def __init__(self, door, q, k, v, mask, policy, scale, softcap, certificate=False):
        import torch

        fields = node_fields(node_attributes(policy, scale=scale, softcap=softcap))
        self.layer, sentence = door.create({**fields, "certificate": to_field(int(certificate))})
        assert self.layer is not None, sentence
        dtype = str(q.dtype).removeprefix("torch.")
        self.inputs = [q, k, v] + ([] if mask is None else [mask])
        shape = (*q.shape[:3], v.shape[3])
        outputs = [(dtype, shape)] + ([("float32", (*q.shape[:2], 2))] if certificate else [])
        described = [(dtype, t.shape) for t in (q, k, v)] + ([] if mask is None else [("bool", mask.shape)])
        size, self.said = self.layer.shape(described, outputs)
        assert size >= 0, self.said
        count = q.dtype.itemsize * torch.Size(shape).numel()
        self._output, self._workspace = (torch.full((256 + n + 256,), 0x5A, dtype=torch.uint8, device="cuda") for n in (count, size))
        self.output = self._output[256 : 256 + count].view(q.dtype).view(shape)
        self.output.fill_(float("nan"))
        self.certificate = torch.full((*q.shape[:2], 2), float("nan"), device="cuda") if certificate else None
        self._addresses = [t.data_ptr() for t in self.inputs], [t.data_ptr() for t in (self.output, self.certificate) if t is not None]
        self._space = self._workspace.data_ptr() + 256

    def run(self):
        import torch

        self.layer.enqueue(*self._addresses, self._space, torch.cuda.current_stream().cuda_stream)
        return self.output

    def check_guards(self):
        for t in (self._output, self._workspace):
            assert bool((t[:256] == 0x5A).all() and (t[-256:] == 0x5A).all()), "written outside its memory"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", POLICIES)
def test_errors_are_those_of_a_plain_implementation(door, name, dtype):
    """72 calls a type: error at most twice that of a plain implementation in the same type with the same blocks, and equal to the kernel library's answer."""
    import torch

    from sa_export.kernels import Call
    from tests.kernels import oracle
    from tests.kernels.test_selection_gpu import _mask_of

    policy = POLICIES[name]
    for index, (s, t, d, dv, batch, heads, kv_heads, bounds, holes) in enumerate(SHAPES):
        softcap = 20.0 if index % 4 == 1 else 0.0
        case = oracle.Case(
            s, t, d=d, value_dim=dv, heads=heads, kv_heads=kv_heads, batch=batch, dtype=getattr(torch, dtype), softcap=softcap,
            bounds=bounds, holes=holes, spread=2.0, seed=index,
        )  # fmt: skip
        q, k, v = case.tensors()
        mask = case.key_mask()
        call = Call(q, k, v, policy, key_mask=mask, softcap=softcap, certificate=True)
        blocks = None
        if call.support.select_path != "none":
            lists = call.filter(call.sample())
            blocks = _mask_of(lists, lists.indices.shape[-1])
        exact, _, plain = oracle.attention(case, q, k, v, blocks, policy.block_q, policy.block_k)
        layer = _Layer(door, q, k, v, mask, policy, case.multiplier, softcap, certificate=True)
        out = layer.run()
        what = f"{name} {dtype} {SHAPES[index]}"
        oracle.assert_as_good_as_plain(out, exact, plain, what)
        layer.check_guards()
        assert torch.equal(out, call.run()), what
        assert torch.equal(layer.certificate, call.certificate), what
        layer.layer.close()


@pytest.mark.parametrize(("name", "length"), [("dense", 8192), ("tile", 8192), ("residue", 16384), ("tile", 32768)])
def test_the_plugin_costs_no_time(door, name, length):
    """Medians of CUDA events, the plugin and the kernel library in turns on the same tensors; the best of three rounds, as clocks and neighbours move single ones."""
    import torch

    from sa_export.kernels import Call

    policy = POLICIES[name]
    q, k, v = (torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    call, layer = Call(q, k, v, policy), _Layer(door, q, k, v, None, policy, 128**-0.5, 0.0)
    for _ in range(3):
        call.run()
        layer.run()
    rounds = []
    for _ in range(3):
        times: dict[str, list[float]] = {"library": [], "plugin": []}
        for _ in range(30):
            for who, run in (("library", call.run), ("plugin", layer.run)):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times[who].append(start.elapsed_time(end))
        rounds.append(tuple(statistics.median(times[who]) for who in ("library", "plugin")))
    library, plugin = min(rounds, key=lambda pair: pair[1] / pair[0])
    print(f"\n{name} {length}: library {library:.3f} ms, plugin {plugin:.3f} ms, ratio {plugin / library:.4f}; {layer.said}")
    assert torch.equal(layer.output, call.output)
    assert plugin <= 1.01 * library


def test_host_time_of_a_decode_step(door):
    """Where kernels are short the host counts: the plugin adds a few microseconds at most to the library's own launch time."""
    import torch

    from sa_export.kernels import Call

    q, k, v = torch.randn(1, 32, 1, 128, device="cuda").half(), *(torch.randn(1, 8, 4096, 128, device="cuda").half() for _ in range(2))
    call, layer = Call(q, k, v, POLICIES["tile"]), _Layer(door, q, k, v, None, POLICIES["tile"], 128**-0.5, 0.0)

    def host(run) -> float:
        out = []
        for _ in range(300):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            out.append(time.perf_counter() - start)
        return statistics.median(out) * 1e6

    library, plugin = host(call.run), host(layer.run)
    print(f"\ndecode: host {library:.1f} us library, {plugin:.1f} us plugin (both called through Python)")
    assert plugin < library + 20
