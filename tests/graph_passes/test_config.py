"""attention.yaml: what is written reads back, and what cannot be meant is refused with the line and the cure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from graph_passes.config import Config, load_config, write_config
from graph_passes.errors import GraphError
from graph_passes.op import Policy
from graph_passes.site import AttentionSite, DeclinedSite, Mask, Operand


def site(i: int, heads: int = 4) -> AttentionSite:
    operand = Operand("t", heads)
    return AttentionSite(
        f"layers.{i}", f"softmax_{i}", "softmax core", operand, operand, operand, "o", Mask(), heads, 2, 16, 16, 0.25, 0.0, 20
    )


SITES = [site(0), site(1), site(2)]
DECLINED = [DeclinedSite("layers.3", "softmax_3", "softmax core", "its mask is a sliding window of 8 keys.", "Greater node")]


def read(text: str, folder: Path) -> Config:
    path = folder / "attention.yaml"
    path.write_text(text)
    return load_config(path)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    defaults = Policy(alpha=(0.95,), max_density=0.3, sample_ratio=1e-7, window=32)
    overrides = {"layers.0": {"policy": "dense"}, "layers.1": {"alpha": [0.8, 0.9, 1.0, 0.85]}, "layers.2": {"skip": True}}
    path = write_config(tmp_path / "attention.yaml", SITES, defaults, declined=DECLINED, overrides=overrides)
    config = load_config(path)
    assert config.defaults == defaults
    assert config.policies(SITES, DECLINED) == {
        "layers.0": defaults.replace(policy="dense"),
        "layers.1": defaults.replace(alpha=(0.8, 0.9, 1.0, 0.85)),
    }
    text = path.read_text()
    assert "# layers.3 is declined: its mask is a sliding window of 8 keys." in text
    for name in Policy().as_dict():
        assert f"  {name}: " in text


def test_defaults_alone_serve_every_site(tmp_path: Path) -> None:
    config = read("version: 1\ndefaults: {policy: tile, alpha: 0.8}\n", tmp_path)
    assert config.policies(SITES) == {s.id: Policy(policy="tile", alpha=(0.8,)) for s in SITES}
    assert read("version: 1\n", tmp_path).policies(SITES) == {s.id: Policy() for s in SITES}


def test_a_site_overrides_defaults(tmp_path: Path) -> None:
    config = read("version: 1\ndefaults: {alpha: 0.8}\nsites:\n  - {id: layers.1, alpha: 0.99, heads: 4, scale: 0.25}\n", tmp_path)
    assert config.policies(SITES)["layers.1"].alpha == (0.99,)
    assert config.policies(SITES)["layers.0"].alpha == (0.8,)


def test_no_site_at_all(tmp_path: Path) -> None:
    path = write_config(tmp_path / "attention.yaml", [], declined=DECLINED)
    assert load_config(path).policies([], DECLINED) == {}


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "attention.yaml"
    path.write_text("mine")
    with pytest.raises(GraphError, match="exists; choose another name, or pass --force"):
        write_config(path, SITES)
    assert path.read_text() == "mine"
    write_config(path, SITES, force=True)
    assert load_config(path).policies(SITES)


HEAD = "version: 1\n"
WRONG = {
    "unknown key at the top": (
        "version: 1\nsite: []\n",
        "line 2: the file has an unknown key 'site' (did you mean 'sites'?); allowed are version, defaults, sites.",
    ),
    "unknown key in defaults": (HEAD + "defaults:\n  alfa: 0.9\n", "line 3: defaults has an unknown key 'alfa' (did you mean 'alpha'?)"),
    "unknown key in a site": (
        HEAD + "sites:\n  - id: layers.0\n    polcy: dense\n",
        "line 4: an entry of sites has an unknown key 'polcy' (did you mean 'policy'?)",
    ),
    "wrong type": (HEAD + "defaults:\n  block_q: big\n", "line 3, defaults: block_q is 'big'; allowed is one of 16, 32, 64, 128, 256."),
    "a bool is no number": (HEAD + "defaults:\n  alpha: true\n", "line 3, defaults: alpha is True; allowed is"),
    "alpha of 0": (
        HEAD + "defaults:\n  alpha: 0\n",
        "line 3, defaults: alpha is 0; allowed is one number, or one a query head, each in (0, 1].",
    ),
    "alpha above 1": (HEAD + "sites:\n  - id: layers.0\n    heads: 4\n    alpha: 1.5\n", "line 5, layers.0: alpha is 1.5; allowed is"),
    "alpha is no number": (HEAD + "defaults:\n  alpha: .nan\n", "line 3, defaults: alpha is nan; allowed is"),
    "one alpha of a list": (HEAD + "defaults:\n  alpha: [0.5, 2]\n", "alpha is [0.5, 2]; allowed is"),
    "unknown policy": (
        HEAD + "sites: [{id: layers.0, policy: fast}]\n",
        "line 2, layers.0: policy is 'fast'; allowed is one of residue, tile",
    ),
    "values that do not fit each other": (
        HEAD + "defaults:\n  stride: 48\n  policy: residue\n",
        "line 3, defaults: stride is '48 with block_q 128 and block_k 64'",
    ),
    "override that does not fit the defaults": (
        HEAD + "defaults: {policy: residue, stride: 64}\nsites:\n  - id: layers.0\n    block_k: 32\n",
        "layers.0: stride is '64 with block_q 128 and block_k 32'",
    ),
    "a budget that the policy of a site does not take": (
        HEAD + "defaults: {max_density: 0.3}\nsites:\n  - id: layers.0\n    policy: stripe_window\n",
        "line 4, layers.0: max_density is '0.3 with policy stripe_window'; allowed is a number in (0, 1] (column_slash, stripe_window: 1).",
    ),
    "no version": ("defaults: {}\n", "`version` is missing; write `version: 1`."),
    "another version": ("version: 2\n", "line 1: version is 2; this program reads version 1."),
    "version as text": ("version: '1'\n", "version is '1'; this program reads version 1."),
    "version as bool": ("version: true\n", "version is True"),
    "empty": ("", "is empty; it needs `version: 1`."),
    "a list": ("- 1\n", "line 1: the file is a list; allowed is a mapping"),
    "sites as a mapping": (HEAD + "sites:\n  layers.0: {}\n", "sites is a mapping; allowed is a list of entries"),
    "a site as text": (HEAD + "sites: [layers.0]\n", "an entry of sites is the value 'layers.0'; allowed is a mapping"),
    "a site without id": (HEAD + "sites:\n  - policy: dense\n", "line 3: this entry of sites has no `id`"),
    "id as a number": (HEAD + "sites: [{id: 0}]\n", "id is 0; allowed is text like layers.0."),
    "a site twice": (HEAD + "sites:\n  - id: layers.0\n  - id: layers.0\n", "line 4: layers.0 is listed twice (first on line 3)"),
    "a key twice": (HEAD + "defaults:\n  alpha: 0.9\n  alpha: 0.8\n", "line 4: the key 'alpha' stands twice (first on line 3)"),
    "skip as text": (HEAD + "sites: [{id: layers.0, skip: maybe}]\n", "skip is 'maybe'; allowed is true or false."),
    "skip and an override": (
        HEAD + "sites: [{id: layers.0, skip: true, alpha: 0.5}]\n",
        "`skip: true` and alpha, which would have no effect",
    ),
    "a mapping for a value": (HEAD + "defaults: {alpha: {a: 1}}\n", "a mapping stands where a value is needed."),
    "no YAML": (HEAD + "defaults: [\n", "this is not YAML"),
    "a value that YAML cannot make": (HEAD + "defaults: {window: 2024-13-45}\n", "'2024-13-45' cannot be read"),
    "a key that is a list": (HEAD + "? [a]\n: 1\n", "unknown key None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name: str, tmp_path: Path) -> None:
    text, sentence = WRONG[name]
    with pytest.raises(GraphError) as error:
        read(text, tmp_path)
    message = str(error.value)
    assert message.startswith("attention.yaml")
    assert sentence in message
    assert "\n" not in message


WRONG_FOR_THE_GRAPH = {
    "unknown site": ("sites: [{id: layer.1}]", "line 2, layer.1: the graph has no site 'layer.1' (did you mean 'layers.1'?)"),
    "a fact that is not so": (
        "sites:\n  - id: layers.1\n    heads: 8\n",
        "line 4, layers.1: heads is 8, but the graph has 4 there; this file belongs to another model",
    ),
    "a fact of the wrong type": ("sites:\n  - id: layers.1\n    scale: high\n", "scale is 'high', but the graph has 0.25 there"),
    "too many alphas": (
        "sites:\n  - id: layers.1\n    alpha: [0.5, 0.6]\n",
        "line 4, layers.1: alpha has 2 values, but the site has 4 query heads; give one value or 4.",
    ),
    "alphas of the defaults": ("defaults: {alpha: [0.5, 0.6]}", "alpha has 2 values, but the site has 4 query heads"),
    "a declined site": (
        "sites:\n  - id: layers.3\n    alpha: 0.9\n",
        "line 3, layers.3: layers.3 cannot be rewritten (its mask is a sliding window of 8 keys); remove the entry",
    ),
}


@pytest.mark.parametrize("name", WRONG_FOR_THE_GRAPH)
def test_wrong_for_the_graph(name: str, tmp_path: Path) -> None:
    text, sentence = WRONG_FOR_THE_GRAPH[name]
    config = read(HEAD + text, tmp_path)
    with pytest.raises(GraphError) as error:
        config.policies(SITES, DECLINED)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")
    assert not str(error.value).endswith("..")


def test_a_declined_site_may_be_skipped(tmp_path: Path) -> None:
    assert len(read(HEAD + "sites: [{id: layers.3, skip: true}]", tmp_path).policies(SITES, DECLINED)) == 3


@pytest.mark.parametrize("what", ["missing", "folder", "binary"])
def test_unreadable(what: str, tmp_path: Path) -> None:
    path = tmp_path / "attention.yaml"
    if what == "folder":
        path.mkdir()
    elif what == "binary":
        path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(GraphError, match=r"attention\.yaml cannot be read \("):
        load_config(path)


def test_unknown_override_when_writing(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"'layers\.9', which is no site"):
        write_config(tmp_path / "a.yaml", SITES, overrides={"layers.9": {"skip": True}})
    assert list(tmp_path.iterdir()) == []


def test_mutated_files_give_a_sentence_or_a_config(tmp_path: Path) -> None:
    """Seeded mutations of a real file: never anything but a GraphError of one line."""
    original = write_config(tmp_path / "real.yaml", SITES, declined=DECLINED).read_text()
    generator = random.Random(0)
    accepted, messages = 0, []
    for _ in range(300):
        text = list(original)
        for _ in range(generator.randint(1, 4)):
            i = generator.randrange(len(text))
            text[i : i + generator.randint(0, 6)] = generator.choice(
                ["", " ", "\n", ":", "-", "[", "}", "'", "0", "nan", "\t", "&a", "*a", "!!int", "# ", "é", "\x00"]
            )
        try:
            policies = read("".join(text), tmp_path).policies(SITES, DECLINED)
        except GraphError as error:
            messages.append(str(error))
        else:
            accepted += 1
            assert set(policies) <= {s.id for s in SITES}
            assert all(0 < a <= 1 for p in policies.values() for a in p.alpha)
    assert 0 < accepted < 300
    assert not [m for m in messages if "\n" in m]
