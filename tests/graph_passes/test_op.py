"""The operator contract: what is allowed, what is refused, and that nothing is lost on the way into a node and back."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
from onnx import helper

from graph_passes import op
from graph_passes.errors import GraphError
from graph_passes.op import Policy

DOCUMENT = Path(__file__).parents[2] / "docs" / "op.md"


def test_defaults_are_what_the_documents_say() -> None:
    policy = Policy()
    assert (policy.policy, policy.stride, policy.block_q, policy.block_k, policy.alpha) == ("residue", 16, 128, 64, (0.75,))
    text = (Path(__file__).parents[2] / "docs/op.md").read_text()
    table = {
        c[1].strip().strip("`"): c[3].strip().strip("`") for c in (line.split("|") for line in text.splitlines() if line.count("|") == 6)
    }
    for name, value in policy.as_dict().items():
        assert table[name] == str(value).removesuffix(".0"), name


def test_fields_are_the_attributes() -> None:
    extra = {"scale", "softcap", "is_causal", "plugin_version", "plugin_namespace"}
    assert {f.name for f in fields(Policy) if not f.name.startswith("_")} == {a.name for a in op.ATTRIBUTES} - extra


def test_document_lists_the_same_attributes_with_the_same_types_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (FLOATS?|INT|STRING) \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [(name, kind) for name, kind, _ in rows] == [(a.name, a.onnx_type) for a in op.ATTRIBUTES]
    values = op.node_attributes(Policy(), scale=0.5)
    for name, _, default in rows:
        text = default.strip().strip('`"')
        if name == "scale":
            continue  # depends on the head size
        value = values[name][0] if name.startswith("alpha") else values[name]
        assert text == str(value).removesuffix(".0"), name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"policy": "resdue"}, "policy is 'resdue'; allowed is one of residue, tile, column_slash, stripe_window, dense."),
        ({"alpha": 0.0}, "alpha is 0.0; allowed is one number, or one a query head, each in (0, 1]."),
        ({"alpha": 1.01}, "alpha is 1.01; "),
        ({"alpha": (0.5, float("nan"))}, "alpha is nan; "),
        ({"alpha": ()}, "alpha is (); "),
        ({"alpha": "0.9"}, "alpha is '0.9'; "),
        ({"alpha": True}, "alpha is True; "),
        ({"alpha_slash": -0.1}, "alpha_slash is -0.1; "),
        ({"max_density": 0}, "max_density is 0; allowed is a number in (0, 1] (column_slash, stripe_window: 1)."),
        ({"max_density": 1.5}, "max_density is 1.5; "),
        ({"max_density": (0.5, 0.5)}, "max_density is (0.5, 0.5); "),
        ({"policy": "column_slash", "max_density": 0.5}, "max_density is '0.5 with policy column_slash'; "),
        ({"policy": "stripe_window", "max_density": 0.999}, "max_density is '0.999 with policy stripe_window'; "),
        ({"stride": 0}, "stride is 0; allowed is an integer >= 1"),
        ({"policy": "residue", "stride": 48}, "stride is '48 with block_q 128 and block_k 64'; "),
        ({"policy": "residue", "stride": 128, "block_q": 256}, "stride is '128 with block_q 256 and block_k 64'; "),
        ({"value_weight": 2}, "value_weight is 2; allowed is 0 or 1."),
        ({"policy": "tile", "sample_rows": 24}, "sample_rows is '24 with block_q 128'; "),
        ({"policy": "column_slash", "sample_rows": 65, "segment": 64}, "sample_rows is '65 with segment 64'; "),
        ({"segment": 0}, "segment is 0; "),
        ({"sample_ratio": 0.0}, "sample_ratio is 0.0; allowed is a number in (0, 1]."),
        ({"window_ratio": 1.5}, "window_ratio is 1.5; allowed is a number in [0, 1]."),
        ({"block_q": 96}, "block_q is 96; allowed is one of 16, 32, 64, 128, 256."),
        ({"block_k": 8}, "block_k is 8; "),
        ({"window": -1}, "window is -1; allowed is an integer >= 0 (tokens)."),
        ({"sink": 4.0}, "sink is 4.0; "),
        ({"min_length": 2**31}, "min_length is 2147483648; "),
        ({"dense_rows": True}, "dense_rows is True; "),
    ],
)
def test_refusals_say_what_was_got_and_what_is_allowed(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(GraphError, match=re.escape(sentence)):
        Policy(**values)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=re.escape("attention.yaml, site 3: " + sentence)):
        Policy(**values, _where="attention.yaml, site 3: ")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"window_ratio": 0},
        {"alpha": 1, "sample_ratio": 1},
        {"policy": "tile", "stride": 48},  # constraints bind the policy that reads them
        {"policy": "dense", "stride": 48, "sample_rows": 5000},
        {"policy": "column_slash", "sample_rows": 2048, "max_density": 1},
        {"policy": "dense", "max_density": 0.5},
        {"min_length": 2**31 - 1, "sink": 0, "window": 0},
    ],
)
def test_limits_are_inclusive_and_unread_values_are_free(values: dict[str, object]) -> None:
    policy = Policy(**values)  # type: ignore[arg-type]
    for name, value in values.items():
        got = getattr(policy, name)
        assert got == ((float(value),) if name == "alpha" else value)  # type: ignore[arg-type]


def test_per_head_values_must_fit_the_site() -> None:
    policy = Policy(alpha=[0.5, 0.6, 0.7, 0.8])  # type: ignore[arg-type]
    assert policy.for_heads(4) is policy
    assert Policy().for_heads(7).alpha == (0.75,)
    with pytest.raises(GraphError, match=r"alpha has 4 values, but the site has 8 query heads; give one value or 8\."):
        policy.for_heads(8)
    with pytest.raises(GraphError, match=r"alpha_slash has 2 values, but the site has 4 query heads"):
        Policy(alpha_slash=(0.1, 0.2)).for_heads(4)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(policy="column_slash", alpha=(0.9, 0.95, 1.0, 0.123456), alpha_slash=0.8, segment=4096, sample_rows=64),  # type: ignore[arg-type]
        Policy(policy="stripe_window", sample_ratio=0.07, window_ratio=0.1, block_q=16, block_k=256),
        Policy(policy="dense", min_length=0, dense_rows=7, window=3, sink=0),
        Policy(policy="tile", max_density=0.3),
    ],
)
def test_a_policy_survives_the_file(policy: Policy) -> None:
    written = helper.make_node(op.OP_TYPE, ["q"], ["o"], domain=op.DOMAIN, **op.node_attributes(policy, scale=0.125, softcap=30))
    node = onnx.NodeProto.FromString(written.SerializeToString())
    assert sorted(a.name for a in node.attribute) == sorted(a.name for a in op.ATTRIBUTES)
    for attribute in node.attribute:
        kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
        assert kind == next(a.onnx_type for a in op.ATTRIBUTES if a.name == attribute.name)
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert op.policy_from_attributes(values) == policy
    assert (values["scale"], values["softcap"], values["is_causal"]) == (0.125, 30, 1)


def test_a_policy_survives_its_plain_values() -> None:
    policy = Policy(alpha=(0.5, 1.0))
    assert Policy(**policy.as_dict()) == policy
    assert Policy().as_dict()["alpha"] == 0.75


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scale": 0.0}, "scale is 0.0; allowed is a finite number > 0."),
        ({"scale": float("inf")}, "scale is inf; "),
        ({"scale": 1.0, "softcap": -1.0}, "softcap is -1.0; allowed is a finite number >= 0 (0 = no soft-cap)."),
        ({"scale": 1.0, "softcap": float("nan")}, "softcap is nan; "),
    ],
)
def test_scale_and_softcap_are_checked(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(GraphError, match=re.escape(sentence)):
        op.node_attributes(Policy(), **values)


def test_variants_have_distinct_names() -> None:
    flags = [(m, c, k) for m in (False, True) for c in (0.0, 30.0) for k in (False, True)]
    names = [op.variant(p, has_mask=m, softcap=c, certificate=k) for p in op.POLICIES for m, c, k in flags]
    assert len(set(names)) == len(names)
    assert op.variant("tile", has_mask=True, softcap=50.0, certificate=True) == "tile.mask.softcap.certificate"
    assert op.variant("dense", has_mask=False) == "dense"
