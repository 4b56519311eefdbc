"""The function bodies in ONNX Runtime (and some in onnx.reference) against the float64 reference."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner

from graph_passes import op, reference
from graph_passes.body import PROBE_OP_TYPE, PROBE_OUTPUTS, attach, function, probe_function
from graph_passes.errors import GraphError
from graph_passes.opset import BODIES
from tests.graph_passes.attention_cases import Case, node_model, run

SPARSE = tuple(p for p in op.POLICIES if p != "dense")
SMALL = {
    "min_length": 0,
    "block_q": 32,
    "block_k": 16,
    "sink": 16,
    "dense_rows": 0,
    "stride": 8,
    "sample_rows": 8,
    "segment": 64,
    "alpha": 0.7,
    "alpha_slash": 0.4,
}

CASES = {
    "square": Case(s=256, t=256),
    "awkward": Case(s=203, t=203, d=24, dv=10, heads=3, kv_heads=1),
    "chunk": Case(s=100, t=331, heads=4, kv_heads=4, dv=20),
    "one_tile": Case(s=17, t=90),
    "decode": Case(s=1, t=130, batch=2),
    "speculative": Case(s=16, t=130, padding="left", batch=2),
    "first_token": Case(s=1, t=1),
    "shorter_than_min_length": Case(s=150, t=170, policy={"min_length": 171}),
    "as_long_as_min_length": Case(s=150, t=170, policy={"min_length": 170}),
    "left": Case(s=200, t=200, batch=3, padding="left", kv_heads=1),
    "left_chunk": Case(s=120, t=211, batch=3, padding="left", policy={"window": 40, "dense_rows": 33}),
    "right": Case(s=200, t=200, batch=3, padding="right", policy={"dense_rows": 20}),
    "both": Case(s=200, t=200, batch=3, padding="both", policy={"sink": 40}, softcap=4.0),
    "holes": Case(s=130, t=190, batch=3, padding="holes", heads=2),
    "nothing_real": Case(s=70, t=101, batch=2, padding="nothing_real", heads=2),
    "unweighted": Case(s=180, t=200, batch=2, padding="left", policy={"value_weight": 0}),
    "softcap": Case(s=180, t=180, softcap=2.5),
    "per_head": Case(s=150, t=150, policy={"alpha": [0.3, 0.6, 0.9, 1.0], "alpha_slash": [0.1, 0.9, 0.5, 0.2]}),
    "only_own_blocks": Case(s=200, t=200, policy={"sink": 0, "alpha": 1e-6, "alpha_slash": 1e-6, "window_ratio": 0.0}),
    "window": Case(s=200, t=230, policy={"window": 33, "sink": 0, "alpha": 0.2, "window_ratio": 0.2}),
    "tall_blocks": Case(s=300, t=300, policy={"block_q": 16, "block_k": 128, "stride": 16, "sample_rows": 16}),
    "wide_tiles": Case(s=300, t=300, policy={"block_q": 128, "block_k": 16, "stride": 16, "sample_rows": 32, "segment": 2**31 - 1}),
    "stride_1": Case(s=150, t=170, policy={"stride": 1, "sample_rows": 1, "segment": 1, "sample_ratio": 1.0}),
    "rare_samples": Case(s=190, t=190, policy={"sample_rows": 2, "segment": 150, "sample_ratio": 1e-30}),
    # The first dense position is the last row of a tile; the first padding position is the first row of one.
    "dense_boundary": Case(s=200, t=200, policy={"dense_rows": 41}),
    "padding_boundary": Case(s=192, t=192, batch=2, padding="right", policy={"dense_rows": 5}),
    "budget": Case(s=256, t=256, batch=2, padding="both", policy={"max_density": 0.35, "alpha": 0.9, "dense_rows": 20}),
    "budget_of_a_chunk": Case(s=100, t=331, policy={"max_density": 0.2, "alpha": [0.9, 0.9, 1.0, 0.2]}),
    "budget_below_the_forced": Case(s=200, t=200, policy={"max_density": 1e-6, "window": 40}),
    "half_ratio": Case(s=150, t=150, policy={"sample_ratio": 0.4}),  # round(2.5) is 2
}


def policy_of(case: Case, name: str, **changes: object) -> op.Policy:
    values = SMALL | case.policy | changes
    if name in ("column_slash", "stripe_window"):
        values.pop("max_density", None)
    return op.Policy(policy=name, **values)  # type: ignore[arg-type]


def expected(case: Case, policy: op.Policy) -> tuple[NDArray, reference.Selection, NDArray]:
    x = case.tensors()
    return reference.sample_attention(x["query"], x["key"], x["value"], case.key_mask(), policy, case.scale, case.softcap)


def assert_same_blocks(got: NDArray, policy: op.Policy, selection: reference.Selection) -> None:
    """Equal, except where rounding in float32 decides: the block at which the cumulative mass reaches alpha, or blocks of equal mass."""
    differs = got != selection.block_mask
    if not differs.any():
        return
    assert policy.policy in ("residue", "tile")
    assert differs.mean() < 0.005
    for b, h, t in zip(*np.nonzero(differs.any(-1)), strict=True):
        mass, forced = selection.mass[b, h, t], selection.forced[b, t]
        alpha = np.float32(policy.alpha[h % len(policy.alpha)])
        mass = mass / mass[~forced].sum()
        unforced = mass[got[b, h, t] & ~forced]
        # A budget that ends both sets lets them differ in equal masses alone.
        reached = unforced.sum() >= alpha - 1e-6
        assert reached or (policy.max_density < 1 and got[b, h, t].sum() == selection.block_mask[b, h, t].sum())
        assert unforced.sum() - unforced.min(initial=1) < alpha + 1e-6
        assert unforced.min(initial=1) >= mass[~got[b, h, t] & ~forced].max(initial=0) - 1e-6


def assert_matches(case: Case, policy: op.Policy, got: dict[str, NDArray]) -> None:
    x = case.tensors()
    selection = reference.select(x["query"], x["key"], x["value"], case.key_mask(), policy, case.scale, case.softcap)
    assert_same_blocks(got["block_mask"], policy, selection)
    # Whatever rounding decided, the rest must belong to the blocks that were read.
    output, row_cra = reference.attend(
        x["query"], x["key"], x["value"], case.key_mask(), got["block_mask"], policy.block_q, policy.block_k, case.scale, case.softcap
    )
    np.testing.assert_allclose(got["output"], output, rtol=0, atol=2e-6 * np.abs(x["value"]).max())
    np.testing.assert_allclose(got["row_cra"], row_cra, rtol=0, atol=3e-6)
    full = reference.full_heads(policy, case.heads, case.s, case.t)
    assert np.isin(got["row_cra"][:, full], (0, 1)).all()
    if (got["block_mask"] == selection.block_mask).all():
        np.testing.assert_allclose(got["certificate"], selection.certificate, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", op.POLICIES)
def test_body_is_the_reference(policy: str, name: str) -> None:
    case = CASES[name]
    p = policy_of(case, policy)
    assert_matches(case, p, run(node_model(p, case, probe=True), case.feeds()))


@pytest.mark.parametrize("opset", BODIES)
@pytest.mark.parametrize("policy", op.POLICIES)
def test_every_opset(policy: str, opset: int) -> None:
    case = Case(s=70, t=111, batch=2, padding="both", softcap=3.0, heads=2)
    p = policy_of(case, policy)
    model = node_model(p, case, probe=True, opset=opset)
    assert [o.version for o in model.functions[0].opset_import] == [opset]
    assert_matches(case, p, run(model, case.feeds()))


@pytest.mark.parametrize("policy", SPARSE)
def test_cases_are_selective(policy: str) -> None:
    """The comparisons above mean something: blocks are dropped, and dropping them shows in the output."""
    case = CASES["square"]
    output, selection, row_cra = expected(case, policy_of(case, policy))
    dense, _, _ = expected(case, policy_of(case, "dense"))
    assert reference.density(selection.block_mask, case.s, case.t, None, 32, 16).mean() < 0.8
    assert row_cra.min() < 0.9
    assert np.abs(output - dense).max() > 0.05


@pytest.mark.parametrize("policy", SPARSE)
@pytest.mark.parametrize("seed", range(3))
def test_random_inputs_without_structure(policy: str, seed: int) -> None:
    case = Case(s=160, t=190, seed=seed, heads=2)
    rng = np.random.default_rng(seed)
    feeds = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in case.tensors().items()}
    p = policy_of(case, policy, alpha=0.5)
    got = run(node_model(p, case, probe=True), feeds)
    selection = reference.select(feeds["query"], feeds["key"], feeds["value"], None, p, case.scale)
    assert_same_blocks(got["block_mask"], p, selection)


@pytest.mark.parametrize("policy", op.POLICIES)
@pytest.mark.parametrize(
    "case", [Case(s=40, t=53, heads=2, padding="left", batch=2), Case(s=49, t=49, softcap=2.0, heads=2), Case(s=1, t=20)]
)
def test_onnx_reference_runs_the_same_body(policy: str, case: Case) -> None:
    from onnx.reference import ReferenceEvaluator

    p = policy_of(case, policy)
    model = node_model(p, case, probe=True)
    values = ReferenceEvaluator(model).run(None, case.feeds())
    assert_matches(case, p, dict(zip([o.name for o in model.graph.output], values, strict=True)))


@pytest.mark.parametrize(("dtype", "low"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("policy", op.POLICIES)
def test_16_bit_inputs_lose_only_the_rounding_of_the_output(policy: str, dtype: int, low: type) -> None:
    case = Case(s=120, t=160, batch=2, padding="left")
    p = policy_of(case, policy)
    got = run(node_model(p, case, probe=True, dtype=dtype), case.feeds())
    x = {name: tensor.astype(low).astype(np.float64) for name, tensor in case.tensors().items()}
    selection = reference.select(x["query"], x["key"], x["value"], case.key_mask(), p, case.scale)
    assert_same_blocks(got["block_mask"], p, selection)
    output, _ = reference.attend(x["query"], x["key"], x["value"], case.key_mask(), got["block_mask"], p.block_q, p.block_k, case.scale)
    half_ulp = float(ml_dtypes.finfo(low).eps) / 2
    assert (np.abs(got["output"] - output) <= half_ulp * np.abs(output) + 1e-5).all()


@pytest.mark.parametrize("policy", SPARSE)
def test_alpha_1_is_full_attention_exactly(policy: str) -> None:
    case = Case(s=150, t=203, batch=2, padding="both", softcap=5.0)
    dense = run(node_model(policy_of(case, "dense"), case, probe=True), case.feeds())
    got = run(node_model(policy_of(case, policy, alpha=1.0), case, probe=True), case.feeds())
    for name in PROBE_OUTPUTS:
        np.testing.assert_array_equal(got[name], dense[name])
    x = case.tensors()
    group = case.heads // case.kv_heads
    key, value = (np.repeat(x[name].astype(np.float64), group, axis=1) for name in ("key", "value"))
    scores = case.softcap * np.tanh(np.einsum("bhid,bhjd->bhij", x["query"], key) * case.scale / case.softcap)
    mask = case.key_mask()
    assert mask is not None
    weights = np.exp(scores) * np.tri(150, 203, 53) * mask[:, None, None]
    total = weights.sum(-1, keepdims=True)
    plain = np.einsum("bhij,bhjd->bhid", weights / np.where(total, total, 1), value)
    np.testing.assert_allclose(got["output"], plain, rtol=0, atol=1e-5)


def test_alpha_slash_1_is_full_attention_of_column_slash_alone() -> None:
    case = Case(s=150, t=150)
    for policy in SPARSE:
        got = run(node_model(policy_of(case, policy, alpha_slash=1.0), case, probe=True), case.feeds())
        assert (got["row_cra"] == 1).all() == (policy == "column_slash")


def test_a_tile_without_evidence_reads_everything() -> None:
    """Real tokens 1, 2, 3 only: no key of their residue class stands at or before them."""
    case = Case(s=64, t=64, heads=2, batch=2, padding="both")
    p = policy_of(case, "residue", sink=0, block_q=16, stride=16)
    feeds = case.feeds()
    feeds["key_mask"] = np.stack([np.ones(64, bool), np.isin(np.arange(64), (1, 2, 3))])
    got = run(node_model(p, case, probe=True), feeds)
    selection = reference.select(feeds["query"], feeds["key"], feeds["value"], feeds["key_mask"], p, case.scale)
    np.testing.assert_array_equal(got["block_mask"], selection.block_mask)
    assert selection.mass[1].sum() == 0
    assert (got["block_mask"][1] == np.tri(4, dtype=bool)).all()
    assert (got["certificate"][1] == 1).all()


@pytest.mark.parametrize(("alpha", "tiles"), [(0.55, range(16)), (0.5, (0, 1, 2, 4, 8))])
def test_equal_masses_go_to_the_lower_block_and_reaching_alpha_is_enough(alpha: float, tiles: Sequence[int]) -> None:
    """All keys equal: every block has the same mass (exactly, in tiles with 1, 2, 4 or 8 blocks before their own, which is forced)."""
    case = Case(s=256, t=256, heads=1, kv_heads=1)
    feeds = case.feeds() | {"key": np.zeros((1, 1, 256, 16), np.float32)}
    p = policy_of(case, "tile", alpha=alpha, sink=0, block_q=16, sample_rows=1, value_weight=0)
    got = run(node_model(p, case, probe=True), feeds)["block_mask"][0, 0]
    for t in tiles:
        others = int(np.ceil(alpha * t))
        assert set(np.flatnonzero(got[t])) == {t} | set(range(others))


@pytest.mark.parametrize(("max_density", "room"), [(0.5, 4), (0.51, 5), (1.0, 7)])
def test_a_budget_takes_equal_masses_from_the_lower_block(max_density: float, room: int) -> None:
    """All keys equal; the last tile sees 16 blocks, of which 4 are forced: two of its own, two of the sink."""
    case = Case(s=256, t=256, heads=1, kv_heads=1)
    feeds = case.feeds() | {"key": np.zeros((1, 1, 256, 16), np.float32)}
    p = policy_of(case, "tile", alpha=0.55, sink=32, sample_rows=1, value_weight=0, max_density=max_density)
    got = run(node_model(p, case, probe=True), feeds)["block_mask"][0, 0]
    np.testing.assert_array_equal(np.flatnonzero(got[7]), [*range(2 + room), 14, 15])
    selection = reference.select(feeds["query"], feeds["key"], feeds["value"], None, p, case.scale)
    np.testing.assert_array_equal(got, selection.block_mask[0, 0])


@pytest.mark.parametrize("policy", ["residue", "tile"])
def test_a_budget_binds(policy: str) -> None:
    """The comparisons with a budget mean something: without it more is kept."""
    case = CASES["budget"]
    p = policy_of(case, policy)
    got = run(node_model(p, case, probe=True), case.feeds())["block_mask"]
    more = run(node_model(p.replace(max_density=1.0), case, probe=True), case.feeds())["block_mask"]
    assert (got <= more).all()
    assert (got != more).any(-1).mean() > 0.3


@pytest.mark.parametrize("certificate", [False, True])
@pytest.mark.parametrize("policy", op.POLICIES)
def test_node_gives_what_the_probe_gives(policy: str, certificate: bool) -> None:
    case = Case(s=130, t=150, batch=2, padding="right")
    p = policy_of(case, policy)
    got = run(node_model(p, case, certificate=certificate), case.feeds())
    probe = run(node_model(p, case, probe=True), case.feeds())
    assert list(got) == list(op.OUTPUTS[: 1 + certificate])
    for name, value in got.items():
        np.testing.assert_array_equal(value, probe[name])


def every_function() -> list[onnx.FunctionProto]:
    flags = list(itertools.product((False, True), repeat=2))
    bodies = [function(p, has_mask=m, softcap=c, certificate=k, opset=18) for p in op.POLICIES for m, c in flags for k in (False, True)]
    return bodies + [probe_function(p, has_mask=m, softcap=c, opset=18) for p in op.POLICIES for m, c in flags]


def test_functions_fit_the_contract() -> None:
    bodies = every_function()
    assert len({(f.name, f.overload) for f in bodies}) == len(bodies)
    for f in bodies:
        assert f.domain == op.DOMAIN
        policy, *flags = f.overload.split(".")
        probe = f.name == PROBE_OP_TYPE
        expected_name = op.variant(policy, has_mask="mask" in flags, softcap=float("softcap" in flags), certificate="certificate" in flags)
        assert f.overload == expected_name
        assert list(f.attribute) == [a.name for a in op.ATTRIBUTES]
        assert list(f.input) == [f"__sa_{name}" for name in op.INPUTS[: 3 + ("mask" in flags)]]
        outputs = PROBE_OUTPUTS if probe else op.OUTPUTS[: 1 + ("certificate" in flags)]
        assert list(f.output) == [f"__sa_{name}" for name in outputs]
        assert all(name.startswith("__sa_") for node in f.node for name in (*node.input, *node.output) if name)
        assert {node.domain for node in f.node} == {""}
        assert not {node.op_type for node in f.node} & {"If", "Loop", "Scan"}


def test_attributes_are_referenced_with_their_types_and_all_that_matter_are_read() -> None:
    types = {a.name: a.onnx_type for a in op.ATTRIBUTES}
    read: dict[str, set[str]] = {policy: set() for policy in op.POLICIES}
    for f in every_function():
        for node in f.node:
            for attribute in node.attribute:
                if attribute.ref_attr_name:
                    assert onnx.AttributeProto.AttributeType.Name(attribute.type) == types[attribute.ref_attr_name]
                    read[f.overload.split(".")[0]].add(attribute.ref_attr_name)
    always = {"scale", "softcap", "block_q", "block_k"}
    selecting = always | {"alpha", "window", "sink", "dense_rows", "min_length"}
    assert read == {
        "dense": always,
        "residue": selecting | {"max_density", "stride", "value_weight"},
        "tile": selecting | {"max_density", "sample_rows", "value_weight"},
        "column_slash": selecting | {"alpha_slash", "sample_rows", "segment"},
        "stripe_window": selecting | {"sample_ratio", "window_ratio"},
    }


def chain(policies: list[op.Policy], masks: list[bool] | None = None) -> onnx.ModelProto:
    """A model of several nodes, each the query of the next; nothing attached."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "H", "S", "D"]) for name in ("x0", "key", "value")]
    if masks:
        inputs.append(helper.make_tensor_value_info("key_mask", TensorProto.BOOL, ["B", "T"]))
    nodes = []
    for i, policy in enumerate(policies):
        names = [f"x{i}", "key", "value", *(["key_mask"] if masks and masks[i] else [])]
        nodes.append(
            helper.make_node(op.OP_TYPE, names, [f"x{i + 1}"], name=f"a{i}", domain=op.DOMAIN, **op.node_attributes(policy, scale=0.25))
        )
    outputs = [helper.make_tensor_value_info(f"x{len(policies)}", TensorProto.FLOAT, ["B", "H", "S", "D"])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=8)


