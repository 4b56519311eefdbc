"""The float64 reference against a second transcription of docs/op.md, written with loops over single pairs, and against invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from graph_passes import op, reference
from tests.graph_passes.attention_cases import Case

SMALL = {
    "min_length": 0,
    "block_q": 16,
    "block_k": 16,
    "sink": 4,
    "dense_rows": 0,
    "stride": 8,
    "sample_rows": 4,
    "segment": 24,
    "alpha": 0.8,
    "alpha_slash": 0.7,
}

CASES = {
    "square": Case(s=50, t=50, heads=2, kv_heads=1),
    "chunk": Case(s=35, t=77, heads=2, kv_heads=2, d=8, dv=5),
    "left": Case(s=40, t=61, batch=2, heads=2, padding="left", policy={"window": 9, "sink": 0}),
    "right": Case(s=61, t=61, batch=2, heads=2, padding="right", policy={"dense_rows": 5}),
    "both": Case(s=64, t=64, batch=2, heads=2, kv_heads=1, padding="both", policy={"block_q": 32, "sample_rows": 8}),
    "holes": Case(s=50, t=64, batch=2, heads=2, kv_heads=1, padding="holes", softcap=3.0),
    "nothing_real": Case(s=20, t=33, batch=2, heads=2, padding="nothing_real"),
    "per_head": Case(s=50, t=50, heads=2, policy={"alpha": [0.5, 1.0], "alpha_slash": [0.9, 0.2]}),
    "unweighted": Case(s=50, t=60, heads=2, policy={"value_weight": 0}),
    # Binding, below the forced blocks alone, and both in one call; dense tiles and full heads have no budget.
    "budget": Case(s=150, t=150, heads=2, policy={"max_density": 0.4, "alpha": 0.95}),
    "budget_of_a_chunk": Case(
        s=70, t=211, batch=2, heads=2, padding="left", policy={"max_density": 0.3, "alpha": [0.95, 1.0], "dense_rows": 20}
    ),
    "budget_below_the_forced": Case(s=150, t=170, heads=2, policy={"max_density": 0.01, "window": 40, "sink": 20}),
    "budget_that_is_rarely_reached": Case(s=150, t=150, heads=2, policy={"max_density": 0.8, "alpha": 0.6}),
    "narrow": Case(s=49, t=49, heads=2, policy={"sink": 0, "alpha": 0.3, "alpha_slash": 0.1, "window_ratio": 0.0, "sample_ratio": 0.4}),
}


def policy_of(case: Case, name: str) -> op.Policy:
    values = SMALL | case.policy
    if name in ("column_slash", "stripe_window"):
        values.pop("max_density", None)
    return op.Policy(policy=name, **values)


class Loops:
    """docs/op.md for one (batch item, head), pair by pair."""

    def __init__(self, case: Case, policy: op.Policy, b: int, h: int) -> None:
        tensors, mask = case.tensors(), case.key_mask()
        self.p, self.s, self.t = policy, case.s, case.t
        self.real = [True] * case.t if mask is None else [bool(x) for x in mask[b]]
        kv = h // (case.heads // case.kv_heads)
        self.alpha = [float(np.float32(a[h if len(a) > 1 else 0])) for a in (policy.alpha, policy.alpha_slash)]
        dot = tensors["query"][b, h].astype(np.float64) @ tensors["key"][b, kv].astype(np.float64).T * case.scale
        self.score = case.softcap * np.tanh(dot / case.softcap) if case.softcap else dot
        self.tiles, self.blocks = math.ceil(case.s / policy.block_q), math.ceil(case.t / policy.block_k)
        self.tile_of = [i // policy.block_q for i in range(case.s)]
        self.block_of = [j // policy.block_k for j in range(case.t)]
        value = tensors["value"][b, kv].astype(np.float64)
        self.weight = [math.sqrt(sum(x * x for x in row)) if policy.value_weight else 1.0 for row in value]
        self.phat = {pair: p for i in range(self.s) for pair, p in self.sampled_row(i).items()}

    def position(self, i: int) -> int:
        return self.t - self.s + i

    def looks_at(self, i: int, j: int) -> bool:
        p = self.p
        if p.policy == "residue":
            return (self.position(i) + j) % p.stride == 0
        if p.policy == "tile":
            last = max(r for r in range(self.s) if self.tile_of[r] == self.tile_of[i])
            return (last - i) % (p.block_q // p.sample_rows) == 0
        if p.policy == "column_slash":
            return (self.s - 1 - i) % p.segment < p.sample_rows
        if p.policy == "stripe_window":
            return (self.s - 1 - i) % round(1 / p.sample_ratio) == 0
        return False

    def sampled_row(self, i: int) -> dict[tuple[int, int], float]:
        if not self.real[self.position(i)]:
            return {}
        weights = {(i, j): math.exp(self.score[i, j]) for j in range(self.position(i) + 1) if self.real[j] and self.looks_at(i, j)}
        return {pair: w / sum(weights.values()) for pair, w in weights.items()}

    def smallest(self, mass: list[float], forced: set[int], alpha: float, most: float = math.inf) -> set[int]:
        """The smallest set of blocks beside the forced ones that has `alpha` of the mass beside them, or the `most` heaviest if these have less."""
        free = set(range(len(mass))) - forced
        whole = sum(mass[k] for k in free)
        kept: set[int] = set()
        for k in sorted(free, key=lambda k: (-mass[k], k)):
            if sum(mass[i] for i in kept) >= alpha * whole or len(kept) >= most:
                break
            kept.add(k)
        return kept

    def kept(self) -> np.ndarray:
        p = self.p
        out = np.zeros((self.tiles, self.blocks), bool)
        reals = [j for j in range(self.t) if self.real[j]]
        first_real, end_real = (reals[0], reals[-1] + 1) if reals else (self.t, 0)
        per_head = p.policy in ("column_slash", "stripe_window")
        full = p.policy == "dense" or self.alpha[0] == 1 or (p.policy == "column_slash" and self.alpha[1] == 1)
        full = full or self.t < p.min_length or self.s <= 16
        w = p.window if p.policy != "stripe_window" else max(p.window, math.ceil(p.window_ratio * self.t))
        for t in range(self.tiles):
            rows = [i for i in range(self.s) if self.tile_of[i] == t]
            first, last = self.position(rows[0]), self.position(rows[-1])
            causal = {self.block_of[j] for j in range(last + 1)}
            pairs = {pair: x for pair, x in self.phat.items() if per_head or pair[0] in rows}
            total = sum(pairs.values())
            dense = any(end_real - p.dense_rows <= self.position(i) < end_real for i in rows)
            if full or dense or not total:
                out[t, list(causal)] = True
                continue
            forced = {self.block_of[j] for j in range(max(first - w, 0), last + 1)}
            forced |= {self.block_of[j] for j in range(first_real, min(first_real + p.sink, self.t))}
            mass, slash = [0.0] * self.blocks, [0.0] * self.blocks
            for (i, j), x in pairs.items():
                mass[self.block_of[j]] += x / total if per_head else x * self.weight[j]
                slash[(self.position(i) - j) // p.block_k] += x / total
            always = forced & causal
            budget = max(len(always), math.ceil(np.float32(p.max_density) * np.float32(len(causal))))
            kept = forced | self.smallest(
                mass, set() if per_head else forced, self.alpha[0], math.inf if per_head else budget - len(always)
            )
            if p.policy == "column_slash":
                slashes = self.smallest(slash, set(), self.alpha[1])
                on = [(i, j) for i in rows for j in range(self.position(i) + 1) if (self.position(i) - j) // p.block_k in slashes]
                kept |= {self.block_of[j] for _, j in on}
            out[t, list(kept & causal)] = True
        return out

    def retained(self, kept: np.ndarray) -> dict[int, float]:
        out: dict[int, float] = {}
        for (i, j), x in self.phat.items():
            out[i] = out.get(i, 0.0) + x * kept[self.tile_of[i], self.block_of[j]]
        return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", op.POLICIES)
def test_selection_is_the_specification(policy: str, name: str) -> None:
    case = CASES[name]
    p = policy_of(case, policy)
    tensors, mask = case.tensors(), case.key_mask()
    got = reference.select(tensors["query"], tensors["key"], tensors["value"], mask, p, case.scale, case.softcap)
    full = reference.full_heads(p, case.heads, case.s, case.t)
    for b, h in itertools.product(range(case.batch), range(case.heads)):
        loops = Loops(case, p, b, h)
        kept = loops.kept()
        np.testing.assert_array_equal(got.block_mask[b, h], kept)
        retained = loops.retained(kept)
        np.testing.assert_array_equal(np.flatnonzero(~np.isnan(got.retained[b, h])), sorted(retained))
        np.testing.assert_allclose(got.retained[b, h, sorted(retained)], [retained[i] for i in sorted(retained)], rtol=0, atol=1e-12)
        certificate = (min(retained.values()), np.mean(list(retained.values()))) if retained and not full[h] else (1, 1)
        np.testing.assert_allclose(got.certificate[b, h], certificate, rtol=0, atol=1e-12)


def test_cases_are_selective() -> None:
    """The comparison above means something: policies drop blocks, and disagree with each other."""
    masks = []
    for policy in op.POLICIES:
        case = Case(s=200, t=200, heads=2, policy={"alpha": 0.6, "alpha_slash": 0.2})
        tensors = case.tensors()
        masks.append(
            reference.select(tensors["query"], tensors["key"], tensors["value"], None, policy_of(case, policy), case.scale).block_mask
        )
    full = masks[-1].sum()
    assert all(mask.sum() < 0.9 * full for mask in masks[:-1])
    assert all((a != b).any() for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("policy", ["residue", "tile"])
@pytest.mark.parametrize("name", ["square", "chunk", "left", "both", "holes"])
def test_kept_mass_reaches_alpha_and_no_less_would(policy: str, name: str) -> None:
    case = CASES[name]
    p = policy_of(case, policy)
    tensors = case.tensors()
    got = reference.select(tensors["query"], tensors["key"], tensors["value"], case.key_mask(), p, case.scale, case.softcap)
    seen = 0
    for b, h, t in np.ndindex(got.block_mask.shape[:3]):
        mass, kept, forced = got.mass[b, h, t], got.block_mask[b, h, t], got.forced[b, t]
        if mass.sum() == 0:
            continue
        unforced = np.flatnonzero(kept & ~forced)
        goal = np.float32(p.alpha[0]) * mass[~forced].sum()
        assert mass[unforced].sum() >= goal - 1e-12
        if len(unforced) and p.dense_rows == 0:
            seen += 1
            assert mass[unforced].sum() - mass[unforced].min() < goal
            assert mass[unforced].min() >= mass[~kept].max(initial=0)
    assert seen


def test_smallest_set_is_the_smallest_by_exhaustion() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        mass = rng.multinomial(16, np.full(7, 1 / 7)) / 16  # many ties, and exact sums
        alpha = float(rng.choice([0.25, 0.5, 0.75, 0.9]))
        kept = reference.smallest_set(mass, alpha)
        subsets = [np.array(x, bool) for x in itertools.product((0, 1), repeat=7)]
        reaching = [x for x in subsets if mass[x].sum() >= alpha]
        assert mass[kept].sum() >= alpha
        assert kept.sum() == min(x.sum() for x in reaching)
        dropped = np.flatnonzero(~kept)
        for k in np.flatnonzero(kept):  # ties go to the lower index
            assert all(mass[k] > mass[j] or (mass[k] == mass[j] and k < j) for j in dropped)


@pytest.mark.parametrize("policy", ["residue", "tile"])
def test_a_budget_keeps_the_heaviest_blocks_and_no_more_than_it_says(policy: str) -> None:
    """The spec's sentence in terms of what is kept without a budget: the forced blocks, and the heaviest others as far as there is room."""
    case = Case(s=300, t=340, batch=2, heads=2, padding="left", policy={"alpha": 0.9, "dense_rows": 20})
    x, seen = case.tensors(), set()
    arrays = (x["query"], x["key"], x["value"], case.key_mask())
    free = reference.select(*arrays, policy_of(case, policy), case.scale)
    last = np.minimum((np.arange(19) + 1) * 16, 300) - 1 + 40
    for share in (0.02, 0.2, 0.35, 0.5, 0.9):
        p = policy_of(case, policy).replace(max_density=share)
        got = reference.select(*arrays, p, case.scale)
        np.testing.assert_array_equal(got.mass, free.mass)
        for b, h, t in np.ndindex(got.block_mask.shape[:3]):
            begun = np.arange(got.block_mask.shape[3]) * 16 <= last[t]
            forced, wanted = got.forced[b, t] & begun, free.block_mask[b, h, t]
            if not got.mass[b, h, t].any() or last[t] >= 340 - 20:
                np.testing.assert_array_equal(got.block_mask[b, h, t], begun)
                seen.add("everything")
                continue
            limit = max(forced.sum(), math.ceil(np.float32(share) * np.float32(begun.sum())))
            assert (got.block_mask[b, h, t] & forced == forced).all()
            if wanted.sum() <= limit:
                np.testing.assert_array_equal(got.block_mask[b, h, t], wanted)
                seen.add("alpha decides")
                continue
            order = sorted(np.flatnonzero(wanted & ~forced), key=lambda k: (-got.mass[b, h, t, k], k))
            expected = set(np.flatnonzero(forced)) | set(order[: limit - forced.sum()])
            assert set(np.flatnonzero(got.block_mask[b, h, t])) == expected
            seen.add("forced alone" if limit == forced.sum() else "budget decides")
    assert seen == {"everything", "alpha decides", "budget decides", "forced alone"}


