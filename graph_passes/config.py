"""`attention.yaml`: which policy each attention site gets. Written by `inspect`, refined by tuning, edited by people.

```yaml
version: 1
defaults:            # for every site; the fields of `graph_passes.op.Policy`
  policy: residue
  alpha: 0.9
sites:
  - id: layers.0
    heads: 32        # facts of the graph: may be left out, must be true when given
    alpha: 0.95      # overrides a default for this site
  - id: layers.1
    policy: dense    # the new node, full attention
  - id: layers.2
    skip: true       # the graph stays as it is here
```
Anything else is refused with the line, what was got and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from graph_passes.errors import GraphError
from graph_passes.op import ATTRIBUTES, Policy
from graph_passes.site import AttentionSite, DeclinedSite

__all__ = ["VERSION", "Config", "Entry", "load_config", "write_config"]

VERSION = 1

_POLICY_KEYS = tuple(f.name for f in fields(Policy) if not f.name.startswith("_"))
_FACTS = ("node", "heads", "kv_heads", "head_size", "value_size", "mask", "scale")
_ENTRY_KEYS = ("id", "skip", *_FACTS, *_POLICY_KEYS)


@dataclass(frozen=True)
class Entry:
    """One item of `sites`."""

    id: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    skip: bool = False
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Line of each key, and of the entry under ""."""


@dataclass(frozen=True)
class Config:
    """What `attention.yaml` says."""

    defaults: Policy = field(default_factory=Policy)
    entries: tuple[Entry, ...] = ()
    source: str = "attention.yaml"

    def policies(self, sites: Sequence[AttentionSite], declined: Sequence[DeclinedSite] = ()) -> dict[str, Policy]:
        """The policy of each site that is to be rewritten, by id; a skipped site has none.

        Raises:
            GraphError: an entry names no site, states a fact that is not so, gives a value that does not fit the site, or asks
                something of a site that is declined.
        """
        entries = {e.id: e for e in self.entries}
        known = {s.id for s in sites}
        reasons = {d.id: d.reason for d in declined}
        for entry in self.entries:
            if entry.id in reasons and (entry.overrides or not entry.skip):
                self._fail(
                    entry, "", f"{entry.id} cannot be rewritten ({reasons[entry.id].rstrip('.')}); remove the entry or give it `skip: true`"
                )
            if entry.id not in known and entry.id not in reasons:
                self._fail(
                    entry,
                    "id",
                    f"the graph has no site {entry.id!r}{_nearest(entry.id, (*known, *reasons))}; `sa-export inspect` lists them",
                )
        out: dict[str, Policy] = {}
        for site in sites:
            entry = entries.get(site.id, Entry(site.id))
            self._check_facts(entry, site)
            if not entry.skip:
                out[site.id] = self._policy(entry, site)
        return out

    def _check_facts(self, entry: Entry, site: AttentionSite) -> None:
        truth = {**site.as_dict(), "mask": site.mask.kind}
        for name, stated in entry.facts.items():
            actual = truth[name]
            same = abs(stated - actual) <= 1e-6 * abs(actual) if name == "scale" and isinstance(stated, (int, float)) else stated == actual
            if not same:
                self._fail(
                    entry,
                    name,
                    f"{name} is {stated!r}, but the graph has {actual!r} there; this file belongs to another model, inspect this one",
                )

    def _policy(self, entry: Entry, site: AttentionSite) -> Policy:
        try:
            return self.defaults.replace(**entry.overrides).for_heads(site.heads)
        except GraphError as error:
            self._fail(entry, str(error).split()[0], str(error).rstrip("."))

    def _fail(self, entry: Entry, key: str, sentence: str) -> NoReturn:
        line = entry.lines.get(key, entry.lines.get(""))
        where = self.source if line is None else f"{self.source}, line {line}"
        raise GraphError(f"{where}, {entry.id}: {sentence}.")


def load_config(path: str | Path) -> Config:
    """Reads `attention.yaml`.

    Raises:
        GraphError: the file is missing, is no YAML, or has an unknown or repeated key, or a value of the wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise GraphError(f"{path} cannot be read ({why}); `sa-export inspect --config {path.name}` writes one.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise GraphError(f"{path.name}{line}: this is not YAML ({getattr(error, 'problem', None) or 'it cannot be parsed'}).") from None
    return _Reader(path.name).config(node)


def write_config(
    path: str | Path,
    sites: Sequence[AttentionSite],
    defaults: Policy | None = None,
    *,
    declined: Sequence[DeclinedSite] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    force: bool = False,
) -> Path:
    """Writes `attention.yaml` with one entry a site.

    Args:
        path: the file.
        sites: sites that can be rewritten.
        defaults: policy of every site.
        declined: named in comments with their reasons.
        overrides: for some site ids, values that differ from the defaults (`{"policy": "dense"}`, `{"skip": True}`).
        force: replace an existing file.

    Raises:
        GraphError: the file exists and `force` is false, or it cannot be written.
    """
    from graph_passes.model_io import write_text

    path = Path(path)
    if path.exists() and not force:
        raise GraphError(f"{path} exists; choose another name, or pass --force to replace it.")
    defaults = defaults or Policy()
    overrides = overrides or {}
    known = {s.id for s in sites}
    for unknown in sorted(set(overrides) - known):
        raise GraphError(f"overrides name {unknown!r}, which is no site of this graph{_nearest(unknown, known)}.")
    allowed = {a.name: a.allowed for a in ATTRIBUTES}
    lines = [
        "# Which keys each attention site reads. docs/op.md explains every value.",
        f"version: {VERSION}",
        "",
        "# For every site. `policy: dense` is full attention; a site may override each value below.",
        "defaults:",
    ]
    values = defaults.as_dict()
    width = max(len(f"{k}: {_scalar(v)}") for k, v in values.items())
    lines += [f"  {f'{k}: {_scalar(v)}':<{width}}  # {allowed[k]}" for k, v in values.items()]
    lines += [
        "",
        "# The facts (node to scale) are read from the graph: they may be removed, not changed. `skip: true` leaves a site as it is.",
        "sites:",
    ]
    for site in sites:
        facts = {"node": site.node, **{k: v for k, v in site.as_dict().items() if k in _FACTS and k != "node"}}
        lines.append(f"  - id: {_scalar(site.id)}")
        lines += [f"    {k}: {_scalar(facts[k])}" for k in _FACTS]
        lines += [f"    {k}: {_scalar(v)}" for k, v in overrides.get(site.id, {}).items()]
    if not sites:
        lines[-1] = "sites: []"
    lines += [f"  # {d.id} is declined: {d.reason}" + (f" ({d.stopped_by})" if d.stopped_by else "") for d in declined]
    write_text("\n".join(lines) + "\n", path)
    return path


def _scalar(value: object) -> str:
    """A value as YAML that reads back as itself."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_scalar(v) for v in value) + "]"
    if isinstance(value, float):
        text = repr(value)  # YAML 1.1 wants a point in a number with an exponent
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...").strip()


