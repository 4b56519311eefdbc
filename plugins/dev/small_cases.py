"""One small launch of every kernel, for compute-sanitizer. Usage: python plugins/dev/small_cases.py [head size]..."""

from __future__ import annotations

import sys

import torch

from graph_passes.op import Policy
from sa_export.kernels import Call

POLICIES = (
    Policy(policy="dense"),
    Policy(policy="residue", stride=16, min_length=0, dense_rows=64, max_density=0.5),
    Policy(policy="residue", stride=8, min_length=0, dense_rows=64),
    Policy(policy="tile", sample_rows=64, min_length=0, dense_rows=64),
    Policy(policy="tile", sample_rows=16, block_k=32, min_length=0, dense_rows=0),
)


def main(head_sizes: list[int]) -> None:
    torch.manual_seed(0)
    for d in head_sizes:
        q, k, v = (torch.randn(1, h, 700, d, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
        bounds = torch.tensor([[5, 690]], dtype=torch.int32, device="cuda")
        for policy in POLICIES:
            call = Call(q, k, v, policy, bounds=bounds, certificate=policy.policy != "dense")
            assert bool(torch.isfinite(call.run()).all()), (d, policy)
            if call.certificate is not None:
                assert bool(((call.certificate >= 0) & (call.certificate <= 1)).all()), (d, policy, call.certificate)
        Call(q[:, :, :3].contiguous(), k, v).decode()
    torch.cuda.synchronize()
    print("small cases: done")


if __name__ == "__main__":
    main([int(d) for d in sys.argv[1:]] or [64, 128, 256])
