"""The plugin's creator against the operator's contract (graph_passes/op.py): identity, fields, and one sentence for each misuse."""

from __future__ import annotations

import math
import shutil
import subprocess

import numpy as np
import pytest

from graph_passes.op import ATTRIBUTES, OP_TYPE, Policy, node_attributes
from tests.tensorrt import plugin_build
from tests.tensorrt.plugin_shim import CHAR, FLOAT32, FLOAT64, INT32, INT64, RUNTIME, Door, Field, node_fields, to_field

FIELDS = [a for a in ATTRIBUTES if not a.name.startswith("plugin_")]
FIELD_TYPES = {"FLOAT": FLOAT32, "FLOATS": FLOAT32, "INT": INT32, "STRING": CHAR}
DEFAULTS = node_attributes(Policy(), scale=0.125)
INT8, FLOAT16, UNKNOWN = 3, 0, 8

# Values outside each attribute's range, of the right type.
OUTSIDE = {
    "scale": [0.0, -1.0, math.nan, math.inf],
    "softcap": [-1.0, math.nan, math.inf],
    "is_causal": [0, 2],
    "policy": ["", "dens", "tile ", "residue\0tile", "x" * 5000, "téléscope"],
    "alpha": [0.0, 1.5, math.nan, [0.5, 0.0], [0.5, math.nan]],
    "alpha_slash": [0.0, -0.5, math.inf, [1.0, 1.0001]],
    "max_density": [0.0, -0.5, 1.5, math.nan],
    "stride": [0, -8, 3, 128],
    "sample_rows": [0, -1, 48],
    "value_weight": [-1, 2],
    "segment": [0, -2048],
    "sample_ratio": [0.0, 1.5, math.nan],
    "window_ratio": [-0.5, 1.5, math.nan],
    "block_q": [0, 8, 100, 512, -128],
    "block_k": [0, 8, 100, 512, -64],
    "window": [-1],
    "sink": [-1],
    "dense_rows": [-1],
    "min_length": [-1, -(2**31)],
}
TOGETHER = {"stride": "residue", "sample_rows": "tile"}


@pytest.fixture(scope="module")
def door(shared_folder, headers, plugin_library) -> Door:
    return Door(plugin_build.once(shared_folder, "shim", lambda folder: plugin_build.build_shim(folder, headers)), plugin_library)


