"""What is found in a graph: an attention site that can be rewritten, or one that is declined and why.

Letters in shapes: B batch, Hq query heads, Hkv key/value heads, S query rows, T keys, D head size of query and key, Dv head size of value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

__all__ = ["AttentionSite", "DeclinedSite", "KeyMask", "Mask", "Operand", "Refusal", "label"]


class Refusal(Exception):
    """A candidate is not rewritten: the reason in a sentence, and the node that stopped it."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Operand:
    """A tensor that the new node reads.

    Attributes:
        tensor: name in the graph.
        perm: transposition that makes it [B, H, length, head size]; None when it already is.
        heads: number of heads it holds.
    """

    tensor: str
    heads: int
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class KeyMask:
    """Where the graph keeps which keys are real.

    Attributes:
        tensor: name of a tensor of shape [B, length] or [1, length] once its `squeeze` axes of length 1 are taken out.
        squeeze: axes of length 1.
        test: how an element says that its key is real: `nonzero`, `zero`, or a comparison with `bound`: `==`, `!=`, `<=`, `>=`.
        bound: the number compared with.
        cut: the tensor may be longer than the keys; its first T entries count.
        repeat: the tensor has one row that serves the whole batch.
        boolean: the tensor's elements are bool.
        length: the number of keys T in the graph's own lengths; masks of different lengths are different masks.
    """

    tensor: str
    squeeze: tuple[int, ...] = ()
    test: str = "nonzero"
    bound: int = 0
    cut: bool = False
    repeat: bool = False
    boolean: bool = False
    length: str = ""


@dataclass(frozen=True)
class Mask:
    """The mask of a site, proved: causal (key j <= T - S + row), and padding when `keys` is set."""

    keys: KeyMask | None = None

    @property
    def kind(self) -> str:
        return "causal" if self.keys is None else "causal+padding"


@dataclass(frozen=True)
class AttentionSite:
    """An attention that is full causal attention (with padding) and can be one `SampleAttention` node.

    Attributes:
        id: `layers.N`, N counting the attention cores of the graph in order.
        node: name of the node that the site was found from.
        pattern: the shape family that it was found as.
        query, key, value: what the new node reads.
        output: name of the tensor that the new node makes, [B, Hq, S, Dv] unless `lead` says otherwise.
        mask: what was proved about the mask.
        heads, kv_heads, head_size, value_size: Hq, Hkv, D, Dv.
        scale: factor of the scores before softmax, all factors of the graph multiplied.
        softcap: 0, or the cap c of `c * tanh(score / c)`.
        opset: version of the standard operators of the graph.
        consumed: names of the nodes that the new node stands for.
        between: names of the tensors between what the new node reads and what it makes.
        evidence: what was proved, in sentences.
        lead: where the output holds batch and heads in other axes than two: their lengths as a Reshape takes them.
        cast: ONNX element type of the output, where it is wider than that of the queries, keys and values.
        attributes: for a node that is `SampleAttention` already, what it carries.
    """

    id: str
    node: str
    pattern: str
    query: Operand
    key: Operand
    value: Operand
    output: str
    mask: Mask
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    softcap: float
    opset: int
    consumed: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    lead: tuple[int, ...] = ()
    cast: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for reports."""
        return {
            "id": self.id,
            "node": self.node,
            "pattern": self.pattern,
            "query": self.query.tensor,
            "key": self.key.tensor,
            "value": self.value.tensor,
            "output": self.output,
            "mask": self.mask.kind,
            "key_mask": None if self.mask.keys is None else self.mask.keys.tensor,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "value_size": self.value_size,
            "scale": self.scale,
            "softcap": self.softcap,
            "opset": self.opset,
            "consumed": list(self.consumed),
            "evidence": list(self.evidence),
        }


@dataclass(frozen=True)
class DeclinedSite:
    """A candidate that is left as it is, with the reason and the node that stopped it."""

    id: str
    node: str
    pattern: str
    reason: str
    stopped_by: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "node": self.node, "pattern": self.pattern, "reason": self.reason, "stopped_by": self.stopped_by}


def label(node: gs.Node | None) -> str:
    """A name for a node in reports: its operator and name, or its first output when it has no name."""
    if node is None:
        return ""
    stands_for: str = getattr(node, "stands_for", "")  # set on the parts of an operator that was taken apart
    return stands_for or f"{node.op} {node.name or '-> ' + (node.outputs[0].name if node.outputs else '?')}"
