"""The operator on a device: the generic kernels on every part of the contract, and masks with holes on the fast paths, against float64."""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.gpu
ANY_DEVICE = True  # the generic kernels run from compute capability 7.5 on


def _torch():
    import torch

    return torch


def _policy(name, **changes):
    from graph_passes.op import Policy

    base = {"min_length": 0, "dense_rows": 32, "sink": 32, "stride": 16, "sample_rows": 16, "alpha": (0.7,)}
    if name == "column_slash":
        base |= {"segment": 256, "alpha_slash": (0.6,)}
    return Policy(policy=name, **{**base, **changes})


def _mask_of(lists, blocks):
    """Bool [B, Hq, tiles, nK]; asserts that the indices ascend."""
    torch = _torch()
    inside = torch.arange(blocks, device="cuda") < lists.counts[..., None]
    assert bool(((lists.indices[..., 1:] > lists.indices[..., :-1]) | ~inside[..., 1:]).all())
    hits = torch.zeros(lists.indices.shape, dtype=torch.int32, device="cuda")
    hits.scatter_add_(-1, torch.where(inside, lists.indices, 0).long(), inside.int())
    return hits > 0


def _check(case, policy, path="generic", *, mask=True, certificate=True, scratch=0):
    """Stages, then the operator in one call on poisoned memory. Returns (tiles whose lists differ from float64's, tiles, the call)."""
    from sa_export.kernels import Call, is_full
    from tests.kernels import oracle

    torch = _torch()
    q, k, v = case.tensors()
    # Explicit bounds stand for an interval that is not empty.
    interval = not case.holes and all(first < end for first, end in case.bounds or ())
    given = {"bounds": case.bounds_tensor()} if interval and not mask else {"key_mask": case.key_mask()}
    output = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype, device="cuda")
    lse = torch.full(q.shape[:3], torch.nan, device="cuda")
    cert = torch.full((*q.shape[:2], 2), torch.nan, device="cuda") if certificate else None
    call = Call(
        q, k, v, policy, scale=case.multiplier, softcap=case.softcap, output=output, lse=lse, certificate=cert, path=path,
        scratch_bytes=scratch, **given,
    )  # fmt: skip
    call.workspace.fill_(0xFF)
    differing, kept = 0, None
    if not is_full(call.problem):
        step = call.tiles if call.whole else call.chunk_tiles
        kept, masses = [], []
        for first in range(0, call.tiles, step):
            masses.append(call.sample(first))
            kept.append(_mask_of(call.filter(masses[-1], first), call.blocks))
        kept, mass = torch.cat(kept, 2), torch.cat(masses, 2)
        exact = oracle.sampled_mass(case, q, k, v, policy)
        sparse = [h for h in range(case.heads) if policy.alpha[h % len(policy.alpha)] < 1]
        sparse = [h for h in sparse if policy.policy != "column_slash" or policy.alpha_slash[h % len(policy.alpha_slash)] < 1]
        # Masses are sums of positive terms; float32 scores of size |s| move each term by |s| 2^-23 of itself.
        if path == "generic":  # the other paths' selections have their own tests
            torch.testing.assert_close(mass[:, sparse].double(), exact[:, sparse], rtol=1e-4, atol=1e-4 * max(exact.max().item(), 1e-30))
            differing = oracle.assert_selection(case, policy, kept, exact, most=1.0)
    call.run()
    exact, exact_lse, plain = oracle.attention(case, q, k, v, kept, policy.block_q, policy.block_k)
    oracle.assert_as_good_as_plain(output, exact, plain, (case, policy))
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse)), (case, policy)
    torch.testing.assert_close(lse.double().nan_to_num(neginf=0), exact_lse.nan_to_num(neginf=0), rtol=0, atol=2e-4)
    if certificate:
        want = torch.ones_like(cert) if kept is None else oracle.certificate(case, q, k, policy, kept).float()
        # The fast paths may keep sampled probabilities in 16 bits.
        atol = 2e-4 if path == "generic" else 2e-3
        torch.testing.assert_close(cert, want, rtol=0, atol=atol, msg=lambda m: f"{case} {policy}: {m}")
    return differing, 0 if kept is None else kept[..., 0].numel(), call


def _random_bounds(rng, batch, t):
    kind = rng.choice(["", "", "left", "right", "both"])
    if not kind:
        return None
    return tuple(
        (rng.randint(0, t - 1) if kind != "right" else 0, t) if kind == "left" else (0, rng.randint(1, t)) if kind == "right" else
        tuple(sorted((rng.randint(0, t), rng.randint(0, t)))) for _ in range(batch)
    )  # fmt: skip


