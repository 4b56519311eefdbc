"""The generic kernels' own source on the CPU emulator, against the NumPy reference: every policy, mask and dtype of the contract.

Needs g++, the CUDA headers and the CUTLASS headers; no device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from graph_passes.op import Policy
from graph_passes.reference import attend, select
from sa_export.kernels import is_full, make_problem, supports
from sa_export.kernels import native as door
from sa_export.kernels.native import BlockLists, PrefillParams, Tensor
from tests.kernels.emulator.door import emulated_library

pytestmark = pytest.mark.slow
MASKS = ("left", "right", "both", "holes", "nothing")


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with emulated_library("the generic kernels"):
        yield


def key_mask(kind: str, batch: int, t: int, seed: int) -> np.ndarray | None:
    """Bool [B, T]: padding on the left, the right, both sides, holes, or one item without a real key."""
    if not kind:
        return None
    rng, mask, index = np.random.default_rng(seed), np.ones((batch, t), bool), np.arange(t)
    for b in range(batch):
        low, high = sorted(rng.integers(0, t + 1, 2))
        if kind in ("left", "both"):
            mask[b] &= index >= low // 2
        if kind in ("right", "both"):
            mask[b] &= index < t - (t - high) // 2
        if kind == "holes" and b == 0:  # the other items keep an interval
            mask[b] = rng.random(t) < 0.7
    if kind == "nothing":
        mask[-1] = False
    return mask


@dataclass
class Case:
    """One seeded call through the library's C door on CPU memory, everything it writes full of poison before."""

    policy: Policy
    s: int = 150
    t: int = 150
    d: int = 24
    dv: int = 0
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    dtype: str = "bfloat16"
    softcap: float = 0.0
    mask: str = ""
    spread: float = 2.0
    seed: int = 0
    scratch: int = 0
    host_alpha: bool = False
    path: str = "generic"

    def __post_init__(self) -> None:
        import torch

        self.dv = self.dv or self.d
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, rows: int, width: int, std: float) -> torch.Tensor:
            return (torch.randn(self.batch, heads, rows, width, generator=generator) * std).to(getattr(torch, self.dtype))

        self.q = draw(self.heads, self.s, self.d, self.spread)
        self.k, self.v = draw(self.kv_heads, self.t, self.d, 1.0), draw(self.kv_heads, self.t, self.dv, 1.0)
        self.out = torch.full((self.batch, self.heads, self.s, self.dv), torch.nan, dtype=self.q.dtype)
        self.lse = np.full((self.batch, self.heads, self.s), np.nan, np.float32)
        self.certificate = np.full((self.batch, self.heads, 2), np.nan, np.float32)
        self.real = key_mask(self.mask, self.batch, self.t, self.seed)
        self.scale = self.d**-0.5
        self.problem = make_problem(
            self.batch, self.heads, self.kv_heads, self.s, self.t, self.d, self.policy, dtype=self.dtype, softcap=self.softcap,
            value_dim=self.dv, key_mask=self.real is not None, certificate=True, path=self.path, scratch_bytes=self.scratch,
        )  # fmt: skip
        answer = supports(self.problem)
        assert (answer.ok, answer.path) == (True, self.path), answer
        size = door.load().sa_workspace_bytes(ctypes.byref(self.problem))
        self.storage = np.full(size + 512, 0xFF, np.uint8)
        self.workspace = -(-self.storage.ctypes.data // 256) * 256
        self.size = size
        self.canary = self.storage[self.workspace - self.storage.ctypes.data + size :]
        self.alpha, self.alpha_slash = np.float32(self.policy.alpha), np.float32(self.policy.alpha_slash)
        per_head = {
            "alpha": self.alpha.ctypes.data if len(self.alpha) > 1 else None,
            "alpha_slash": self.alpha_slash.ctypes.data if len(self.alpha_slash) > 1 else None,
        }
        self.bytes = None if self.real is None else self.real.astype(np.uint8)
        self.params = PrefillParams(
            problem=self.problem,
            query=self._tensor(self.q),
            key=self._tensor(self.k),
            value=self._tensor(self.v),
            output=self._tensor(self.out),
            lse=self.lse.ctypes.data,
            key_mask=None if self.bytes is None else self.bytes.ctypes.data,
            certificate=self.certificate.ctypes.data,
            **{("host_" if self.host_alpha else "") + name: value for name, value in per_head.items()},
        )

    @staticmethod
    def _tensor(x) -> Tensor:
        return Tensor(x.data_ptr(), *x.stride()[:3])

    def call(self, name: str, *arguments: object) -> None:
        code, sentence = door.message_of(name, ctypes.byref(self.params), *arguments, self.workspace, self.size, None)
        assert code == 0, sentence
        assert (self.canary == 0xFF).all(), f"{name} wrote behind its workspace"

    def stages(self) -> tuple[np.ndarray, np.ndarray]:
        """(mass as sample() writes it, kept bool [B, Hq, nQ, nK]), over the chunks that run() makes."""
        p = self.policy
        tiles, blocks = -(-self.s // p.block_q), -(-self.t // p.block_k)
        step = tiles if p.policy in ("column_slash", "stripe_window") else door.load().sa_chunk_tiles(ctypes.byref(self.problem))
        assert step < tiles or not self.scratch or p.policy == "column_slash"
        masses, kept = [], np.zeros((self.batch, self.heads, tiles, blocks), bool)
        for first in range(0, tiles, step):
            count = min(step, tiles - first)
            rows = door.load().sa_mass_rows(ctypes.byref(self.problem), count)
            mass = np.full((self.batch, self.heads, rows, blocks), np.nan, np.float32)
            self.call("sa_sample", first, count, mass.ctypes.data)
            counts = np.full((self.batch, self.heads, count), -1, np.int32)
            indices = np.full((*counts.shape, blocks), -1, np.int32)
            lists = BlockLists(counts.ctypes.data, indices.ctypes.data, first, count, blocks)
            self.call("sa_filter", mass.ctypes.data, ctypes.byref(lists))
            for b, h, t in np.ndindex(*counts.shape):
                chosen = indices[b, h, t][: counts[b, h, t]]
                assert (np.diff(chosen) > 0).all()
                kept[b, h, first + t][chosen] = True
            masses.append(mass)
        return np.concatenate(masses, 2), kept

    def check(self) -> None:
        """The operator in one call, and its stages, against the reference."""
        import torch

        p = self.policy
        q, k, v = (x.double().numpy() for x in (self.q, self.k, self.v))
        want = select(q, k, v, self.real, p, self.scale, self.softcap)
        kept = want.block_mask
        if not is_full(self.problem):
            mass, kept = self.stages()
            if self.path == "generic":  # the other paths' selections have their own tests
                self._check_mass(mass, want)
                np.testing.assert_array_equal(kept, want.block_mask)
        self.call("sa_run")
        exact, _ = attend(q, k, v, self.real, kept, p.block_q, p.block_k, self.scale, self.softcap)
        exact = torch.from_numpy(exact)
        plain = self._plain(kept)
        for name, size in (("norm", torch.linalg.vector_norm), ("worst", lambda x: x.abs().max())):
            ours, theirs = size(self.out.double() - exact).item(), size(plain.double() - exact).item()
            assert ours <= 2 * theirs + 1e-30, f"{name}: error {ours:.2e}, plain {theirs:.2e}"
        if (kept == want.block_mask).all():
            np.testing.assert_allclose(self.certificate, want.certificate, rtol=0, atol=2e-5 if self.path == "generic" else 2e-3)
        self._check_lse(kept)

    def _check_mass(self, mass: np.ndarray, want) -> None:
        p = self.policy
        heads = (np.broadcast_to(np.float32(p.alpha), self.heads) < 1) & (
            (p.policy != "column_slash") | (np.broadcast_to(np.float32(p.alpha_slash), self.heads) < 1)
        )
        exact = want.mass
        if want.slash_mass is not None:
            exact = np.concatenate([want.mass, want.slash_mass[:, :, None]], 2)
        if p.policy in ("column_slash", "stripe_window"):
            total = mass.sum(-1, keepdims=True)
            mass = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
            written = np.ones(mass.shape[2:], bool)
        else:
            last = np.minimum((np.arange(mass.shape[2]) + 1) * p.block_q, self.s) - 1 + self.t - self.s
            written = np.arange(mass.shape[3]) * p.block_k <= last[:, None]
            assert np.isnan(mass[:, heads][..., ~written]).all()
        got = mass[:, heads][..., written]
        np.testing.assert_allclose(got, exact[:, heads][..., written], rtol=1e-4, atol=2e-5 * max(exact.max(), 1e-30))

    def _allowed(self, kept: np.ndarray) -> np.ndarray:
        """Bool [B, Hq, S, T]."""
        p = self.policy
        position = np.arange(self.s)[:, None] + self.t - self.s
        grid = np.repeat(np.repeat(kept, p.block_q, 2)[:, :, : self.s], p.block_k, 3)[..., : self.t]
        base = np.arange(self.t) <= position
        return grid & base & (True if self.real is None else self.real[:, None, None])

    def _logits(self, q, k):
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, 1).mT * self.scale
        return self.softcap * (scores / self.softcap).tanh() if self.softcap else scores

    def _plain(self, kept: np.ndarray):
        """What PyTorch operators in the inputs' dtype answer: the bound on our error is twice theirs."""
        import torch

        allowed = torch.from_numpy(self._allowed(kept))
        scores = self._logits(self.q, self.k).float().masked_fill(~allowed, -torch.inf)
        p = torch.softmax(scores, -1).masked_fill(~allowed.any(-1, keepdim=True), 0.0).to(self.q.dtype)
        return p @ self.v.repeat_interleave(self.heads // self.kv_heads, 1)

    def _check_lse(self, kept: np.ndarray) -> None:
        import torch

        allowed = torch.from_numpy(self._allowed(kept))
        exact = torch.logsumexp(self._logits(self.q.double(), self.k.double()).masked_fill(~allowed, -torch.inf), -1)
        np.testing.assert_allclose(self.lse, exact.numpy(), rtol=0, atol=1e-4)


def policy(name: str, **changes) -> Policy:
    base = {"min_length": 0, "alpha": (0.7,), "sink": 16, "dense_rows": 8, "block_q": 32, "block_k": 16, "stride": 8, "sample_rows": 8}
    if name == "column_slash":
        base |= {"segment": 50, "alpha_slash": (0.6,)}
    if name == "stripe_window":
        base |= {"sample_ratio": 0.2}
    return Policy(policy=name, **{**base, **changes})


ALL = ("residue", "tile", "column_slash", "stripe_window", "dense")


@pytest.mark.parametrize("mask", ["", *MASKS])
@pytest.mark.parametrize("name", ALL)
def test_masks(name, mask):
    Case(policy(name), s=100, t=130, mask=mask, batch=2 if mask in ("holes", "nothing") else 1, seed=3).check()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(name, dtype):
    Case(policy(name), s=90, t=90, dtype=dtype, softcap=3.0 if dtype == "float16" else 0.0, d=40, seed=5).check()


@pytest.mark.parametrize(
    ("name", "changes", "call"),
    [
        ("residue", {"stride": 1, "block_k": 128, "block_q": 128}, {}),
        ("residue", {"stride": 16, "block_q": 16}, {"s": 70, "t": 101}),
        ("residue", {"stride": 4, "block_q": 256, "block_k": 256, "alpha": (0.3, 1.0)}, {"s": 300, "t": 520, "d": 8}),
        ("residue", {"stride": 2, "block_q": 64, "block_k": 64, "value_weight": 0}, {"host_alpha": True}),
        ("tile", {"sample_rows": 1}, {"s": 113, "t": 203}),
        ("tile", {"sample_rows": 128, "block_q": 128, "block_k": 128}, {"s": 200, "t": 200, "d": 8}),
        ("tile", {"alpha": (0.5, 1.0, 0.9, 0.2)}, {"heads": 4, "kv_heads": 2, "host_alpha": True}),
        ("tile", {"alpha": (0.5, 1.0)}, {}),
        ("tile", {"window": 40}, {"s": 33, "t": 190, "scratch": 1}),
        ("residue", {"window": 40}, {"s": 150, "t": 190, "scratch": 1}),
        ("tile", {"alpha": (0.95, 0.5), "max_density": 0.4}, {"s": 150, "t": 190, "mask": "holes"}),
        ("residue", {"alpha": (0.9,), "max_density": 0.3}, {"s": 150, "t": 190}),
        ("residue", {"max_density": 0.01, "window": 40}, {"mask": "left"}),
        ("column_slash", {"segment": 1, "sample_rows": 1}, {"s": 60, "t": 80}),
        ("column_slash", {"segment": 1000, "sample_rows": 64}, {}),
        ("column_slash", {"alpha": (0.5, 0.9), "alpha_slash": (1.0, 0.4)}, {}),
        ("column_slash", {"alpha": (0.5, 0.9), "alpha_slash": (0.3, 0.4)}, {"host_alpha": True, "scratch": 1}),
        ("stripe_window", {"sample_ratio": 1.0, "window_ratio": 0.0}, {"s": 60, "t": 100}),
        ("stripe_window", {"sample_ratio": 0.4, "window_ratio": 0.3}, {"s": 60, "t": 100}),
        ("dense", {}, {"s": 1, "t": 1}),
        ("dense", {}, {"s": 65, "t": 129, "d": 40, "dv": 72}),
        ("dense", {}, {"s": 40, "t": 40, "d": 256, "dv": 200, "heads": 1}),
        ("tile", {}, {"s": 17, "t": 90, "d": 5, "dv": 3}),
        ("tile", {"min_length": 151}, {}),
    ],
)
def test_shapes(name, changes, call):
    Case(policy(name, **changes), **{"seed": 1, **call}).check()


@pytest.mark.parametrize(
    "call",
    [
        {"s": 1, "t": 1},
        {"s": 1, "t": 700, "heads": 8, "kv_heads": 2, "mask": "left"},
        {"s": 16, "t": 600, "heads": 8, "kv_heads": 1, "d": 40, "dv": 24, "dtype": "float32"},
        {"s": 5, "t": 300, "batch": 3, "mask": "holes", "softcap": 5.0},
        {"s": 2, "t": 90, "batch": 2, "mask": "nothing"},
    ],
)
def test_decode(call):
    Case(policy("tile"), **call).check()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "s"), [("tile", 140), ("column_slash", 140), ("dense", 140), ("tile", 3)])
