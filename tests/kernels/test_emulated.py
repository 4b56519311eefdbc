"""The kernels' own source on a CPU emulator of a thread block, against float64.

Needs g++, the CUDA headers and the CUTLASS headers; no device. It proves what a device run cannot isolate: indices, masks, slices,
reductions and the hand-over between threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from graph_passes.op import Policy
from graph_passes.reference import select
from sa_export.kernels import make_problem
from sa_export.kernels import native as door
from sa_export.kernels.native import BlockLists, PrefillParams, Tensor
from tests.kernels.emulator.door import emulated_library

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with emulated_library("the kernels"):
        yield


class Call:
    """A call on CPU tensors: [B, H, rows, D] in the kernel's dtype, workspace and outputs full of poison."""

    def __init__(
        self, s, t, policy, d=64, heads=2, kv_heads=1, batch=1, dtype="bfloat16", softcap=0.0, bounds=None, spread=2.0, seed=0, scratch=0
    ):
        import torch

        from tests.kernels.oracle import Case

        bounds = None if bounds is None else tuple(map(tuple, bounds))
        self.case = Case(s, t, d, heads, kv_heads, batch, getattr(torch, dtype), softcap, bounds, spread, seed, device="cpu")
        self.q, self.k, self.v = self.case.tensors()
        self.out = torch.full_like(self.q, torch.nan)
        self.lse = np.full((batch, heads, s), np.nan, np.float32)
        self.alpha = np.float32(policy.alpha)
        self.bounds = None if bounds is None else np.int32(bounds)
        self.policy = policy
        self.problem = make_problem(batch, heads, kv_heads, s, t, d, policy, dtype=dtype, softcap=softcap, scratch_bytes=scratch)
        size = door.load().sa_workspace_bytes(ctypes.byref(self.problem))
        assert size > 0
        self.storage = np.full(size + 256, 0xFF, np.uint8)
        self.workspace = -(-self.storage.ctypes.data // 256) * 256
        self.size = size
        self.params = PrefillParams(
            problem=self.problem,
            query=self._tensor(self.q),
            key=self._tensor(self.k),
            value=self._tensor(self.v),
            output=self._tensor(self.out),
            alpha=self.alpha.ctypes.data if len(self.alpha) > 1 else None,
            bounds=None if self.bounds is None else self.bounds.ctypes.data,
            lse=self.lse.ctypes.data,
        )

    @staticmethod
    def _tensor(x):
        strides = [0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
        return Tensor(x.data_ptr(), *strides)

    def run(self, name, *arguments):
        code, sentence = door.message_of(name, ctypes.byref(self.params), *arguments, self.workspace, self.size, None)
        assert code == 0, sentence

    def stages(self):
        """(mass, kept bool [B, Hq, nQ, nK]) of sample and filter over the whole call."""
        p = self.policy
        shape = (*self.q.shape[:2], -(-self.q.shape[2] // p.block_q), -(-self.k.shape[2] // p.block_k))
        mass = np.full(shape, np.nan, np.float32)
        self.run("sa_sample", 0, shape[2], mass.ctypes.data)
        return mass, self.filter(mass)

    def filter(self, mass):
        """Kept bool [B, Hq, nQ, nK] of masses of every tile."""
        counts, indices = np.full(mass.shape[:3], -1, np.int32), np.full(mass.shape, -1, np.int32)
        lists = BlockLists(counts.ctypes.data, indices.ctypes.data, 0, *mass.shape[2:])
        self.run("sa_filter", mass.ctypes.data, ctypes.byref(lists))
        kept = np.zeros(mass.shape, bool)
        for at in np.ndindex(*mass.shape[:3]):
            chosen = indices[at][: counts[at]]
            assert (np.diff(chosen) > 0).all()
            kept[at][chosen] = True
        return kept

    def check_output(self, kept):
        """At most twice the error of a plain implementation in the same dtype."""
        import torch

        from tests.kernels import oracle

        exact, exact_lse, plain = oracle.attention(
            self.case, self.q, self.k, self.v, torch.from_numpy(kept), self.policy.block_q, self.policy.block_k
        )
        oracle.assert_as_good_as_plain(self.out, exact, plain, self.case)
        np.testing.assert_allclose(self.lse, exact_lse.numpy(), rtol=0, atol=2e-4)

    def check_selection(self, mass, kept):
        import torch

        from tests.kernels import oracle

        exact = oracle.sampled_mass(self.case, self.q, self.k, self.v, self.policy)
        _, last, block = oracle.grid_positions(self.case, self.policy)
        sparse = np.broadcast_to(self.policy.alpha, self.case.heads) < 1
        dense = torch.stack([oracle.dense_tiles(self.case, self.policy, b) for b in range(self.case.batch)])[:, None]
        written = np.broadcast_to(((block <= last) & ~dense).numpy(), mass.shape)[:, sparse]
        got, want = mass[:, sparse][written], exact.numpy()[:, sparse][written]
        rounding = oracle.mass_rounding(self.policy)
        np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-6 * want.max())
        oracle.assert_selection(self.case, self.policy, torch.from_numpy(kept), exact, rounding=rounding)
        # The NumPy reference decides on its own masses: only a block at the threshold may differ.
        real = (
            None if self.bounds is None else (np.arange(self.case.t) >= self.bounds[:, :1]) & (np.arange(self.case.t) < self.bounds[:, 1:])
        )
        arrays = (x.double().numpy() for x in (self.q, self.k, self.v))
        reference = select(*arrays, real, self.policy, self.case.multiplier, self.case.softcap)
        assert (kept != reference.block_mask).any(-1).mean() < 0.05


def residue(stride=16, **changes):
    return Policy(policy="residue", stride=stride, **{"min_length": 0, "alpha": (0.7,), "sink": 0, "dense_rows": 0, **changes})


def tile(rows=16, **changes):
    return Policy(policy="tile", sample_rows=rows, **{"min_length": 0, "alpha": (0.7,), "sink": 0, "dense_rows": 0, **changes})


@pytest.mark.parametrize(
    ("call", "policy"),
    [
        ({"s": 400, "t": 400}, residue()),
        ({"s": 113, "t": 203}, residue(8)),
        ({"s": 300, "t": 411, "d": 96, "dtype": "float16"}, residue(32)),
        ({"s": 290, "t": 530, "bounds": [[37, 500]]}, residue(sink=64)),
        ({"s": 270, "t": 270, "softcap": 5.0}, residue(window=70)),
        ({"s": 300, "t": 300}, residue(block_q=256, block_k=32)),
        ({"s": 300, "t": 300}, residue(block_k=128, alpha=(0.5, 1.0))),
        ({"s": 300, "t": 300}, residue(block_k=256)),
        ({"s": 17, "t": 700}, residue()),
        ({"s": 140, "t": 200}, residue(4, value_weight=0)),
        ({"s": 260, "t": 300, "heads": 1}, residue(2)),
        ({"s": 400, "t": 400}, tile(32)),
        ({"s": 300, "t": 300, "heads": 1}, tile(128, block_k=256)),
        ({"s": 300, "t": 411, "heads": 1}, tile(64, value_weight=0)),
        ({"s": 400, "t": 400}, tile()),
        ({"s": 300, "t": 411}, tile(8)),
        ({"s": 299, "t": 299, "d": 96}, tile(4)),
        ({"s": 256, "t": 300}, tile(16, block_k=128)),
        ({"s": 600, "t": 600, "heads": 1}, tile(16, block_q=256, block_k=32)),
        ({"s": 600, "t": 700}, residue(dense_rows=300)),
        ({"s": 290, "t": 530, "bounds": [[37, 500]], "heads": 1}, tile(dense_rows=100)),
        ({"s": 200, "t": 300, "bounds": [[290, 300]]}, residue(sink=64)),
        ({"s": 600, "t": 700}, residue(sink=64, alpha=(0.9,), max_density=0.5)),
        ({"s": 400, "t": 700, "bounds": [[37, 690]]}, tile(32, alpha=(0.95, 0.5), max_density=0.3)),
    ],
)
def test_selection_and_output(call, policy):
    c = Call(policy=policy, **call)
    mass, kept = c.stages()
    c.check_selection(mass, kept)
    c.run("sa_run")
    c.check_output(kept)


@pytest.mark.parametrize("policy", [residue(sink=64), residue(8, sink=64), tile(16, sink=64)])
def test_free_blocks_beside_a_sink(policy):
    """Four keys hold all but a millionth of the mass of each other key: what is left is still ranked, to the rounding of the table."""
    import torch

    from tests.kernels import oracle

    c = Call(500, 500, policy, heads=1)
    c.q[..., 0], c.k[..., 0] = 4.0, 0.0
    c.k[:, :, :4, 0] = 14.0 / (4.0 * c.case.multiplier)
    mass, kept = c.stages()
    exact = oracle.sampled_mass(c.case, c.q, c.k, c.v, policy)
    _, last, block = oracle.grid_positions(c.case, policy)
    free = ((block <= last) & ~oracle.forced(c.case, policy, 0)).numpy()
    assert free.any()
    np.testing.assert_allclose(mass[0, 0][free], exact[0, 0].numpy()[free], rtol=4e-3)
    oracle.assert_selection(c.case, policy, torch.from_numpy(kept), exact, rounding=4e-3)


def test_many_row_groups_and_chunks():
    """More than 256 slice rows, cut last tile, and a scratch that forces several chunks."""
    policy = tile(16)
    c = Call(2500, 2500, policy, heads=1, seed=3, scratch=1)
    whole = Call(2500, 2500, policy, heads=1, seed=3)
    mass, kept = whole.stages()
    whole.check_selection(mass, kept)
    c.run("sa_run")
    c.check_output(kept)


@pytest.mark.parametrize("policy", [residue(dense_rows=100, sink=64), tile(dense_rows=100, sink=64)])
def test_bounds_beyond_the_keys_mean_all_of_them(policy):
    found = []
    for bounds in (None, np.int32([[-70, 520]])):
        c = Call(400, 400, policy)
        c.params.bounds = None if bounds is None else bounds.ctypes.data
        mass, _ = c.stages()
        # What sampling has not written looks like evidence for one block, so that nobody can decide on it unseen.
        kept = c.filter(np.where(np.isnan(mass), np.float32(np.arange(mass.shape[-1]) == 1), mass))
        c.run("sa_run")
        found.append((mass, kept, c.out.float().numpy()))
    for without, beyond in zip(*found, strict=True):
        np.testing.assert_array_equal(without, beyond)


@pytest.mark.parametrize("tokens", [8192, 131072, 200_000, 1_048_576])
def test_chunks_have_one_size(tokens):
    problem = make_problem(1, 32, 8, tokens, tokens, 64, residue(), dtype="bfloat16")
    chunk, tiles = door.load().sa_chunk_tiles(ctypes.byref(problem)), -(-tokens // 128)
    chunks, group = -(-tiles // chunk), 256 * 16 // 128
    assert chunk == tiles or chunk % group == 0
    assert tiles > chunks * (chunk - group)  # a group of rows less would not be enough


@pytest.mark.parametrize("blocks", [30, 2100])
def test_filter_takes_ties_from_the_lower_index(blocks):
    """Both team sizes; equal masses, so that of the free blocks the lowest are taken, as many as alpha needs."""
    n, first = 64 * blocks, blocks // 2 - 4
    c = Call(n, n, residue(alpha=(0.5,)), heads=1, scratch=1 << 40)
    mass = np.ones((4, blocks), np.float32)
    counts, indices = np.full(4, -1, np.int32), np.full((4, blocks), -1, np.int32)
    lists = BlockLists(counts.ctypes.data, indices.ctypes.data, first, 4, blocks)
    c.run("sa_filter", mass.ctypes.data, ctypes.byref(lists))
    for at in range(4):
        begun = 2 * (first + at) + 2
        free = -(-(begun - 2) // 2)
        assert indices[at][: counts[at]].tolist() == [*range(free), *range(begun - 2, begun)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ({"s": 1500, "t": 1900, "bounds": [[70, 1900], [0, 1700]], "batch": 2}, {"sink": 130, "dense_rows": 100}),
        ({"s": 1500, "t": 1500}, {"alpha": (0.5, 1.0), "window": 200}),
        ({"s": 500, "t": 600, "bounds": [[300, 600]]}, {"sink": 200}),  # sink and own blocks overlap
        ({"s": 300, "t": 32000}, {"block_k": 16, "sink": 100}),  # the largest that a warp takes
        ({"s": 300, "t": 134400}, {"alpha": (0.5, 0.75)}),  # a thread block a tile
    ],
)
def test_filter_under_a_budget(size, changes, ties):
    """Equal to float64's lists, whether the budget binds or not, in ties at the threshold too, and with less room than the forced blocks take."""
    import torch

    from tests.kernels import oracle

    differs = set()
    for share in (1.0, 0.8, 0.4, 0.1, 0.001):
        c = Call(policy=residue(**{"alpha": (0.75,), **changes, "max_density": share}), scratch=1 << 40, **size)
        mass = oracle.exact_masses(c.case, c.policy, ties)
        want = oracle.select(c.case, c.policy, mass.double()).numpy()
        _, last, block = oracle.grid_positions(c.case, c.policy)
        kept = c.filter(mass.masked_fill(block > last, torch.nan).numpy())
        np.testing.assert_array_equal(kept, want, err_msg=f"max_density {share}")
        if share == 1:
            unlimited = kept
        differs |= set((kept != unlimited).any(-1).ravel().tolist())
    assert differs == {True, False}, "the budget must bind somewhere, and not everywhere"


def test_filter_without_evidence_keeps_all():
    c = Call(1000, 1000, residue(), heads=1)
    for value in (0.0, np.nan, np.inf):
        mass = np.full((8, 16), value, np.float32)
        counts, indices = np.zeros(8, np.int32), np.zeros((8, 16), np.int32)
        lists = BlockLists(counts.ctypes.data, indices.ctypes.data, 0, 8, 16)
        c.run("sa_filter", mass.ctypes.data, ctypes.byref(lists))
        assert counts.tolist() == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(
    "call",
    [
        {"s": 1, "t": 1},
        {"s": 1, "t": 300, "heads": 8, "kv_heads": 2},
        {"s": 5, "t": 700, "heads": 4, "d": 96, "dtype": "float16", "softcap": 5.0},
        {"s": 16, "t": 1100, "heads": 2, "bounds": [[3, 1090]], "d": 96},
        {"s": 2, "t": 90, "batch": 2, "bounds": [[80, 90], [0, 11]]},
    ],
)
def test_decode(call):
    c = Call(policy=Policy(policy="dense"), **call)
    c.run("sa_run")
    c.check_output(np.ones((*c.q.shape[:2], 1, -(-c.k.shape[2] // 64)), bool))


@pytest.mark.parametrize(
    "call",
    [{"s": 129, "t": 129}, {"s": 113, "t": 203, "d": 96, "dtype": "float16"}, {"s": 300, "t": 300, "bounds": [[20, 290]], "softcap": 4.0}],
)
def test_dense(call):
    c = Call(policy=Policy(policy="dense"), **call)
    c.run("sa_run")
    c.check_output(np.ones((*c.q.shape[:2], -(-c.q.shape[2] // 128), -(-c.k.shape[2] // 64)), bool))
