"""Results of checks that never ran, shaped like real ones: attention with a sink, a band, stripes, needles, and a selection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.check.result import Candidate, CheckResult, ExactCase, Gate, HeadMap, LengthResult, SiteResult

SETTINGS: dict[str, Any] = {
    "policy": "residue", "alpha": [0.95], "stride": 16, "block_q": 128, "block_k": 64, "window": 0, "sink": 64, "dense_rows": 0,
    "min_length": 1024,
}  # fmt: skip
POLICY = {"residue": 1.0, "tile": 0.9, "column_slash": 0.75, "stripe_window": 2.4}  # how much each keeps
HARM = {"residue": 0.0006, "tile": 0.0011, "column_slash": 0.075, "stripe_window": 0.058}


def attention(length: int, block_q: int, block_k: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """[nQ, nK] float32: mean probability of each key block over a tile's rows. `spread` in (0, 1]: how far the head looks."""
    nq, nk = math.ceil(length / block_q), math.ceil(length / block_k)
    row = np.minimum((np.arange(nq) + 1) * block_q, length)[:, None] - 1
    first = np.arange(nk)[None] * block_k
    distance = np.maximum(row - first, 0) / length
    mass = np.exp(-distance / (0.02 + 0.5 * spread**3)) * rng.lognormal(0, 0.8, (nq, nk))
    mass += 2.0 * (first < block_k)  # the sink
    for _ in range(int(4 + 10 * spread)):
        mass[:, rng.integers(nk)] += rng.lognormal(-1.5, 1)
    for _ in range(6):
        mass[rng.integers(nq), rng.integers(nk)] += 5.0  # needles
    mass = np.where(first <= row, mass, 0)
    return (mass / mass.sum(1, keepdims=True)).astype(np.float32)