@pytest.mark.parametrize(("share", "blocks"), [(0.1, 1), (0.3, 3), (0.31, 4), (0.7, 7), (0.999, 10)])
def test_a_budget_is_rounded_up_from_float32(share: float, blocks: int) -> None:
    """Of 10 equal blocks, the last one forced; 0.1 and 0.7 of 10 are 1 and 7, although their float32 values lie above and below."""
    p = op.Policy(policy="tile", min_length=0, alpha=0.99, sink=0, dense_rows=0, block_q=32, block_k=32, sample_rows=1, max_density=share)
    flat = np.zeros((1, 1, 320, 4))
    kept = reference.select(flat, flat, flat + 1, None, p, 1.0).block_mask[0, 0, 9]
    np.testing.assert_array_equal(np.flatnonzero(kept), [*range(blocks - 1), 9])  # equal masses: the lowest


@pytest.mark.parametrize("name", CASES)
def test_certificate_of_tile_is_the_exact_cra_of_its_rows(name: str) -> None:
    case = CASES[name]
    p = policy_of(case, "tile")
    tensors = case.tensors()
    _, selection, row_cra = reference.sample_attention(
        tensors["query"], tensors["key"], tensors["value"], case.key_mask(), p, case.scale, case.softcap
    )
    sampled = ~np.isnan(selection.retained)
    assert sampled.any()
    np.testing.assert_allclose(selection.retained[sampled], row_cra[sampled], rtol=0, atol=1e-12)