def test_masks_on_the_fast_path(name, s, mask):
    """Items whose mask is an interval are the fast kernels', items with holes the generic ones', in one call."""
    wanted = policy(name, block_q=128, block_k=64, stride=16, sample_rows=16)
    Case(wanted, s=s, t=200, d=64, mask=mask, batch=2, path="sm90", seed=2).check()


def test_nan_stays_in_its_head():
    import torch

    clean = Case(policy("tile"), heads=4, kv_heads=2)
    clean.call("sa_run")
    for name in ("k", "v"):
        case = Case(policy("tile"), heads=4, kv_heads=2)
        getattr(case, name)[0, 1] = torch.nan
        case.call("sa_run")
        assert torch.equal(case.out[0, :2], clean.out[0, :2])
        assert torch.isnan(case.out[0, 2:]).all()


def test_masses_that_are_no_number_keep_all():
    for name in ("column_slash", "stripe_window", "tile"):
        case = Case(policy(name, dense_rows=0), heads=1)
        for value in (0.0, np.nan, np.inf):
            mass = np.full((1, 1, 5, 10), value, np.float32)
            counts, indices = np.zeros(5, np.int32), np.zeros((5, 10), np.int32)
            lists = BlockLists(counts.ctypes.data, indices.ctypes.data, 0, 5, 10)
            case.call("sa_filter", mass.ctypes.data, ctypes.byref(lists))
            assert counts.tolist() == [2, 4, 6, 8, 10], (name, value)


