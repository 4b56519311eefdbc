"""Split-key decode against float64."""

from __future__ import annotations

import itertools

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("path", "d"), [*(("sm90", d) for d in (64, 96, 128, 256)), ("sm80", 64), ("sm80", 128)])
def test_decode(path, d):
    import torch

    from sa_export.kernels import Call
    from tests.kernels.oracle import Case, assert_as_good_as_plain, attention

    for s, t, (heads, kv_heads) in itertools.product((1, 2, 5, 16), (16, 100, 799, 5000), ((4, 4), (8, 2), (8, 1))):
        for bounds, softcap, dtype in ((None, 0.0, torch.bfloat16), (((7, t - 3), (0, t)), 30.0, torch.float16)):
            case = Case(s, t, d, heads, kv_heads, batch=2, bounds=bounds, softcap=softcap, dtype=dtype)
            q, k, v = case.tensors()
            output, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device="cuda")
            Call(q, k, v, output=output, lse=lse, bounds=case.bounds_tensor(), softcap=softcap, path=path).decode()
            exact, exact_lse, plain = attention(case, q, k, v)
            assert_as_good_as_plain(output, exact, plain, case)
            torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-4)
