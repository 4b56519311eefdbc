"""ONNX's own conformance cases of `Attention` (`onnx.backend.test`): what one node can express is rewritten and gives the expected
outputs at alpha 1; the rest is declined, each for a reason that is written down here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graph_passes.op import Policy
from graph_passes.pipeline import inspect
from graph_passes.reference import sample_attention
from tests.graph_passes import running

NO_MASK = "it has no mask: every row sees every key"
BIAS = "is not a mask of 0 and -inf but a bias"
UNKNOWN = "of which nothing is proved"
PRODUCT = "the product of queries and keys of the operator is used"
WINDOW = "it has a sliding window (left_window_size"
LONGER = "where the scores have"
OWN_LENGTH = "counts the rows of each batch item from its own length"

REWRITTEN = {
    *("3d_causal", "3d_causal_bf16", "3d_diff_heads_sizes_causal", "3d_gqa_causal", "4d_causal", "4d_causal_bf16", "4d_causal_fp16"),
    *("4d_diff_heads_sizes_causal", "4d_gqa_causal", "4d_causal_with_past_and_present"),
    *("4d_gqa_causal_nonpad_decode", "4d_gqa_causal_nonpad_decode_fp16", "4d_causal_nonpad_continued_prefill"),
    *("4d_causal_nonpad_batch_prefill", "4d_causal_nonpad_negative_offset_structural_empty"),
}
"""Causal by the operator's flag: the rest of the cases are not causal, or their mask is an input of random numbers."""

DECLINED = {
    NO_MASK: {
        *(f"{rank}{kind}" for rank in ("3d", "4d") for kind in ("", "_gqa", "_scaled", "_gqa_scaled", "_softcap", "_gqa_softcap")),
        *(f"{rank}_diff_heads_sizes{kind}" for rank in ("3d", "4d") for kind in ("", "_scaled", "_softcap")),
        *("4d_fp16", "3d_transpose_verification", "local_window_default"),
    },
    BIAS: {
        *("3d_attn_mask", "3d_gqa_attn_mask", "3d_diff_heads_sizes_attn_mask", "4d_attn_mask", "4d_gqa_attn_mask"),
        *("4d_diff_heads_sizes_attn_mask", "4d_attn_mask_3d", "4d_attn_mask_3d_causal", "4d_attn_mask_4d", "4d_attn_mask_4d_causal"),
        *("3d_with_past_and_present", "3d_gqa_with_past_and_present", "3d_diff_heads_with_past_and_present"),
        *("4d_with_past_and_present", "4d_gqa_with_past_and_present", "4d_gqa_with_past_and_present_fp16"),
        *(f"4d_diff_heads_with_past_and_present{mask}" for mask in ("", "_mask3d", "_mask4d")),
        *("4d_attn_mask_causal_bf16", "4d_softcap_neginf_mask", "4d_softcap_neginf_mask_poison"),
    },
    UNKNOWN: {
        *("4d_attn_mask_bool", "4d_attn_mask_bool_4d"),
        *("causal_boolmask_nan_robustness", "23_boolmask_fullymasked_row_nan_robustness"),
    },
    PRODUCT: {
        *(f"4d_with_qk_matmul{mode}" for mode in ("", "_bias", "_softcap", "_softmax")),
        *(f"3d_with_past_and_present_qk_matmul{mode}" for mode in ("", "_bias", "_softcap", "_softmax")),
        *(f"4d_with_past_and_present_qk_matmul{mode}" for mode in ("", "_bias", "_bias_3d_mask", "_bias_4d_mask")),
        *(f"4d_with_past_and_present_qk_matmul_bias_{rank}_mask_causal" for rank in ("3d", "4d")),
        *("23_fullymasked_qk_matmul_output_mode3_zero", "24_fullymasked_qk_matmul_output_mode3_zero"),
        *("24_qk_matmul_output_mode3_softmax_precision", "local_window_gqa_rank4_mask"),
    },
    WINDOW: {
        *("local_window", "bidirectional_window", "local_window_rank1_boolean_mask", "local_window_with_past", "3d_local_window"),
        *(f"local_window_ext_cache_{mask}_mask" for mask in ("rank3_head", "rank4_batch", "rank2", "float16")),
    },
    LONGER: {"4d_diff_heads_mask4d_padded_kv", "4d_padded_kv_bf16"},
    OWN_LENGTH: {"4d_causal_padded_kv_bf16", "4d_causal_nonpad_attn_mask_composition"},
}