@pytest.mark.parametrize("name", ["column_slash", "stripe_window"])
def test_ties_go_to_the_lower_index(name):
    case = Case(policy(name, alpha=(0.5,), alpha_slash=(0.01,), dense_rows=0, sink=0, window_ratio=0.0), s=160, t=160, heads=1)
    mass = np.ones((1, 1, 2, 10), np.float32)
    mass[0, 0, 1] = np.arange(10) == 0  # the slash of distance class 0
    counts, indices = np.zeros(5, np.int32), np.full((5, 10), -1, np.int32)
    lists = BlockLists(counts.ctypes.data, indices.ctypes.data, 0, 5, 10)
    case.call("sa_filter", mass.ctypes.data, ctypes.byref(lists))
    for t in range(5):
        own = {2 * t, 2 * t + 1} | ({2 * t - 1} if name == "column_slash" and t else set())
        assert set(indices[t][: counts[t]].tolist()) == {k for k in range(5) if k <= 2 * t + 1} | own


def test_misuse_is_refused_in_one_sentence():
    case = Case(policy("tile"), mask="holes")
    for change, words in (
        ({"key_mask": None}, "has_key_mask is 1 and key_mask is null"),
        ({"certificate": None}, "has_certificate is 1 and certificate is null"),
        ({"bounds": case.lse.ctypes.data}, "Both key_mask and bounds are given"),
    ):
        saved = {name: getattr(case.params, name) for name in change}
        for name, value in change.items():
            setattr(case.params, name, value)
        code, sentence = door.message_of("sa_run", ctypes.byref(case.params), case.workspace, case.size, None)
        assert code == 2
        assert words in sentence
        for name, value in saved.items():
            setattr(case.params, name, value)
    code, sentence = door.message_of("sa_run", ctypes.byref(case.params), case.workspace, case.size - 1, None)
    assert code == 2
    assert f"needs {case.size}" in sentence
    assert case.out.isnan().all(), "a refused call wrote its output"