def _random_case(rng, seed, dims, dtypes):
    from tests.kernels.oracle import Case

    s, t = rng.choice([(1, 1), (1, 799), (113, 203), (799, 799), (1023, 1024), (17, 1500), (0, 0), (0, 0), (0, 0)])
    if t == 0:
        t = rng.choice([rng.randint(17, 300), rng.randint(300, 1200)])
        s = rng.choice([t, rng.randint(1, t)])
    d, dv = rng.choice(dims)
    kv_heads, batch = rng.choice([1, 2]), rng.choice([1, 1, 2])
    return Case(
        s, t, d, kv_heads * rng.choice([1, 4, 8] if kv_heads == 1 else [1, 2, 4]), kv_heads, batch, rng.choice(dtypes),
        softcap=rng.choice([0.0, 0.0, 20.0]), bounds=_random_bounds(rng, batch, t), spread=rng.choice([0.5, 2.0, 4.0]), seed=seed,
        value_dim=dv, holes=rng.choice([0.0, 0.0, 0.3]),
    )  # fmt: skip


def _random_policy(rng, heads, name, blocks_q, blocks_k):
    block_q, block_k = rng.choice(blocks_q), rng.choice(blocks_k)
    changes = {"block_q": block_q, "block_k": block_k, "window": rng.choice([0, 0, 200]), "value_weight": rng.choice([0, 1])}
    changes["sink"], changes["dense_rows"] = rng.choice([0, 64]), rng.choice([0, 100])
    if name == "residue":
        changes["stride"] = rng.choice([n for n in (1, 2, 4, 8, 16, 32) if n <= min(block_q, block_k)])
    if name == "tile":
        changes["sample_rows"] = rng.choice([n for n in (1, 4, 16, 64, 128) if n <= block_q])
    if name == "column_slash":
        changes["segment"] = rng.choice([16, 300, 5000])
        changes["sample_rows"] = rng.choice([1, 16])
    if name == "stripe_window":
        changes["sample_ratio"], changes["window_ratio"] = rng.choice([0.05, 0.4, 1.0]), rng.choice([0.0, 0.08, 0.5])
    draw = lambda: rng.choice([0.1, 0.5, 0.75, 0.9, 0.99, 1.0])  # noqa: E731
    for key in ("alpha", "alpha_slash"):
        changes[key] = tuple(draw() for _ in range(heads)) if rng.random() < 0.4 else (rng.choice([0.3, 0.7, 0.95]),)
    return _policy(name, **changes)


DIMS = [(64, 64), (128, 128), (256, 256), (96, 96), (40, 40), (80, 80), (192, 128), (5, 3), (64, 200)]