def _nearest(name: str, known: Sequence[str] | set[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _Reader:
    """Walks the YAML nodes, so that every complaint can name its line."""

    def __init__(self, source: str) -> None:
        self.source = source

    def config(self, node: yaml.Node | None) -> Config:
        if node is None:
            raise GraphError(f"{self.source} is empty; it needs `version: {VERSION}`.")
        top = self.mapping(node, "the file", ("version", "defaults", "sites"))
        if "version" not in top:
            raise GraphError(f"{self.source}: `version` is missing; write `version: {VERSION}`.")
        version = self.value(top["version"][1])
        if isinstance(version, bool) or version != VERSION:
            self.fail(top["version"][1], f"version is {version!r}; this program reads version {VERSION}")
        defaults = self.defaults(top["defaults"][1]) if "defaults" in top else Policy()
        entries: list[Entry] = []
        if "sites" in top:
            sites = top["sites"][1]
            if not isinstance(sites, yaml.SequenceNode):
                self.fail(sites, f"sites is {_kind(sites)}; allowed is a list of entries that begin with `- id: `")
            for item in sites.value:
                entry = self.entry(item, defaults)
                twin = next((e for e in entries if e.id == entry.id), None)
                if twin is not None:
                    self.fail(item, f"{entry.id} is listed twice (first on line {twin.lines['']}); keep one entry")
                entries.append(entry)
        return Config(defaults, tuple(entries), self.source)

    def defaults(self, node: yaml.Node) -> Policy:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return Policy()
        found = self.mapping(node, "defaults", _POLICY_KEYS)
        return self.policy(
            Policy(),
            {k: self.value(v) for k, (_, v) in found.items()},
            {k: key.start_mark.line + 1 for k, (key, _) in found.items()},
            "defaults",
        )

    def entry(self, node: yaml.Node, defaults: Policy) -> Entry:
        found = self.mapping(node, "an entry of sites", _ENTRY_KEYS)
        lines = {"": node.start_mark.line + 1, **{k: key.start_mark.line + 1 for k, (key, _) in found.items()}}
        if "id" not in found:
            self.fail(node, "this entry of sites has no `id`; give the id that `sa-export inspect` shows, like layers.0")
        values = {k: self.value(v) for k, (_, v) in found.items()}
        name, skip = values["id"], values.get("skip", False)
        if not isinstance(name, str):
            self.fail(found["id"][1], f"id is {name!r}; allowed is text like layers.0")
        if not isinstance(skip, bool):
            self.fail(found["skip"][1], f"skip is {skip!r}; allowed is true or false")
        overrides = {k: v for k, v in values.items() if k in _POLICY_KEYS}
        if skip and overrides:
            self.fail(
                found[next(iter(overrides))][0],
                f"{name} has `skip: true` and {next(iter(overrides))}, which would have no effect; keep one of them",
            )
        self.policy(defaults, overrides, lines, name)
        return Entry(name, overrides, {k: v for k, v in values.items() if k in _FACTS}, skip, lines)

    def policy(self, base: Policy, values: dict[str, Any], lines: Mapping[str, int], where: str) -> Policy:
        try:
            return base.replace(**values)
        except GraphError as error:
            key = str(error).split()[0]
            line = lines.get(key, lines.get("", None))
            at = f"{self.source}, line {line}" if line else self.source
            raise GraphError(f"{at}, {where}: {error}") from None

    def mapping(self, node: yaml.Node, what: str, allowed: Sequence[str]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} is {_kind(node)}; allowed is a mapping with the keys {', '.join(allowed)}")
        out: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            key: str | None = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key not in allowed:
                near = _nearest(str(key), allowed)
                self.fail(key_node, f"{what} has an unknown key {key!r}{near}; allowed are {', '.join(allowed)}")
            if key in out:
                self.fail(key_node, f"the key {key!r} stands twice (first on line {out[key][0].start_mark.line + 1}); keep one")
            out[key] = (key_node, value_node)
        return out

    def value(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            self.fail(node, "a mapping stands where a value is needed")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.fail(node, f"{node.value!r} cannot be read ({getattr(error, 'problem', None) or error})")
        finally:
            loader.dispose()

    def fail(self, node: yaml.Node, sentence: str) -> NoReturn:
        raise GraphError(f"{self.source}, line {node.start_mark.line + 1}: {sentence}.")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the value {node.value!r}"
