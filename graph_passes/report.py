"""What was found in a model and what was done with it, as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph_passes.op import Policy
from graph_passes.site import AttentionSite, DeclinedSite

__all__ = ["InspectReport", "RewriteReport"]


@dataclass(frozen=True)
class InspectReport:
    """Every attention of a model: what can be rewritten, and what cannot and why.

    Attributes:
        model: the file.
        opset: version of its standard operators.
        nodes: number of nodes of its graph.
        sites: attentions that can be rewritten, in graph order.
        declined: the other candidates, in graph order.
        remark: why none of the sites can be rewritten all the same; usually "".
    """

    model: Path
    opset: int
    nodes: int
    sites: tuple[AttentionSite, ...]
    declined: tuple[DeclinedSite, ...]
    remark: str = ""

    @property
    def ok(self) -> bool:
        """There is something to rewrite."""
        return bool(self.sites)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "opset": self.opset,
            "nodes": self.nodes,
            "sites": [s.as_dict() for s in self.sites],
            "declined": [d.as_dict() for d in self.declined],
            "remark": self.remark,
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self, *, explain: bool = False) -> str:
        """A table of the sites and a line for each declined candidate.

        Args:
            explain: also what was proved, and which nodes each site stands for.
        """
        found = f"{_count(len(self.sites), 'site')} can be rewritten, {len(self.declined)} declined"
        lines = [f"{self.model.name}: {found} (opset {self.opset}, {self.nodes} nodes)"]
        lines += _site_table([(s, "") for s in self.sites])
        if explain:
            for s in self.sites:
                lines += ["", f"{s.id}:", *(f"  {e}" for e in s.evidence)]
                lines += textwrap.wrap("stands for: " + ", ".join(s.consumed), 110, initial_indent="  ", subsequent_indent="    ")
        remark = ["", f"  rewrite refuses: {self.remark}"] if self.remark else []
        return "\n".join(lines + _declined_lines(self.declined) + remark) + "\n"


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite did.

    Attributes:
        inspection: what was found in the original.
        policies: policy of each rewritten site, by id.
        skipped: ids of sites that the configuration leaves as they are.
        output: the new model; None when nothing was written.
        weights: external files that the new model reads, relative to its folder.
        nodes_before, nodes_after: number of nodes of the graph.
        opset_after: of the new model, 0 when nothing was written.
    """

    inspection: InspectReport
    policies: dict[str, Policy] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    output: Path | None = None
    weights: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    opset_after: int = 0

    @property
    def rewritten(self) -> int:
        return len(self.policies)

    @property
    def ok(self) -> bool:
        """At least one site was rewritten."""
        return bool(self.policies)

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for s in self.inspection.sites:
            policy = self.policies.get(s.id)
            rows.append({**s.as_dict(), "status": "rewritten" if policy else "skipped", "settings": policy.as_dict() if policy else None})
        rows += [{**d.as_dict(), "status": "declined"} for d in self.inspection.declined]
        return {
            "model": str(self.inspection.model),
            "output": None if self.output is None else str(self.output),
            "weights": list(self.weights),
            "opset": self.inspection.opset,
            "opset_after": self.opset_after,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "rewritten": self.rewritten,
            "sites": rows,
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def as_text(self) -> str:
        """A table of the sites and a line for each declined candidate."""
        found = len(self.inspection.sites) + len(self.inspection.declined)
        lines = [f"{self.inspection.model.name}: {self.rewritten} of {_count(found, 'attention site')} rewritten"]
        if not self.ok:
            lines[0] += "; nothing was changed"
        lines += _site_table([(s, _settings(self.policies.get(s.id))) for s in self.inspection.sites])
        lines += _declined_lines(self.inspection.declined)
        if self.output is not None:
            raised = f"; opset {self.inspection.opset} raised to {self.opset_after}" if self.opset_after != self.inspection.opset else ""
            lines += [
                "",
                f"{self.output} ({self.nodes_before} -> {self.nodes_after} nodes{raised}"
                + (f"; weights in {', '.join(self.weights)})" if self.weights else ")"),
            ]
        return "\n".join(lines) + "\n"


def _settings(policy: Policy | None) -> str:
    if policy is None:
        return "skipped"
    if policy.policy == "dense":
        return "dense"
    low, high = min(policy.alpha), max(policy.alpha)
    budget = f", max_density {policy.max_density:g}" if policy.max_density < 1 else ""
    return f"{policy.policy} alpha {low:g}" + (f"..{high:g}" if high != low else "") + budget


def _site_table(rows: Sequence[tuple[AttentionSite, str]]) -> list[str]:
    if not rows:
        return []
    head = ["site", "heads q/kv", "size", "scale", "mask", "found as", "node"]
    cells = [
        [
            s.id,
            f"{s.heads}/{s.kv_heads}",
            f"{s.head_size}" + (f"/{s.value_size}" if s.value_size != s.head_size else ""),
            f"{s.scale:.6g}",
            s.mask.kind,
            s.pattern,
            s.node,
        ]
        + ([extra] if extra else [])
        for s, extra in rows
    ]
    if any(extra for _, extra in rows):
        head.append("setting")
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    return ["", *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *cells])]


def _declined_lines(declined: Sequence[DeclinedSite]) -> list[str]:
    """One paragraph for candidates of the same pattern that are declined for the same reason."""
    groups: dict[tuple[str, str], list[DeclinedSite]] = {}
    for d in declined:
        groups.setdefault((d.pattern, d.reason), []).append(d)
    lines: list[str] = [""] if declined else []
    for (pattern, reason), same in groups.items():
        ids = ", ".join(d.id for d in same[:8]) + (f" and {len(same) - 8} more" if len(same) > 8 else "")
        lines.append(f"  declined {ids} ({pattern}): {reason}")
        stopped = list(dict.fromkeys(d.stopped_by for d in same if d.stopped_by))
        if stopped:
            lines.append(f"    stopped by {', '.join(stopped[:4])}" + (f" and {len(stopped) - 4} more" if len(stopped) > 4 else ""))
    return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