def test_attach_adds_each_variant_once_and_is_idempotent() -> None:
    residue, dense = op.Policy(policy="residue", min_length=0), op.Policy(policy="dense")
    model = chain([residue, dense, residue, residue.replace(alpha=0.5), residue], [False, False, False, False, True])
    attach(model)
    assert [f.overload for f in model.functions] == ["tensorrt_needs_the_plugin", "residue", "dense", "residue.mask"]
    assert [n.overload for n in model.graph.node] == ["residue", "dense", "residue", "residue", "residue.mask"]
    assert model.ir_version == 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, op.DOMAIN: op.VERSION}
    onnx.checker.check_model(model)
    once = model.SerializeToString()
    attach(model)
    assert model.SerializeToString() == once


def test_attach_keeps_other_functions_and_leaves_other_models_alone() -> None:
    other = helper.make_function("other", "F", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [helper.make_opsetid("", 20)])
    model = chain([op.Policy()])
    model.functions.append(other)
    attach(model)
    assert [(f.domain, f.name) for f in model.functions] == [(op.DOMAIN, op.OP_TYPE), ("other", "F"), (op.DOMAIN, op.OP_TYPE)]
    plain = helper.make_model(helper.make_graph([], "g", [], []), opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    before = plain.SerializeToString()
    attach(plain)
    assert plain.SerializeToString() == before


def test_attach_reaches_subgraphs() -> None:
    inner = chain([op.Policy(policy="dense")])
    branch = helper.make_graph(list(inner.graph.node), "b", [], [helper.make_tensor_value_info("x1", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([node], "g", [condition, *inner.graph.input], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    attach(model)
    assert [f.overload for f in model.functions] == ["tensorrt_needs_the_plugin", "dense"]
    case = Case(s=20, t=30, d=16)
    x = case.tensors()
    feeds = {"c": np.array(True), "x0": x["query"], "key": x["key"], "value": x["value"]}
    output, _, _ = reference.sample_attention(x["query"], x["key"], x["value"], None, op.Policy(policy="dense"), 0.25)
    np.testing.assert_allclose(run(model, feeds)["y"], output, rtol=0, atol=1e-5)


def without(model: onnx.ModelProto, attribute: str) -> None:
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: setattr(m.opset_import[0], "version", 17), r"imports opset 17; .* opsets 18 to 26, .* so export"),
        (lambda m: setattr(m.opset_import[0], "version", 27), r"imports opset 27; "),
        (lambda m: without(m, "sink"), r"node 'a0' \(SampleAttention\) lacks the attributes sink;"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("sinks", 1)), r"has the attributes sinks; allowed are scale,"),
        (lambda m: m.graph.node[0].input.append(""), r"has the inputs .*; allowed are 3 or 4, none of them empty"),
        (lambda m: m.graph.node[0].input.pop(), r"allowed are 3 or 4"),
        (lambda m: m.graph.node[0].output.extend(["c", "d"]), r"has 3 outputs; allowed are 1 to 2: output, certificate"),
        (
            lambda m: (without(m, "block_q"), m.graph.node[0].attribute.append(helper.make_attribute("block_q", 48))),
            "block_q is 48; allowed",
        ),
    ],
)
def test_attach_refuses_with_one_sentence_and_changes_nothing(spoil: object, sentence: str) -> None:
    model = chain([op.Policy()])
    spoil(model)  # type: ignore[operator]
    before = model.SerializeToString()
    with pytest.raises(GraphError, match=sentence):
        attach(model)
    assert model.SerializeToString() == before


def test_shape_inference_sees_few_unknown_dimensions() -> None:
    """ONNX Runtime's load time is quadratic in their number (see Builder.of_hidden_rank): 24 layers took 48 s when there were hundreds."""
    model = chain([op.Policy()])
    attach(model)
    inferred = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    shapes = [v.type.tensor_type.shape.dim for v in inferred.graph.value_info if v.type.tensor_type.HasField("shape")]
    assert sum(1 for dims in shapes if any(not d.HasField("dim_value") for d in dims)) < 40
    rank = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    assert rank.get("x1", 4) == 4


def test_no_intermediate_comes_near_the_full_score_matrix(tmp_path: Path) -> None:

    import onnxruntime as ort

    case = Case(s=1024, t=1024, heads=4, kv_heads=2)
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = f"{tmp_path}/profile"
    largest = {}
    for policy in op.POLICIES:
        model = node_model(policy_of(case, policy, block_q=64, block_k=64), case)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, case.feeds())
        with open(session.end_profiling()) as file:
            events = [e["args"] for e in json.load(file) if e["cat"] == "Node" and "output_type_shape" in e["args"]]
        shapes = [shape for e in events for output in e["output_type_shape"] for shape in output.values()]
        largest[policy] = max(int(np.prod(shape)) for shape in shapes)
    full = case.heads * case.s * case.t
    assert largest["dense"] <= full / 8
    assert max(largest.values()) <= full / 7
