"""One small launch of every kernel, for compute-sanitizer. Usage: python plugins/dev/small_cases.py"""

from __future__ import annotations

import torch

from graph_passes.op import Policy
from sa_export.kernels import Call


def main() -> None:
    torch.manual_seed(0)
    for d in (64, 128, 256):
        q, k, v = (torch.randn(1, h, 700, d, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
        bounds = torch.tensor([[5, 690]], dtype=torch.int32, device="cuda")
        for policy in (
            Policy(policy="dense"),
            Policy(policy="residue", stride=16, min_length=0),
            Policy(policy="tile", sample_rows=32, min_length=0),
        ):
            out = Call(q, k, v, policy, bounds=bounds).prefill()
            assert bool(torch.isfinite(out).all()), (d, policy)
        Call(q[:, :, :3].contiguous(), k, v).decode()
    torch.cuda.synchronize()
    print("small cases: done")


if __name__ == "__main__":
    main()
