"""The plugin's enqueue, on the reference backend, against the NumPy reference: every policy, type, arity and shape reaches the kernels as it was asked."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes import reference
from graph_passes.op import Policy, node_attributes
from tests.tensorrt import plugin_build
from tests.tensorrt.plugin_shim import Door, node_fields, to_field

SMALL = Policy(
    block_q=16,
    block_k=16,
    sample_rows=4,
    stride=4,
    sink=5,
    window=9,
    dense_rows=7,
    min_length=0,
    segment=24,
    sample_ratio=0.2,
    alpha=(0.6,),
)
# name: policy, B, Hq, Hkv, S, T, D, Dv, padding
CASES = {
    "tile": (SMALL, 2, 4, 2, 150, 150, 8, 8, None),
    "tile chunk, holes": (SMALL, 2, 4, 1, 83, 177, 8, 8, "holes"),
    "tile left padding": (SMALL.replace(value_weight=0), 2, 2, 2, 140, 140, 16, 16, "left"),
    "residue": (SMALL.replace(policy="residue"), 1, 4, 4, 161, 161, 8, 8, None),
    "residue right padding": (SMALL.replace(policy="residue", sink=0), 2, 4, 2, 83, 170, 8, 12, "right"),
    "tile budget": (SMALL.replace(alpha=(0.95,), max_density=0.3), 1, 4, 2, 150, 210, 8, 8, "left"),
    "residue budget": (SMALL.replace(policy="residue", alpha=(0.95,), max_density=0.3), 1, 4, 2, 150, 190, 8, 8, None),
    "column_slash": (SMALL.replace(policy="column_slash", alpha_slash=(0.5,)), 1, 4, 2, 120, 175, 8, 8, None),
    "column_slash per head": (
        SMALL.replace(policy="column_slash", alpha=(0.3, 0.9, 0.6, 1.0), alpha_slash=(0.2, 0.4, 0.9, 0.5)), 2, 4, 2, 160, 160, 8, 8, "left",
    ),
    "stripe_window": (SMALL.replace(policy="stripe_window", window_ratio=0.11), 2, 2, 1, 147, 190, 8, 8, "right"),
    "alpha per head": (SMALL.replace(alpha=(0.2, 0.9, 1.0, 0.5)), 1, 4, 2, 164, 164, 8, 8, None),
    "alpha 1": (SMALL.replace(alpha=(1.0,)), 1, 4, 2, 140, 140, 8, 8, None),
    "dense": (SMALL.replace(policy="dense"), 2, 4, 2, 20, 44, 8, 4, "holes"),
    "below min_length": (SMALL.replace(min_length=65), 1, 2, 1, 64, 64, 8, 8, None),
    "decode": (SMALL, 2, 4, 2, 1, 99, 8, 8, "holes"),
    "speculative": (SMALL, 1, 4, 2, 16, 60, 8, 8, None),
    "nothing real": (SMALL, 2, 2, 1, 20, 20, 8, 8, "nothing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def door(shared_folder, headers, plugin_library) -> Door:
    return Door(plugin_build.once(shared_folder, "shim", lambda folder: plugin_build.build_shim(folder, headers)), plugin_library)


def _mask(kind, batch, keys, rng):
    if kind is None:
        return None
    mask = np.ones((batch, keys), bool)
    for b in range(batch):
        n = int(rng.integers(keys // 4, keys // 2))
        if kind == "left":
            mask[b, :n] = b % 2 == 1
        elif kind == "right":
            mask[b, keys - n :] = b % 2 == 1
        elif kind == "holes":
            mask[b] = rng.random(keys) < 0.7
        else:
            mask[b] = b > 0
    return mask


def _rounded(x, dtype):
    """(bytes as the plugin reads them, the float64 values that they hold)."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        words = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return words, (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    out = x.astype(dtype)
    return out, out.astype(np.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_enqueue_is_the_operator(door, name, dtype):
    policy, batch, heads, kv_heads, s, t, d, dv, padding = CASES[name]
    rng = np.random.default_rng(len(name))
    softcap = 3.0 if "chunk" in name or name == "dense" else 0.0
    mask = _mask(padding, batch, t, rng)
    shapes = [(batch, heads, s, d), (batch, kv_heads, t, d), (batch, kv_heads, t, dv)]
    stored, exact = zip(*(_rounded(rng.standard_normal(shape) * 4, dtype) for shape in shapes), strict=True)
    expected, selection, _ = reference.sample_attention(*exact, mask, policy, 0.4, softcap)

    fields = {**node_fields(node_attributes(policy, scale=0.4, softcap=softcap)), "certificate": to_field(1)}
    layer, sentence = door.create(fields)
    assert layer is not None, sentence
    inputs = [(dtype, a.shape) for a in stored] + ([("bool", mask.shape)] if mask is not None else [])
    size, said = layer.shape(inputs, [(dtype, (batch, heads, s, dv)), ("float32", (batch, heads, 2))])
    assert size >= 0, said
    assert said.count("\n") == 0  # one line a context
    assert f"policy {policy.policy}, attention by reference kernels" in said
    output = np.full((batch, heads, s, dv), 77, stored[0].dtype)
    certificate = np.full((batch, heads, 2), 77, np.float32)
    workspace = np.empty(size, np.uint8)
    arrays = [np.ascontiguousarray(a) for a in stored] + ([np.ascontiguousarray(mask)] if mask is not None else [])
    layer.enqueue([a.ctypes.data for a in arrays], [output.ctypes.data, certificate.ctypes.data], workspace.ctypes.data)
    layer.close()

    wanted, wanted_values = _rounded(expected, dtype)
    got = (output.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else output
    # Both are double precision rounded once; a tie may fall either way.
    ulp = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), wanted_values, rtol=ulp, atol=1e-12)
    assert (output == wanted).mean() > 0.99
    np.testing.assert_allclose(certificate, selection.certificate, rtol=1e-6)


