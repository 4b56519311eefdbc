"""Sampling with the sm80 kernels against float64, on any device that runs them."""

from __future__ import annotations

import itertools

import pytest

pytestmark = pytest.mark.gpu

STEPS = [*(("residue", s) for s in (2, 4, 8, 16, 32)), *(("tile", r) for r in (4, 8, 16, 32, 64, 128))]
SIZES = [(64, 64), (113, 203), (799, 799), (1023, 1024), (300, 1700), (2049, 2049), (17, 5000)]


def _policy(name, step, **changes):
    """step: the stride of `residue`, the sampled rows of `tile`."""
    from graph_passes.op import Policy

    return Policy(policy=name, **{"stride" if name == "residue" else "sample_rows": step, "min_length": 0, "dense_rows": 0, **changes})


def _check(case, policy):
    import torch

    from sa_export.kernels import Call
    from tests.kernels import oracle

    q, k, v = case.tensors()
    call = Call(q, k, v, policy, bounds=case.bounds_tensor(), softcap=case.softcap, path="sm80")
    assert call.support.select_path == "sm80", call.support
    mass = torch.full((case.batch, case.heads, call.tiles, call.blocks), torch.nan, device="cuda")
    call.sample(0, call.tiles, mass)
    exact = oracle.sampled_mass(case, q, k, v, policy)
    _, last, block = oracle.grid_positions(case, policy)
    mass = torch.where(block <= last, mass, 0.0)
    torch.testing.assert_close(mass.double(), exact, rtol=1e-4, atol=1e-4 * exact.max().item(), msg=lambda m: f"{case} {policy}: {m}")


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_mass(name, step):
    import torch

    from tests.kernels.oracle import Case

    for s, t in SIZES:
        _check(Case(s, t, spread=2.0), _policy(name, step))
    for d, dtype in itertools.product((64, 128), (torch.float16, torch.bfloat16)):
        _check(Case(1500, 2100, d=d, dtype=dtype, heads=8, kv_heads=1), _policy(name, step))
    _check(Case(900, 1500, batch=2, bounds=((100, 1500), (0, 1111))), _policy(name, step))
    _check(Case(900, 1500, softcap=20.0, spread=3.0), _policy(name, step))
    for block_k in (32, 128) if (name, step) != ("residue", 32) else (64, 128):
        _check(Case(900, 1500), _policy(name, step, block_k=block_k))
    _check(Case(900, 1500), _policy(name, step, value_weight=0, block_q=256))


@pytest.mark.parametrize(("name", "step"), [("residue", 16), ("tile", 32), ("tile", 64)])
def test_operator_equals_its_stages(name, step):
    """In chunks too, and the output is right for the lists."""
    import torch

    from sa_export.kernels import Call, filter_blocks
    from tests.kernels.oracle import Case, assert_as_good_as_plain, assert_selection, attention, sampled_mass

    case, policy = Case(6001, 6300, heads=4, kv_heads=1, spread=3.0), _policy(name, step, alpha=(0.8,))
    q, k, v = case.tensors()
    lists = filter_blocks(q, k, v, policy, path="sm80")
    inside = torch.arange(lists.indices.shape[-1], device="cuda") < lists.counts[..., None]
    hits = torch.zeros_like(lists.indices).scatter_add(-1, torch.where(inside, lists.indices, 0).long(), inside.int())
    assert_selection(case, policy, hits > 0, sampled_mass(case, q, k, v, policy))
    exact, _, plain = attention(case, q, k, v, hits > 0)
    staged = Call(q, k, v, policy, output=torch.full_like(q, torch.nan), path="sm80").attend(lists).clone()
    assert_as_good_as_plain(staged, exact, plain, name)
    for scratch in (0, 1 << 20):
        whole = Call(q, k, v, policy, output=torch.full_like(q, torch.nan), scratch_bytes=scratch, path="sm80").run()
        assert torch.equal(whole, staged), scratch
