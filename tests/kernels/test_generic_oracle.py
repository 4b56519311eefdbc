"""The torch oracle of the device tests says what the NumPy reference says."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.op import Policy
from graph_passes.reference import attend, select

POLICIES = [
    Policy(policy="residue", stride=8, min_length=0, sink=16, dense_rows=8, block_q=32, block_k=16, alpha=(0.5, 1.0, 0.9, 0.3)),
    Policy(policy="tile", sample_rows=8, min_length=0, sink=0, dense_rows=0, block_q=64, block_k=32, window=40, value_weight=0),
    Policy(policy="tile", sample_rows=8, min_length=0, dense_rows=8, sink=16, block_q=32, block_k=16, alpha=(0.9,), max_density=0.4),
    Policy(
        policy="column_slash",
        sample_rows=8,
        segment=50,
        min_length=0,
        block_q=32,
        block_k=16,
        alpha=(0.5,),
        alpha_slash=(0.6, 1.0, 0.4, 0.2),
    ),
    Policy(policy="stripe_window", sample_ratio=0.4, window_ratio=0.1, min_length=0, block_q=16, block_k=16, alpha=(0.5,)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.policy}-{p.max_density:g}")
@pytest.mark.parametrize(
    ("bounds", "holes"), [(None, 0.0), (((20, 180), (0, 70)), 0.0), (((30, 31), (0, 0)), 0.0), (((30, 150), (10, 200)), 0.4)]
)
def test_oracle_equals_the_reference(policy, bounds, holes):
    torch = pytest.importorskip("torch")
    from tests.kernels import oracle

    case = oracle.Case(
        113, 203, 16, 4, 2, 2, torch.float32, bounds=bounds, holes=holes, device="cpu", spread=2.0, value_dim=24, softcap=4.0
    )
    q, k, v = case.tensors()
    mask = case.key_mask()
    real = None if mask is None else mask.numpy()
    want = select(q.numpy(), k.numpy(), v.numpy(), real, policy, case.multiplier, case.softcap)
    kept = oracle.select(case, policy, oracle.sampled_mass(case, q, k, v, policy))
    np.testing.assert_array_equal(kept.numpy(), want.block_mask)
    np.testing.assert_allclose(oracle.certificate(case, q, k, policy, kept).numpy(), want.certificate, atol=1e-9)
    exact, _, _ = oracle.attention(case, q, k, v, kept, policy.block_q, policy.block_k)
    output, _ = attend(
        q.numpy(), k.numpy(), v.numpy(), real, want.block_mask, policy.block_q, policy.block_k, case.multiplier, case.softcap
    )
    np.testing.assert_allclose(exact.numpy(), output, atol=1e-9)