@pytest.mark.parametrize("name", ["residue", "tile", "column_slash", "stripe_window", "dense"])
def test_random_cases_generic(name):
    """64 seeded draws a policy over every dimension of the contract at once."""
    torch = _torch()
    rng = random.Random(f"generic {name}")
    differing = tiles = 0
    for seed in range(64):
        case = _random_case(rng, seed, DIMS, [torch.float32, torch.float16, torch.bfloat16])
        policy = _random_policy(rng, case.heads, name, (16, 32, 64, 128, 256), (16, 32, 64, 128, 256))
        if name in ("residue", "tile") and seed % 3 == 0:
            policy = policy.replace(max_density=(0.05, 0.3, 0.6)[seed // 3 % 3])
        found, count, _ = _check(case, policy, scratch=rng.choice([0, 1]))
        differing, tiles = differing + found, tiles + count
    assert differing <= 0.01 * tiles, f"{differing} of {tiles} lists differ from float64's, beyond what rounding explains"


@pytest.mark.parametrize("name", ["residue", "tile", "column_slash", "stripe_window", "dense"])
def test_random_cases_of_the_chosen_path(name):
    """The same on the paths that the library chooses by itself, with masks that have holes in some batch items."""
    torch = _torch()
    rng = random.Random(f"chosen {name}")
    for seed in range(20):
        case = _random_case(rng, seed, [(64, 64), (128, 128)], [torch.float16, torch.bfloat16])
        policy = _random_policy(rng, case.heads, name, (128, 256), (64, 128)).replace(**{"stride": 16, "sample_rows": 16})
        if name == "column_slash":
            policy = policy.replace(segment=max(policy.segment, 16))
        _check(case, policy, path="auto", mask=rng.random() < 0.7, certificate=rng.random() < 0.5)


def test_paths_are_chosen_and_named():
    from tests.kernels.oracle import Case

    fastest = "sm90" if _torch().cuda.get_device_capability() == (9, 0) else "sm80"
    _, _, call = _check(Case(300, 300), _policy("tile"), path="auto", mask=False)
    assert call.support.path == fastest
    _, _, call = _check(Case(300, 300, dtype=_torch().float32), _policy("tile"), path="auto")
    assert call.support.path == "generic"
    assert "float32" in call.support.why


def test_graph_replay_with_another_mask():
    """Captured with an interval, replayed with holes, another interval, and nothing real: which kernels answer is decided on the device."""
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    for policy, s in ((_policy("tile"), 700), (_policy("dense"), 700), (_policy("column_slash"), 700), (_policy("tile"), 4)):
        case = Case(s, 900, batch=2, heads=4, kv_heads=1)
        tensors = case.tensors()
        masks = [
            Case(s, 900, batch=2, bounds=bounds, holes=holes, seed=seed).key_mask()
            for bounds, holes, seed in (
                (((100, 900), (0, 800)), 0, 1),
                (((50, 880), (3, 900)), 0.5, 2),
                (((0, 0), (880, 900)), 0, 3),
                (None, 0.1, 4),
            )
        ]
        certificate = torch.empty(2, 4, 2, device="cuda")
        want = []
        for mask in masks:
            eager = Call(*tensors, policy, key_mask=mask, certificate=True)
            want.append((eager.run().clone(), eager.certificate.clone()))
        inputs, mask = [x.clone() for x in tensors], masks[0].clone()
        call = Call(*inputs, policy, key_mask=mask, certificate=certificate)
        call.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.run()
        for _ in range(2):
            for other, (output, retained) in zip(masks, want, strict=True):
                mask.copy_(other)
                call.output.fill_(torch.nan)
                certificate.fill_(torch.nan)
                graph.replay()
                assert torch.equal(call.output, output)
                assert torch.equal(certificate, retained)


@pytest.mark.parametrize("path", ["generic", "auto"])
def test_two_streams(path):
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    policy = _policy("tile")
    cases = [Case(1500, 1500, seed=n, batch=2, holes=0.2) for n in (1, 2)]
    tensors = [case.tensors() for case in cases]
    calls = [Call(*x, policy, key_mask=case.key_mask(), path=path) for x, case in zip(tensors, cases, strict=True)]
    expected = [call.run().clone() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(5):
        for call in calls:
            call.output.fill_(torch.nan)
        torch.cuda.synchronize()
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                call.run()
        torch.cuda.synchronize()
        for call, want in zip(calls, expected, strict=True):
            assert torch.equal(call.output, want)


def test_smaller_shapes_run_in_the_largest_workspace():
    """One workspace, sized for the largest shape, serves every smaller one (a TensorRT engine allocates it once), and nothing behind it is written."""
    from sa_export.kernels import Call, workspace_bytes
    from tests.kernels.oracle import Case

    torch = _torch()
    for name in ("residue", "tile", "column_slash", "stripe_window"):
        policy = _policy(name, min_length=100)
        largest = Call(
            *Case(1500, 1500, batch=2).tensors(), policy, key_mask=Case(1500, 1500, batch=2, holes=0.1).key_mask(), certificate=True
        )
        size = workspace_bytes(largest.problem)
        storage = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
        for s, t, batch in ((1500, 1500, 2), (1, 1500, 2), (16, 1500, 1), (17, 1400, 1), (90, 90, 2), (700, 701, 1), (1, 1, 1)):
            case = Case(s, t, batch=batch, holes=0.1)
            options = {"key_mask": case.key_mask(), "certificate": True}
            want = Call(*case.tensors(), policy, **options).run()
            got = Call(*case.tensors(), policy, workspace=storage[:size], **options).run()
            assert torch.equal(got, want), (name, s, t, batch)
        assert bool((storage[size:] == 0xFF).all())


def test_strided_and_unaligned_tensors():
    """[B, S, H, D] storage of an odd head size, inside a larger tensor."""
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case, assert_as_good_as_plain, attention

    torch = _torch()
    case = Case(300, 400, d=41, batch=2, value_dim=23)
    views = []
    for x in case.tensors():
        storage = torch.zeros(x.shape[0], x.shape[2], x.shape[1] + 1, x.shape[3] + 3, dtype=x.dtype, device="cuda")
        view = storage[:, :, 1:, 3:].transpose(1, 2)
        view.copy_(x)
        views.append(view)
    output = Call(*views, _policy("dense")).run()
    exact, _, plain = attention(case, *views)
    assert_as_good_as_plain(output, exact, plain, "strided")


def test_nan_stays_in_its_head():
    from sa_export.kernels import Call
    from tests.kernels.oracle import Case

    torch = _torch()
    policy = _policy("tile")
    q, k, v = Case(500, 500, heads=8, kv_heads=4, dtype=torch.float32).tensors()
    clean = Call(q, k, v, policy).run().clone()
    for tensor in (k, v):
        saved = tensor[0, 1].clone()
        for poison in (torch.nan, torch.inf):
            tensor[0, 1] = poison
            out = Call(q, k, v, policy).run()
            for h in set(range(8)) - {2, 3}:
                assert torch.equal(out[0, h], clean[0, h]), (h, poison)
        tensor[0, 1] = saved
