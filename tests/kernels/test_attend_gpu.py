"""The prefill kernels against float64, given the same block lists. The sm80 ones run on the same H100 or H200."""

from __future__ import annotations

import itertools
import random

import pytest

pytestmark = pytest.mark.gpu

HEAD_DIMS = {"sm90": (64, 96, 128, 256), "sm80": (64, 128)}
DENSE = [(1, 1), (17, 17), (64, 64), (113, 203), (128, 128), (129, 129), (799, 799), (1023, 1024), (512, 2048), (3, 700), (2049, 2049)]


@pytest.fixture(params=HEAD_DIMS)
def path(request):
    return request.param


def _torch():
    import torch

    return torch


def _run(path, case, block_mask=None, block_q=128, block_k=64):
    from graph_passes.op import Policy
    from sa_export.kernels import Call, Lists
    from tests.kernels import oracle

    torch = _torch()
    q, k, v = case.tensors()
    output = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:3], torch.nan, device="cuda")
    policy = Policy(policy="dense", block_q=block_q, block_k=block_k)
    call = Call(
        q, k, v, policy, softcap=case.softcap, scale=case.multiplier, bounds=case.bounds_tensor(), output=output, lse=lse, path=path
    )
    assert call.support.path == path, call.support
    lists = None
    if block_mask is not None:
        counts = block_mask.sum(-1, dtype=torch.int32)
        # Indices beyond the count are poison: reading one addresses nothing that exists.
        order = torch.argsort((~block_mask).int(), dim=-1, stable=True).int()
        beyond = torch.arange(block_mask.shape[-1], device="cuda") >= counts[..., None]
        lists = Lists(counts.contiguous(), order.masked_fill(beyond, -(2**30)).contiguous())
    call.attend(lists)
    exact, exact_lse, plain = oracle.attention(case, q, k, v, block_mask, block_q, block_k)
    oracle.assert_as_good_as_plain(output, exact, plain, case)
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse)), case
    torch.testing.assert_close(lse.double().nan_to_num(neginf=0), exact_lse.nan_to_num(neginf=0), rtol=0, atol=2e-4)
    return output


