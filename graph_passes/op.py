"""The `SampleAttention` operator contract: its name, inputs, attributes, and what values they may take.

This is the one place that states the contract. The ONNX function bodies, the NumPy reference, the TensorRT plugin and the
ONNX Runtime kernel are checked against it. The meaning of each attribute is specified in `docs/op.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from graph_passes.errors import GraphError

__all__ = [
    "ATTRIBUTES",
    "DECODE_MAX_ROWS",
    "DOMAIN",
    "INPUTS",
    "OP_TYPE",
    "OUTPUTS",
    "POLICIES",
    "VERSION",
    "Attribute",
    "Policy",
    "node_attributes",
    "policy_from_attributes",
    "variant",
]

DOMAIN = "sample_attention"
OP_TYPE = "SampleAttention"
VERSION = 1
INPUTS = ("query", "key", "value", "key_mask")
OUTPUTS = ("output", "certificate")
POLICIES = ("residue", "tile", "column_slash", "stripe_window", "dense")

DECODE_MAX_ROWS = 16
"""Calls of at most this many query rows (decode, speculative steps) are full attention: there is nothing to skip that pays."""

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_INT32_MAX = 2**31 - 1  # NVIDIA's ONNX parser narrows INT attributes to 32 bits without a word


@dataclass(frozen=True)
class Attribute:
    """One attribute of the node: its ONNX attribute type and the sentence that says what is allowed."""

    name: str
    onnx_type: str  # FLOAT, FLOATS, INT, STRING
    allowed: str


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("scale", "FLOAT", "a finite number > 0"),
    Attribute("softcap", "FLOAT", "a finite number >= 0 (0 = no soft-cap)"),
    Attribute("is_causal", "INT", "1"),
    Attribute("policy", "STRING", "one of " + ", ".join(POLICIES)),
    Attribute("alpha", "FLOATS", "one number, or one a query head, each in (0, 1]"),
    Attribute("alpha_slash", "FLOATS", "one number, or one a query head, each in (0, 1]"),
    Attribute("max_density", "FLOAT", "a number in (0, 1] (column_slash, stripe_window: 1)"),
    Attribute("stride", "INT", "an integer >= 1 that divides block_q and block_k"),
    Attribute("sample_rows", "INT", "an integer >= 1 (tile: divides block_q; column_slash: at most segment)"),
    Attribute("value_weight", "INT", "0 or 1"),
    Attribute("segment", "INT", "an integer >= 1"),
    Attribute("sample_ratio", "FLOAT", "a number in (0, 1]"),
    Attribute("window_ratio", "FLOAT", "a number in [0, 1]"),
    Attribute("block_q", "INT", "one of " + ", ".join(map(str, _BLOCK_SIZES))),
    Attribute("block_k", "INT", "one of " + ", ".join(map(str, _BLOCK_SIZES))),
    Attribute("window", "INT", "an integer >= 0 (tokens)"),
    Attribute("sink", "INT", "an integer >= 0 (tokens)"),
    Attribute("dense_rows", "INT", "an integer >= 0 (tokens)"),
    Attribute("min_length", "INT", "an integer >= 0 (tokens)"),
    Attribute("plugin_version", "STRING", "'1'"),
    Attribute("plugin_namespace", "STRING", "''"),
)


@dataclass(frozen=True)
class Policy:
    """How one attention site selects its key blocks. Fields are the attributes of the same names in `docs/op.md`.

    `alpha` and `alpha_slash` hold one value, or one a query head. A value of the wrong type or outside its range raises
    `GraphError` with one sentence.
    """

    policy: str = "residue"
    alpha: tuple[float, ...] = (0.75,)
    alpha_slash: tuple[float, ...] = (0.95,)
    max_density: float = 1.0
    stride: int = 16
    sample_rows: int = 64
    value_weight: int = 1
    segment: int = 2048
    sample_ratio: float = 0.05
    window_ratio: float = 0.08
    block_q: int = 128
    block_k: int = 64
    window: int = 0
    sink: int = 64
    dense_rows: int = 768
    min_length: int = 4096

    _where: str = field(default="", repr=False, compare=False)
    """Prefix of error sentences: the file and entry that the values come from."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name == "_where":
                continue
            value = getattr(self, f.name)
            if f.name in ("alpha", "alpha_slash"):
                object.__setattr__(self, f.name, self._alphas(f.name, value))
            elif f.name == "policy":
                if value not in POLICIES:
                    self._refuse("policy", value)
            elif f.name in ("max_density", "sample_ratio", "window_ratio"):
                number = self._number(f.name, value)
                low_ok = number >= 0 if f.name == "window_ratio" else number > 0
                if not (low_ok and number <= 1):
                    self._refuse(f.name, value)
                object.__setattr__(self, f.name, number)
            else:
                self._integer(f.name, value)
        if self.value_weight > 1:
            self._refuse("value_weight", self.value_weight)
        for name in ("block_q", "block_k"):
            if getattr(self, name) not in _BLOCK_SIZES:
                self._refuse(name, getattr(self, name))
        for name in ("stride", "sample_rows", "segment"):
            if getattr(self, name) < 1:
                self._refuse(name, getattr(self, name))
        # Constraints between attributes bind only the policy that reads them; the others carry their defaults.
        if self.policy == "residue" and (self.block_q % self.stride or self.block_k % self.stride):
            self._refuse("stride", f"{self.stride} with block_q {self.block_q} and block_k {self.block_k}")
        if self.policy == "tile" and self.block_q % self.sample_rows:
            self._refuse("sample_rows", f"{self.sample_rows} with block_q {self.block_q}")
        if self.policy == "column_slash" and self.sample_rows > self.segment:
            self._refuse("sample_rows", f"{self.sample_rows} with segment {self.segment}")
        # They select for whole heads: there is no order of a tile's blocks that a budget could cut off.
        if self.policy in ("column_slash", "stripe_window") and self.max_density < 1:
            self._refuse("max_density", f"{self.max_density} with policy {self.policy}")

    def for_heads(self, heads: int) -> Policy:
        """The same policy after checking that per-head values fit `heads` query heads."""
        for name in ("alpha", "alpha_slash"):
            count = len(getattr(self, name))
            if count not in (1, heads):
                raise GraphError(
                    f"{self._where}{name} has {count} values, but the site has {heads} query heads; give one value or {heads}."
                )
        return self

    def replace(self, **changes: Any) -> Policy:
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields; a single alpha is a number, several are a list."""
        out: dict[str, Any] = {}
        for f in fields(self):
            if f.name == "_where":
                continue
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                value = value[0] if len(value) == 1 else list(value)
            out[f.name] = value
        return out

    def _refuse(self, name: str, got: object) -> None:
        allowed = next(a.allowed for a in ATTRIBUTES if a.name == name)
        raise GraphError(f"{self._where}{name} is {got!r}; allowed is {allowed}.")

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self._refuse(name, value)
        return float(value)  # type: ignore[arg-type]

    def _integer(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INT32_MAX:
            self._refuse(name, value)

    def _alphas(self, name: str, value: object) -> tuple[float, ...]:
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not values:
            self._refuse(name, value)
        out = tuple(self._number(name, v) for v in values)
        if not all(0 < v <= 1 for v in out):
            self._refuse(name, value)
        return out


def node_attributes(policy: Policy, *, scale: float, softcap: float = 0.0) -> dict[str, Any]:
    """All attributes of a node, complete (a reader must not rely on defaults).

    Args:
        policy: how blocks are selected.
        scale: factor of the scores, applied before the soft-cap.
        softcap: 0, or the cap c of `c * tanh(score / c)`.

    Raises:
        GraphError: `scale` or `softcap` is out of range.
    """
    for name, value, ok in (("scale", scale, scale > 0), ("softcap", softcap, softcap >= 0)):
        if not (math.isfinite(value) and ok):
            raise GraphError(f"{name} is {value!r}; allowed is {next(a.allowed for a in ATTRIBUTES if a.name == name)}.")
    values: dict[str, Any] = {"scale": float(scale), "softcap": float(softcap), "is_causal": 1}
    for f in fields(policy):
        if f.name != "_where":
            value = getattr(policy, f.name)
            values[f.name] = list(value) if isinstance(value, tuple) else value
    values["plugin_version"] = "1"
    values["plugin_namespace"] = ""
    return values


def policy_from_attributes(attributes: Mapping[str, Any]) -> Policy:
    """The policy that a node carries; the inverse of `node_attributes` (bytes are decoded)."""
    values: dict[str, Any] = {}
    for f in fields(Policy):
        if f.name == "_where" or f.name not in attributes:
            continue
        value = attributes[f.name]
        values[f.name] = value.decode() if isinstance(value, bytes) else value
    # ONNX stores FLOAT in 32 bits: 0.9 comes back as 0.8999999761581421.
    for name in ("max_density", "sample_ratio", "window_ratio"):
        if name in values:
            values[name] = _shortest_float32(values[name])
    for name in ("alpha", "alpha_slash"):
        if name in values:
            values[name] = tuple(_shortest_float32(v) for v in values[name])
    return Policy(**values)


def variant(policy: str, *, has_mask: bool, softcap: float = 0.0, certificate: bool = False) -> str:
    """Name of the function body that a node needs: `<policy>[.mask][.softcap][.certificate]` (the ONNX `overload`)."""
    parts = [policy]
    parts += ["mask"] if has_mask else []
    parts += ["softcap"] if softcap > 0 else []
    parts += ["certificate"] if certificate else []
    return ".".join(parts)


def _shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    import numpy as np

    return float(str(np.float32(value)))