@cache
def cases() -> dict[str, Any]:
    from onnx.backend.test.case import node
    from onnx.backend.test.case.node import attention  # noqa: F401  the import makes the cases; the public loader makes those of every operator

    prefix = "test_attention_"
    return {t.name.removeprefix(prefix): t for t in node._NodeTestCases if t.name.startswith(prefix) and not t.name.endswith("_expanded")}


def test_every_case_has_one_fate() -> None:
    expected = [*REWRITTEN, *(name for names in DECLINED.values() for name in names)]
    assert sorted(expected) == sorted(cases())
    assert (len(expected), len(REWRITTEN)) == (93, 15)


@pytest.mark.parametrize("reason", DECLINED)
def test_declined(reason: str, tmp_path: Path) -> None:
    for name in sorted(DECLINED[reason]):
        report = inspect(running.save(cases()[name].model, tmp_path))
        assert report.sites == (), name
        (declined,) = report.declined
        assert reason in declined.reason, name


@pytest.mark.parametrize("name", sorted(REWRITTEN))
def test_rewritten_and_as_expected(name: str, tmp_path: Path) -> None:
    model, (inputs, expected) = cases()[name].model, cases()[name].data_sets[0]
    path = running.save(model, tmp_path)
    assert [d.reason for d in inspect(path).declined] == []
    out, report = running.rewritten(path)
    assert report.rewritten == 1
    half = any(i.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for i in model.graph.output)
    feeds = {i.name: x for i, x in zip(model.graph.input, inputs, strict=True)}
    if "bf16" in name:
        # ONNX Runtime has no bfloat16 on the CPU; ONNX's reference evaluator runs the function body.
        from onnx.reference import ReferenceEvaluator

        got = dict(zip((o.name for o in model.graph.output), ReferenceEvaluator(str(out)).run(None, feeds), strict=True))
    else:
        got = running.Session(out)(feeds)
    for output, values in zip(model.graph.output, expected, strict=True):
        wanted = np.asarray(values, dtype=np.float64)
        difference = np.abs(np.asarray(got[output.name], dtype=np.float64) - wanted).max()
        assert difference <= (2e-2 if half else 1e-5) * max(np.abs(wanted).max(), 1.0), output.name


@pytest.mark.parametrize("name", sorted(name for names in DECLINED.values() for name in names))
def test_what_is_declined_is_no_full_causal_attention(name: str) -> None:
    """The outputs that ONNX expects are others than full causal attention gives; where they make the product too, it cannot be had."""
    model, (inputs, expected) = cases()[name].model, cases()[name].data_sets[0]
    (node,) = model.graph.node
    if len(node.output) > 3 and node.output[3]:
        return
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    feeds = {i.name: np.asarray(x, np.float64) for i, x in zip(model.graph.input, inputs, strict=True)}
    q, k, v = (feeds[name] for name in node.input[:3])
    if q.ndim == 3:
        heads = (attributes["q_num_heads"], attributes["kv_num_heads"], attributes["kv_num_heads"])
        q, k, v = (x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    if "past_key" in feeds:
        k, v = (np.concatenate([feeds[f"past_{what}"], x], axis=2) for what, x in (("key", k), ("value", v)))
    scale = attributes.get("scale", q.shape[3] ** -0.5)
    full, _, _ = sample_attention(q, k, v, None, Policy(policy="dense"), scale, attributes.get("softcap", 0.0))
    wanted = np.asarray(expected[0], np.float64)
    if (v == v[:, :, :1]).all():  # values that are equal for all keys: any attention gives them
        return
    if wanted.ndim == 3:
        full = full.swapaxes(1, 2).reshape(wanted.shape)
    assert np.abs(full - wanted).max() > 1e-2 * np.abs(wanted).max()