def _random_mask(case, keep, seed, block_q=128, block_k=64):
    torch = _torch()
    generator = torch.Generator(device="cuda").manual_seed(seed)
    tiles, blocks = -(-case.s // block_q), -(-case.t // block_k)
    mask = torch.rand(case.batch, case.heads, tiles, blocks, generator=generator, device="cuda") < keep
    last = torch.clamp(torch.arange(1, tiles + 1, device="cuda") * block_q, max=case.s) - 1 + case.t - case.s
    return mask & (torch.arange(blocks, device="cuda")[None] * block_k <= last[:, None])


@pytest.mark.parametrize(("s", "t"), DENSE)
def test_dense(path, s, t):
    from tests.kernels.oracle import Case

    for d, dtype in itertools.product(HEAD_DIMS[path], (_torch().bfloat16, _torch().float16)):
        _run(path, Case(s, t, d, dtype=dtype))


@pytest.mark.parametrize("block_k", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_lists(path, keep, block_k):
    from tests.kernels.oracle import Case

    for d, (s, t) in itertools.product(HEAD_DIMS[path], ((799, 799), (1023, 1024), (300, 1700))):
        case = Case(s, t, d, spread=2.0)
        _run(path, case, _random_mask(case, keep, seed=d, block_k=block_k), block_k=block_k)


def test_block_q_256(path):
    from tests.kernels.oracle import Case

    case = Case(1000, 1500)
    _run(path, case, _random_mask(case, 0.3, 1, block_q=256), block_q=256)


def test_padding(path):
    from tests.kernels.oracle import Case

    for bounds in (((0, 700), (37, 1000)), ((300, 301), (0, 1)), ((999, 1000), (64, 960)), ((500, 500), (0, 1000))):
        case = Case(800, 1000, batch=2, bounds=bounds)
        _run(path, case)
        _run(path, case, _random_mask(case, 0.4, 3))


def test_softcap(path):
    from tests.kernels.oracle import Case

    for cap, dtype in itertools.product((0.5, 20.0, 50.0), (_torch().bfloat16, _torch().float16)):
        _run(path, Case(513, 700, softcap=cap, spread=4.0, dtype=dtype))


def test_random_cases(path):
    """300 seeded draws over every dimension at once."""
    from tests.kernels.oracle import Case

    torch = _torch()
    rng = random.Random(7)
    for seed in range(300):
        t = rng.choice([rng.randint(1, 300), rng.randint(300, 2000)])
        s = rng.choice([t, rng.randint(1, t)])
        kv_heads = rng.choice([1, 2])
        batch = rng.choice([1, 1, 2])
        bounds = None
        if rng.random() < 0.3:
            bounds = tuple(tuple(sorted((rng.randint(0, t), rng.randint(0, t)))) for _ in range(batch))
        case = Case(
            s,
            t,
            d=rng.choice(HEAD_DIMS[path]),
            heads=kv_heads * rng.choice([1, 4, 8]),
            kv_heads=kv_heads,
            batch=batch,
            dtype=rng.choice([torch.bfloat16, torch.float16]),
            softcap=rng.choice([0.0, 0.0, 30.0]),
            bounds=bounds,
            spread=rng.choice([0.5, 1.0, 3.0]),
            seed=seed,
        )
        block_k = rng.choice([32, 64, 64, 128])
        mask = None if rng.random() < 0.3 else _random_mask(case, rng.choice([0.05, 0.3, 0.9]), seed, block_k=block_k)
        _run(path, case, mask, block_k=block_k)


def test_strided_inputs_and_output(path):
    """[B, S, H, D] storage, as a fused projection leaves it."""
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case, assert_as_good_as_plain, attention

    torch = _torch()
    case = Case(500, 500, batch=2)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors())
    output = torch.full((2, 500, 4, 128), torch.nan, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    Call(q, k, v, output=output, path=path).attend()
    exact, _, plain = attention(case, q, k, v)
    assert_as_good_as_plain(output, exact, plain, "strided")


def test_nan_stays_in_its_head(path):
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    q, k, v = Case(700, 700, heads=8, kv_heads=4).tensors()
    clean = Call(q, k, v, path=path).attend().clone()
    for tensor, kv in ((q, None), (k, 1), (v, 2)):
        index = (0, 3) if kv is None else (0, kv)
        saved = tensor[index].clone()
        for poison in (torch.nan, torch.inf):
            tensor[index] = poison
            out = Call(q, k, v, path=path).attend()
            touched = {3} if kv is None else {2 * kv, 2 * kv + 1}
            for h in set(range(8)) - touched:
                assert torch.equal(out[0, h], clean[0, h]), (h, poison)
        tensor[index] = saved


def test_nan_in_the_padding_of_a_batch_item_reaches_nothing():
    """The sm80 kernels read zeros where a key is not real."""
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    case = Case(300, 500, bounds=((70, 430),))
    q, k, v = case.tensors()
    clean = Call(q, k, v, bounds=case.bounds_tensor(), path="sm80").attend().clone()
    for x in (k, v):
        x[:, :, :70] = torch.nan
        x[:, :, 430:] = torch.inf
    assert torch.equal(Call(q, k, v, bounds=case.bounds_tensor(), path="sm80").attend(), clean)


@pytest.mark.parametrize(("name", "step"), [("residue", {"stride": 16}), ("tile", {"sample_rows": 32})])
def test_graph_replay_and_two_streams(path, name, step):
    from graph_passes.op import Policy
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    policy = Policy(policy=name, min_length=0, **step)
    first, second = Case(3000, 3000, seed=1).tensors(), Case(3000, 3000, seed=2).tensors()
    expected = [Call(*x, policy, path=path).run().clone() for x in (first, second)]
    inputs = [x.clone() for x in first]
    call = Call(*inputs, policy, path=path)
    call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    for x, want in zip((first, second), expected, strict=True):
        for target, source in zip(inputs, x, strict=True):
            target.copy_(source)
        call.output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(call.output, want)
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = [Call(*x, policy, path=path) for x in (first, second)]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, one in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                one.run()
    torch.cuda.synchronize()
    for one, want in zip(calls, expected, strict=True):
        assert torch.equal(one.output, want)
