"""Full attention in the place of the nodes: the same function as the original model, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from sa_export.check.decoder import DecoderInputs, feed, open_session, split_outputs
from sa_export.errors import UserError
from sa_export.tensorrt.dense import FORMS, lower, write_dense
from tests.tensorrt.engines import SITES, exported, rewritten


def logits(path: Path, calls: list[tuple[np.ndarray, np.ndarray | None]]) -> list[np.ndarray]:
    """Logits of calls that go on with each other's cache: (ids [B, S], mask [B, P + S])."""
    inputs, session = DecoderInputs.from_model(path), open_session(path)
    names = [o.name for o in session.get_outputs()]
    past, out = None, []
    for ids, mask in calls:
        found, past = split_outputs(dict(zip(names, session.run(None, feed(inputs, ids, mask, past)), strict=True)))
        out.append(found)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_dense_forms_are_the_original(form: str, tmp_path: Path) -> None:
    full, source = exported("float32"), rewritten("float32")
    target = write_dense(source, source.with_name(f"dense.{form}.onnx"), form, force=True)
    ids = np.random.default_rng(0).integers(1, 500, (2, 70))
    padded = np.ones((2, 70), np.int64)
    padded[1, :9] = 0
    cases: list[list[tuple[np.ndarray, np.ndarray | None]]] = [
        [(ids[:, :50], None), (ids[:, 50:69], None), (ids[:, 69:], None)],  # prefill, chunk, decode
        [(ids, padded)],
        [(ids, padded[:, ::-1].copy())],
    ]
    for calls in cases:
        for (_, mask), a, b in zip(calls, logits(full, calls), logits(target, calls), strict=True):
            real = np.ones(a.shape[:2], bool) if mask is None else mask[:, -a.shape[1] :].astype(bool)
            assert np.isfinite(b).all()
            assert np.abs(a - b)[real].max() <= 1e-4 * np.abs(a).max()
    model = onnx.load(target, load_external_data=False)
    made = [n.op_type for n in model.graph.node]
    assert "SampleAttention" not in made
    assert not model.functions
    assert made.count("Attention") == (SITES if form == "native" else 0)
    assert made.count("LessOrEqual") == 1  # one mask for all sites
    onnx.checker.check_model(str(target), full_check=True)


def with_softcap(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "softcap":
                attribute.f = 5.0
    return model


def test_softcap(make_case: Callable[[str], tuple[onnx.ModelProto, dict[str, np.ndarray]]]) -> None:
    model, feeds = make_case("dense")
    model = with_softcap(model)
    with pytest.raises(UserError, match=r"has a soft-cap.*--dense decomposed"):
        lower(model, "native")
    from graph_passes import body

    dense = lower(model, "decomposed")
    body.attach(model)  # the body of the variant with a soft-cap
    (expected,) = open_session(model.SerializeToString()).run(None, feeds)
    (got,) = open_session(dense.SerializeToString()).run(None, feeds)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.fixture
def make_case() -> Callable[[str], tuple[onnx.ModelProto, dict[str, np.ndarray]]]:
    from tests.tensorrt.one_node import one_node

    return lambda policy: one_node(policy, heads=6, kv_heads=2, queries=33, keys=40, value_size=24)


def test_a_dense_model_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "mine.onnx"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists; choose another name, or replace it with --force"):
        write_dense(rewritten(), target, "native")
    assert target.read_text() == "mine"


def test_an_operator_that_changed_before_opset_23() -> None:
    model = onnx.load(rewritten(), load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("GroupNormalization", ["a", "b", "c"], ["d"], num_groups=1))
    model.opset_import[0].version = 20
    with pytest.raises(UserError, match=r"The operator GroupNormalization is another one in opset 23.*--opset 23"):
        lower(model, "native")