def test_cases_that_select_do_leave_blocks_out():
    """Without this the cases above would pass with full attention everywhere."""
    for name in ("tile", "residue", "column_slash per head", "stripe_window"):
        policy, batch, heads, kv_heads, s, t, d, dv, _ = CASES[name]
        rng = np.random.default_rng(len(name))
        q, k, v = (rng.standard_normal(shape) * 4 for shape in [(batch, heads, s, d), (batch, kv_heads, t, d), (batch, kv_heads, t, dv)])
        blocks = reference.select(q, k, v, None, policy, 0.4).block_mask
        assert reference.density(blocks, s, t, None, 16, 16).min() < 0.95


# inputs, field changes, words of the sentence
Q, K, V = ("float16", (1, 8, 64, 128)), ("float16", (1, 2, 64, 128)), ("float16", (1, 2, 64, 128))
REFUSED = {
    "heads": ([Q, ("float16", (1, 3, 64, 128)), ("float16", (1, 3, 64, 128))], {}, "query has 8 heads and key has 3"),
    "more rows than keys": ([("float16", (1, 8, 65, 128)), K, V], {}, "query has 65 rows and key has 64"),
    "head size": ([("float16", (1, 8, 64, 640)), ("float16", (1, 2, 64, 640)), V], {}, "head_dim 640 is not built"),
    "key head size": ([Q, ("float16", (1, 2, 64, 64)), V], {}, "do not fit together"),
    "values": ([Q, K, ("float16", (1, 2, 65, 128))], {}, "do not fit together"),
    "batch": ([Q, ("float16", (2, 2, 64, 128)), V], {}, "do not fit together"),
    "rank": ([("float16", (1, 64, 1024)), K, V], {}, "query has shape [1, 64, 1024]; allowed is [B, Hq, S, D]"),
    "mask shape": ([Q, K, V, ("bool", (1, 1, 64, 64))], {}, "key_mask has shape [1, 1, 64, 64]; allowed is [B, T]"),
    "mask length": ([Q, K, V, ("bool", (1, 63))], {}, "do not fit together"),
    "mask type": ([Q, K, V, ("float32", (1, 64))], {}, "key_mask is float32; allowed is bool"),
    "mixed types": ([Q, ("float32", K[1]), V], {}, "key is float32 and query is float16"),
    "integers": ([("int32", s) for _, s in (Q, K, V)], {}, "query is int32; allowed are float16, bfloat16 and float32"),
    "too few": ([Q, K], {}, "The layer has 2 inputs"),
    "too many": ([Q, K, V, ("bool", (1, 64)), ("bool", (1, 64))], {}, "The layer has 5 inputs"),
    "alpha count": ([Q, K, V], {"alpha": [0.5] * 4}, "alpha has 4 values and query has 8 heads"),
    "alpha_slash count": ([Q, K, V], {"alpha_slash": [0.5] * 7}, "alpha_slash has 7 values and query has 8 heads"),
    "outputs": ([Q, K, V], {"certificate": 1}, "The layer has 1 outputs; its field certificate asks for 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_does_not_fit_is_refused_with_a_sentence(door, name):
    inputs, changes, words = REFUSED[name]
    fields = node_fields(node_attributes(Policy(), scale=0.1))
    layer, sentence = door.create({**fields, **{k: to_field(v) for k, v in changes.items()}}, name="model/layers.3")
    assert layer is not None, sentence
    size, said = layer.shape(inputs, [(Q[0], (1, 8, 64, 128))])
    layer.close()
    assert size == -1
    assert said.startswith("SampleAttention layer 'model/layers.3': ")
    assert words in said
    assert said.endswith(".")
    assert "\n" not in said


def test_an_empty_batch_is_no_error(door):
    layer, sentence = door.create(node_fields(node_attributes(Policy(), scale=0.1)))
    assert layer is not None, sentence
    size, said = layer.shape(
        [("float16", (0, 8, 64, 128)), ("float16", (0, 2, 64, 128)), ("float16", (0, 2, 64, 128))], [("float16", (0, 8, 64, 128))]
    )
    assert (size, said) == (0, "")
    layer.enqueue([0, 0, 0], [0], 0)
    layer.close()