def select(mass: np.ndarray, alpha: float, block_q: int, block_k: int, columns: bool = False) -> np.ndarray:
    """The smallest set of blocks of each tile (`columns`: of the head) that reaches alpha, with the sink and the tile's own blocks."""
    if columns:
        mass = np.tile(mass.mean(0, keepdims=True), (len(mass), 1))
    order = np.argsort(-mass, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(mass, order, 1), 1) - np.take_along_axis(mass, order, 1)
    kept = np.zeros(mass.shape, bool)
    np.put_along_axis(kept, order, before < alpha, 1)
    kept[:, 0] = True
    for t in range(len(mass)):
        kept[t, (t + 1) * block_q // block_k :] = False
        kept[t, t * block_q // block_k : (t + 1) * block_q // block_k] = True
    return kept


def sites(
    layers: int, heads: int, policy: str, rng: np.random.Generator, names: str = "layers.{}", dense: tuple[int, ...] = ()
) -> list[SiteResult]:
    out = []
    drift = 0.0
    for i in range(layers):
        if i in dense:
            density, mean, low, error = np.ones(heads), np.ones(heads), np.ones(heads), 0.0
        else:
            density = np.clip(POLICY[policy] * rng.lognormal(-1.7, 0.55, heads) * (1.3 - 0.6 * i / layers), 0.02, 1)
            mean = 1 - np.clip(rng.lognormal(-3.7, 0.5, heads) * (1 if HARM[policy] < 0.01 else 3), 0.0005, 0.3)
            low = np.clip(mean - rng.uniform(0.05, 0.6, heads), 0.02, 1)
            error = float(rng.lognormal(-3.6, 0.3)) * (1 if HARM[policy] < 0.01 else 3)
        drift = math.hypot(0.97 * drift, error)
        out.append(
            SiteResult(names.format(i), "dense" if i in dense else policy, density.tolist(), mean.tolist(), low.tolist(), error, drift)
        )
    return out


def length_result(
    policy: str, length: int, layers: int = 6, heads: int = 4, seed: int = 0, gated: bool = True, **more: Any
) -> LengthResult:
    rng = np.random.default_rng((seed, length, len(policy)))
    rows = sites(layers, heads, policy, rng, **more)
    density = float(np.mean([d for s in rows for d in s.density])) * (4096 / length) ** 0.3
    mean = float(np.mean([c for s in rows for c in s.cra_mean]))
    low = float(np.min([c for s in rows for c in s.cra_min]))
    full = 2.2157 - 0.06 * math.log2(length / 2048)
    loss = full * (1 + HARM[policy] * rng.uniform(0.8, 1.3))
    needles, recalled_full = 208, 206
    recalled = 206 if policy == "residue" else 204 if policy == "tile" else int(206 * rng.uniform(0.15, 0.4))
    kl, top1 = 2.1 * HARM[policy], 1 - 3 * HARM[policy]
    gates = [
        Gate("needle recall / full", recalled / recalled_full, ">=", 0.99),
        Gate("loss rise", loss / full - 1, "<=", 0.005),
        Gate("top-1 agreement", top1, ">=", 0.95),
        Gate("mean KL", kl, "<=", 0.02),
        Gate("density", density, "<=", 0.35),
    ]
    return LengthResult(
        length, 4, density, mean, low, full, loss, needles, recalled_full, recalled, 3.1 * HARM[policy] ** 0.5, 0.11 * HARM[policy] ** 0.5,
        2.1 * HARM[policy], 190 * HARM[policy], 1 - 3 * HARM[policy], 64, 64 if policy == "residue" else 17, 8.6 * (length / 4096) ** 1.7,
        19.4 * (length / 4096) ** 1.8, rows, gates if gated else [],
    )  # fmt: skip


EXACT = [
    ExactCase("prefill", 3.1e-5, 1.9e-6, 1e-4),
    ExactCase("chunked prefill", 3.4e-5, 2.2e-6, 1e-4),
    ExactCase("decode", 1.2e-5, 8.0e-7, 1e-4),
    ExactCase("left padding", 2.9e-5, 1.8e-6, 1e-4),
    ExactCase("right padding", 0.0, 0.0, 1e-4),
]


def candidate(
    name: str,
    lengths: tuple[int, ...],
    arrays: dict[str, np.ndarray],
    layers: int = 6,
    heads: int = 4,
    gated: bool = True,
    maps: int = 2,
    **more: Any,
) -> Candidate:
    policy = name.split(" ", 1)[0]
    rows = [length_result(policy, n, layers, heads, **more) for n in lengths]
    pictures = []
    rng = np.random.default_rng(7)
    for k in range(maps):
        n, spread = lengths[-1], (0.25, 0.95, 0.6)[k % 3]
        mass = attention(n, 128, 64, spread, rng)
        kept = select(mass, 0.95, 128, 64, policy not in ("residue", "tile"))
        key = f"{name}/{k}"
        arrays[f"{key}/blocks"], arrays[f"{key}/mass"] = kept, mass
        pictures.append(
            HeadMap(key, name, rows[-1].sites[(1 + 2 * k) % layers].id, (3 * k) % heads, n, 128, 64, float(kept.mean() * 2), 0.61 - 0.3 * k)
        )
    settings = {s.id: {**SETTINGS, "policy": policy} for s in rows[-1].sites}
    return Candidate(name, f"out/model.{policy}.onnx", settings, list(EXACT), rows, pictures, gated)


def result(candidates: list[Candidate], **more: Any) -> CheckResult:
    values: dict[str, Any] = {
        "full": "out/model.onnx",
        "candidates": candidates,
        "declined": [],
        "versions": {"sa-export": "0.1.0", "onnx": "1.23.2", "onnxruntime": "1.31.1", "polygraphy": "0.53.6", "python": "3.12.4"},
        "machine": "Linux x86_64, 2 cores, 24 GiB, CPUExecutionProvider",
        "command": "sa-export check out/model.onnx out/model.sa.onnx --lengths 2048 4096 --output out/check",
        "seed": 0,
    }
    return CheckResult(**{**values, **more})


def save_arrays(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    path = folder / "check.npz"
    np.savez_compressed(path, **arrays)
    return path


def demo(arrays: dict[str, np.ndarray]) -> CheckResult:
    """Like `make demo`: one gated candidate and both published policies beside it."""
    return result(
        [
            candidate("residue", (2048, 4096), arrays),
            candidate("column_slash", (2048, 4096), arrays, gated=False, maps=1),
            candidate("stripe_window", (2048, 4096), arrays, gated=False, maps=1),
        ]
    )


def large(arrays: dict[str, np.ndarray]) -> CheckResult:
    """80 layers of 64 heads at 32768 tokens, failing, with mixed settings and declined sites."""
    c = candidate("tile", (8192, 32768), arrays, layers=80, heads=64, maps=3, names="model.layers.{}.self_attn", dense=(0, 1))
    for i, (site, values) in enumerate(c.settings.items()):
        if i < 2:
            c.settings[site] = {"policy": "dense"}
        elif 40 <= i < 60:
            values["alpha"] = [0.9 + 0.001 * h for h in range(64)]
    reason = "the mask could not be proved causal: its left operand is a graph input of shape [batch, 1, S, T]"
    declined = [{"id": "model.layers.80.self_attn", "node": "/model/layers.80/self_attn/Add_1", "reason": reason}]
    return result([c], declined=declined)