def test_attention_over_all_blocks_is_softmax_attention() -> None:
    case = Case(s=21, t=40, batch=2, heads=4, kv_heads=2, d=8, dv=6)
    x = case.tensors()
    output, row_cra = reference.attend(x["query"], x["key"], x["value"], None, np.ones((2, 4, 2, 3), bool), 16, 16, case.scale)
    key, value = (np.repeat(x[name].astype(np.float64), 2, axis=1) for name in ("key", "value"))
    scores = np.einsum("bhid,bhjd->bhij", x["query"].astype(np.float64), key) * case.scale
    weights = np.exp(scores) * np.tri(21, 40, 19)
    expected = np.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(row_cra, 1, rtol=0, atol=1e-12)


def test_dropped_blocks_leave_the_rest_renormalised_and_a_row_without_keys_gives_zeros() -> None:
    case = Case(s=32, t=32, heads=1, kv_heads=1)
    x = case.tensors()
    mask = np.array([[[[True, False], [True, False]]]])  # tile 1 reads block 0 only
    output, row_cra = reference.attend(x["query"], x["key"], x["value"], None, mask, 16, 16, case.scale)
    weights = np.exp(x["query"][0, 0, 20].astype(np.float64) @ x["key"][0, 0, :21].astype(np.float64).T * case.scale)
    np.testing.assert_allclose(output[0, 0, 20], weights[:16] @ x["value"][0, 0, :16] / weights[:16].sum(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(row_cra[0, 0, 20], weights[:16].sum() / weights.sum(), rtol=0, atol=1e-12)
    key_mask = np.arange(32)[None] >= 18
    output, row_cra = reference.attend(x["query"], x["key"], x["value"], key_mask, mask, 16, 16, case.scale)
    assert not output.any()
    assert not row_cra.any()


@pytest.mark.parametrize("name", CASES)
def test_density_counts_pairs(name: str) -> None:
    case = CASES[name]
    p = policy_of(case, "residue")
    tensors, mask = case.tensors(), case.key_mask()
    kept = reference.select(tensors["query"], tensors["key"], tensors["value"], mask, p, case.scale, case.softcap).block_mask
    got = reference.density(kept, case.s, case.t, mask, p.block_q, p.block_k)
    for b, h in itertools.product(range(case.batch), range(case.heads)):
        real = np.ones(case.t, bool) if mask is None else mask[b]
        allowed = inside = 0
        for i in range(case.s):
            position = case.t - case.s + i
            for j in range(position + 1):
                if real[position] and real[j]:
                    allowed += 1
                    inside += kept[b, h, i // p.block_q, j // p.block_k]
        assert got[b, h] == (inside / allowed if allowed else 1)


def test_residue_keeps_the_block_of_a_planted_needle() -> None:
    case = Case(s=1024, t=1024, heads=1, kv_heads=1, d=32)
    rng = np.random.default_rng(5)
    query, key = rng.normal(size=(2, 1, 1, 1024, 32))
    direction = rng.normal(size=32)
    query[..., 1000:1016, :] = 3 * direction
    key[..., 200:216, :] = direction
    policy = op.Policy(policy="residue", min_length=0, alpha=0.5, dense_rows=0)
    kept = reference.select(query, key, np.ones_like(key), None, policy, case.scale).block_mask[0, 0]
    assert kept[7, 3]
    assert kept[7].sum() < 0.7 * 16


def test_numbers_are_taken_as_the_file_stores_them() -> None:
    """0.9999999999 is 1 in float32, hence full attention; 7 % of 100 tokens is 8 in float64 and 7 in float32."""
    assert reference.full_heads(op.Policy(alpha=0.9999999999, min_length=0), 2, 100, 100).all()
    case = Case(s=93, t=100, heads=1, kv_heads=1)
    x = case.tensors()
    p = op.Policy(policy="stripe_window", min_length=0, alpha=0.01, sink=0, window_ratio=0.07, block_q=16, block_k=16, dense_rows=0)
    forced = reference.select(x["query"], x["key"], x["value"], None, p, case.scale).forced[0]
    assert math.ceil(0.07 * 100) == 8
    np.testing.assert_array_equal(np.flatnonzero(forced[2]), [2, 3])  # positions 39..54 reach back to 32, not to 31


def test_a_sink_that_gives_nothing_does_not_hide_the_rest() -> None:
    """Every row puts 0.95 of its probability on the sink, whose value is small: alpha speaks of what is left, weighted by the values."""
    t = 512
    logits = np.zeros((t, 1))
    logits[0], logits[200:216] = math.log(19 * t), math.log(4)  # of the rest, block 3 (192..255) has the most
    query, value = np.ones((1, 1, t, 1)), np.ones((1, 1, t, 4))
    value[:, :, 0] = 1e-3
    policy = op.Policy(policy="tile", min_length=0, alpha=0.25, dense_rows=0, sink=1)
    selection = reference.select(query, logits[None, None], value, None, policy, 1.0)
    assert selection.certificate[0, 0, 0] > 0.9
    np.testing.assert_array_equal(np.flatnonzero(selection.block_mask[0, 0, 3]), [0, 3, 6, 7])
    value[:, :, 64:128] = 9.0  # now dropping block 1 would cost the most
    selection = reference.select(query, logits[None, None], value, None, policy, 1.0)
    np.testing.assert_array_equal(np.flatnonzero(selection.block_mask[0, 0, 3]), [0, 1, 6, 7])
    unweighted = reference.select(query, logits[None, None], value, None, policy.replace(value_weight=0), 1.0)
    np.testing.assert_array_equal(np.flatnonzero(unweighted.block_mask[0, 0, 3]), [0, 3, 6, 7])
