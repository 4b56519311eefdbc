"""The mma.sync kernels' own source on the CPU emulator, against float64: selection, listed and full attention, decode.

Needs g++, the CUDA headers and the CUTLASS headers; no device.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from graph_passes.op import Policy
from tests.kernels.emulator.door import emulated_library
from tests.kernels.test_emulated import Call, residue, tile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def sm80() -> Iterator[None]:
    with emulated_library("the sm80 kernels", SA_EXPORT_KERNEL_PATH="sm80"):
        yield


@pytest.mark.parametrize(
    ("call", "policy"),
    [
        ({"s": 140, "t": 210, "heads": 1}, residue(16)),
        ({"s": 150, "t": 330, "bounds": ((37, 300),), "heads": 1}, residue(8, sink=64)),
        ({"s": 130, "t": 200, "softcap": 5.0, "dtype": "float16"}, residue(8, block_k=128, alpha=(0.5, 1.0))),
        ({"s": 300, "t": 300, "heads": 1}, residue(2, block_q=256, value_weight=0)),
        ({"s": 300, "t": 411, "heads": 1}, tile(64, value_weight=0)),
        ({"s": 299, "t": 299, "bounds": ((37, 290),), "heads": 1}, tile(4, block_k=128)),
        ({"s": 260, "t": 300, "heads": 1, "dtype": "float16"}, tile(16, block_q=256, block_k=32)),
        ({"s": 150, "t": 200, "heads": 1}, tile(128, block_k=16)),
        ({"s": 300, "t": 500, "heads": 1}, residue(16, alpha=(0.9,), max_density=0.5)),
    ],
)
def test_selection_and_output(call, policy):
    c = Call(policy=policy, **call)
    mass, kept = c.stages()
    c.check_selection(mass, kept)
    c.run("sa_run")
    c.check_output(kept)


def test_chunks():
    """Several row groups, a last tile that is cut short, and a scratch that forces several chunks."""
    c = Call(700, 700, tile(32), heads=1, seed=3, scratch=1)
    whole = Call(700, 700, tile(32), heads=1, seed=3)
    mass, kept = whole.stages()
    whole.check_selection(mass, kept)
    c.run("sa_run")
    c.check_output(kept)


@pytest.mark.parametrize(
    "call",
    [
        {"s": 129, "t": 129},
        {"s": 113, "t": 203, "dtype": "float16"},
        {"s": 300, "t": 300, "bounds": ((20, 290),), "softcap": 4.0},
        {"s": 3, "t": 300, "heads": 8, "kv_heads": 2},
        {"s": 150, "t": 200, "batch": 2, "bounds": ((80, 90), (0, 0))},
    ],
)
def test_full(call):
    c = Call(policy=Policy(policy="dense"), **call)
    c.run("sa_run")
    c.check_output(np.ones((*c.q.shape[:2], -(-c.q.shape[2] // 128), -(-c.k.shape[2] // 64)), bool))