def _refused(door: Door, fields, phase=0) -> str:
    layer, sentence = door.create(fields, name="model/layers.3", phase=phase)
    assert layer is None
    assert sentence.startswith("SampleAttention layer 'model/layers.3': ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


def test_identity_and_fields_are_the_contract(door):
    assert door.identity() == [OP_TYPE, DEFAULTS["plugin_version"], DEFAULTS["plugin_namespace"]]
    assert door.fields() == [(a.name, FIELD_TYPES[a.onnx_type], 1) for a in FIELDS]


def test_the_tools_nodes_are_taken(door):
    for policy in ("residue", "tile", "column_slash", "stripe_window", "dense"):
        layer, sentence = door.create(node_fields(node_attributes(Policy(policy=policy), scale=0.088, softcap=30.0)))
        assert (layer is not None, sentence) == (True, "")
        layer.close()


def test_every_default_is_on_the_node_none_in_the_plugin(door):
    for a in FIELDS:
        fields = node_fields(DEFAULTS)
        del fields[a.name]
        assert f"The attribute {a.name} is missing" in _refused(door, fields)
    assert "missing" in _refused(door, {})


@pytest.mark.parametrize("attribute", FIELDS, ids=lambda a: a.name)
def test_a_value_out_of_range_is_refused_with_the_contracts_sentence(door, attribute):
    for value in OUTSIDE[attribute.name]:
        values = {**DEFAULTS, "policy": TOGETHER.get(attribute.name, "tile")}
        sentence = _refused(door, {**node_fields(values), attribute.name: to_field(value)})
        assert f"{attribute.name} is " in sentence
        assert f"; allowed is {attribute.allowed}." in sentence, sentence


def test_limits_between_attributes_bind_their_policy_alone(door):
    slash = {**DEFAULTS, "policy": "column_slash", "sample_rows": 65, "segment": 64}
    assert "sample_rows is 65 with segment 64" in _refused(door, node_fields(slash))
    for policy in ("column_slash", "stripe_window"):
        sentence = _refused(door, node_fields({**DEFAULTS, "policy": policy, "max_density": 0.5}))
        assert f"max_density is 0.5 with policy {policy}; allowed is a number in (0, 1] (column_slash, stripe_window: 1)." in sentence
    for values in ({**slash, "policy": "dense", "max_density": 0.5}, {**DEFAULTS, "policy": "tile", "stride": 3}):
        layer, sentence = door.create(node_fields(values))
        assert layer is not None, sentence
        layer.close()


@pytest.mark.parametrize("attribute", FIELDS, ids=lambda a: a.name)
def test_a_wrong_type_is_refused(door, attribute):
    good = node_fields(DEFAULTS)[attribute.name]
    wrong = [
        Field(UNKNOWN, good.values, good.length),
        Field(INT8, good.values, good.length),
        Field(FLOAT16, good.values, good.length),
        Field(99, good.values, good.length),
        Field(good.type, None, good.length),
        Field(good.type, good.values, -1),
        Field(FLOAT32 if good.type != FLOAT32 else INT32, b"\0\0\0\0", 1),
    ]
    if attribute.onnx_type != "STRING":
        wrong.append(Field(good.type, None, 0))
    if attribute.onnx_type in ("INT", "FLOAT"):
        wrong.append(Field(good.type, good.values * 2, 2))
    if attribute.onnx_type == "FLOATS":
        wrong.append(Field(good.type, good.values, 2**31 - 1))
    for field in wrong:
        sentence = _refused(door, {**node_fields(DEFAULTS), attribute.name: field})
        assert f"{attribute.name} has {field.length} values of type" in sentence
        assert attribute.allowed in sentence


def test_64_bit_integers_count_while_they_fit(door):
    wide = Field(INT64, np.int64(128).tobytes(), 1)
    layer, sentence = door.create({**node_fields(DEFAULTS), "sink": wide})
    assert layer is not None, sentence
    assert " sink=128 " in layer.timing_cache_id()
    layer.close()
    for value in (2**40, 2**32, 2**31, -(2**63)):
        sentence = _refused(door, {**node_fields(DEFAULTS), "sink": Field(INT64, np.int64(value).tobytes(), 1)})
        assert f"sink is {value}; allowed is an integer >= 0 (tokens), within 32 bits." in sentence


def test_64_bit_floats_count_while_they_fit(door):
    for value, taken in ((0.5, True), (1e300, False), (math.nan, False)):
        layer, _ = door.create({**node_fields(DEFAULTS), "scale": Field(FLOAT64, np.float64(value).tobytes(), 1)})
        assert (layer is not None) == taken
        if layer is not None:
            layer.close()


def test_strings_with_or_without_terminator(door):
    for text in (b"dense", b"dense\0", b"dense\0\0"):
        layer, sentence = door.create({**node_fields(DEFAULTS), "policy": Field(CHAR, text, len(text))})
        assert layer is not None, sentence
        assert "policy='dense' " in layer.timing_cache_id()
        layer.close()


def test_what_is_not_of_the_contract_is_refused(door):
    good = node_fields(DEFAULTS)
    assert "'top_k' is not an attribute" in _refused(door, {**good, "top_k": to_field(4)})
    assert "plugin_version is '2'" in _refused(door, {**good, "plugin_version": to_field("2")})
    assert "plugin_namespace is 'acme'" in _refused(door, {**good, "plugin_namespace": to_field("acme")})
    assert "sink is given twice" in _refused(door, [*good.items(), ("sink", to_field(1))])
    assert "certificate is 2" in _refused(door, {**good, "certificate": to_field(2)})
    layer, sentence = door.create({**good, "plugin_version": to_field("1"), "plugin_namespace": to_field("")})
    assert layer is not None, sentence
    layer.close()


def test_random_fields_never_crash(door):
    rng = np.random.default_rng(0)
    names = [a.name for a in FIELDS] + ["certificate", "library_version", "plugin_version", "", "\x7f" * 300]
    for _ in range(500):
        fields = dict(node_fields(DEFAULTS))
        for name in rng.choice(names, rng.integers(1, 4)):
            size = int(rng.integers(0, 40))
            fields[str(name)] = Field(int(rng.integers(-2, 16)), rng.bytes(max(size, 1)) if rng.random() < 0.9 else None, size // 8)
        layer, sentence = door.create(fields)
        assert (layer is None) == bool(sentence)
        if layer is not None:
            layer.close()


def test_an_engine_of_another_library_version_is_refused(door):
    other = {**node_fields(DEFAULTS), "library_version": to_field("0.0.9")}
    assert "built with version '0.0.9' of this library" in _refused(door, other, phase=RUNTIME)
    same = {**node_fields(DEFAULTS), "library_version": to_field(plugin_build.version())}
    layer, sentence = door.create(same, phase=RUNTIME)
    assert layer is not None, sentence
    layer.close()


def test_the_timing_cache_id_tells_every_attribute_apart(door):
    changes = {
        "scale": 0.25, "softcap": 50.0, "policy": "tile", "alpha": 0.9, "alpha_slash": 0.5, "max_density": 0.5, "stride": 8, "sample_rows": 32, "value_weight": 0,
        "segment": 1024, "sample_ratio": 0.1, "window_ratio": 0.5, "block_q": 64, "block_k": 128, "window": 1, "sink": 0, "dense_rows": 0,
        "min_length": 0,
    }  # fmt: skip
    assert set(changes) == {a.name for a in FIELDS} - {"is_causal"}  # which has one value
    fields = [node_fields({**DEFAULTS, **{name: value}}) for name, value in [("softcap", 0.0), *changes.items()]]
    # The next number is another number, and so is a second head.
    fields.append(node_fields({**DEFAULTS, "alpha": float(np.nextafter(np.float32(0.75), np.float32(1)))}))
    fields.append(node_fields({**DEFAULTS, "alpha": [0.75, 0.75]}))
    fields.append({**node_fields(DEFAULTS), "certificate": to_field(1)})
    ids = set()
    for f in fields:
        layer, sentence = door.create(f)
        assert layer is not None, sentence
        ids.add(layer.timing_cache_id())
        layer.close()
    assert len(ids) == len(fields)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm: exported symbols were not looked at")
def test_the_library_exports_two_functions_and_needs_no_tensorrt(plugin_library):
    symbols = subprocess.run(["nm", "-D", "--defined-only", plugin_library], check=True, capture_output=True, text=True).stdout
    assert sorted(line.split()[-1] for line in symbols.splitlines()) == ["getCreators", "setLoggerFinder"]
    needed = subprocess.run(["readelf", "-d", plugin_library], check=True, capture_output=True, text=True).stdout
    assert "NODELETE" in needed
    for name in ("nvinfer", "tensorrt", "cuda"):
        assert name not in "\n".join(line for line in needed.splitlines() if "NEEDED" in line)
