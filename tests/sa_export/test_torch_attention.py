"""The PyTorch operator against the float64 reference: same blocks, same output, same density."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes import reference
from graph_passes.op import POLICIES, Policy

torch = pytest.importorskip("torch")


def inputs(s: int, t: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((2, 4, s, 32))
    k, v = rng.standard_normal((2, 2, t, 32)), rng.standard_normal((2, 2, t, 24)) * rng.gamma(1.0, 1.0, (2, 2, t, 1))
    k[:, :, :4] *= 3  # sinks
    return [x.astype(np.float32) for x in (q, k, v)]


def padding(kind: str, t: int) -> np.ndarray | None:
    if kind == "none":
        return None
    mask = np.ones((2, t), bool)
    mask[1, : t // 3] = False
    return mask if kind == "left" else mask[:, ::-1].copy()


@pytest.mark.parametrize(("policy", "max_density"), [*((p, 1.0) for p in POLICIES), ("residue", 0.3), ("tile", 0.3)])
@pytest.mark.parametrize(
    ("s", "t", "pad", "softcap"), [(300, 300, "none", 0.0), (257, 401, "left", 0.0), (330, 330, "right", 5.0), (10, 200, "left", 0.0)]
)
def test_same_as_the_reference(policy: str, max_density: float, s: int, t: int, pad: str, softcap: float) -> None:
    from sa_export.torch_attention import block_mask, sample_attention

    q, k, v = inputs(s, t)
    mask = padding(pad, t)
    p = Policy(
        policy=policy,
        alpha=(0.2, 0.4, 0.6, 1.0),
        alpha_slash=0.1,
        max_density=max_density,
        min_length=0,
        segment=128,
        dense_rows=20,
        block_q=64,
        block_k=32,
        sample_rows=16,
    )  # type: ignore[arg-type]
    want, selection, row_cra = reference.sample_attention(q, k, v, mask, p, 0.2, softcap)
    args = [torch.from_numpy(x) for x in (q, k, v)] + [None if mask is None else torch.from_numpy(mask)]
    np.testing.assert_array_equal(block_mask(*args, p, scale=0.2, softcap=softcap).numpy(), selection.block_mask)
    out, cra, density = sample_attention(*args, p, scale=0.2, softcap=softcap)
    np.testing.assert_allclose(out.numpy(), want, rtol=0, atol=2e-6 * np.abs(v).max())
    np.testing.assert_allclose(cra.numpy(), row_cra, rtol=0, atol=3e-6)
    np.testing.assert_allclose(density.numpy(), reference.density(selection.block_mask, s, t, mask, 64, 32), rtol=0, atol=1e-6)
    if policy != "dense" and s > 16:
        assert density.mean() < 0.98
        more = block_mask(*args, p.replace(max_density=1.0), scale=0.2, softcap=softcap).numpy()
        assert (more != selection.block_mask).any() == (max_density < 1), "a budget is to be seen"


def test_a_model_under_a_dense_policy_is_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sa_export.torch_attention import use_policies

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        with use_policies(model, Policy(policy="dense")) as record:
            got = model(input_ids=ids, attention_mask=mask).logits
        with use_policies(model, Policy(min_length=0, alpha=0.1, dense_rows=0, sink=0, block_q=16, block_k=16, sample_rows=4)) as sparse:  # type: ignore[arg-type]
            other = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)
    assert {layer: float(d[0].min()) for layer, d in record.density.items()} == {0: 1.0, 1: 1.0}
    assert float(sparse.density[1][0].max()) < 1
    assert not torch.allclose(other[mask.bool()], want[mask.bool()], atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
