"""What a check measured: plain values that go to `check.json`, and arrays for pictures that go to `check.npz`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sa_export.errors import UserError

__all__ = ["Candidate", "CheckResult", "ExactCase", "Gate", "HeadMap", "LengthResult", "SiteResult", "load_result"]

SCHEMA = 1


@dataclass(frozen=True)
class Gate:
    """One threshold: `value` must be `<=` or `>=` (`sense`) `limit`."""

    name: str
    value: float
    sense: str
    limit: float

    @property
    def ok(self) -> bool:
        # A NaN fails both ways: a figure that could not be measured is not a pass.
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit


@dataclass(frozen=True)
class ExactCase:
    """The rewritten graph at alpha = 1 against the original: it must be the same function.

    `relative` is the largest difference over the largest magnitude of the original's logits, attended positions only.
    """

    name: str  # prefill, chunked prefill, decode, left padding, right padding
    max_abs: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class SiteResult:
    """One attention site at one length; lists have one value a query head.

    Attributes:
        density: kept pairs / causal pairs, mean over all prompts.
        cra_mean, cra_min: retained probability over all rows of the probed prompts (mean; worst row).
        output_error: |sparse - full| / |full| of the site's output, both from the rewritten model's own query, key and value.
        drift: the same norm between the rewritten model and the original at this depth (errors of earlier layers included).
    """

    id: str
    policy: str
    density: list[float]
    cra_mean: list[float]
    cra_min: list[float]
    output_error: float
    drift: float


@dataclass(frozen=True)
class LengthResult:
    """One candidate at one prompt length.

    `loss` is the mean cross-entropy (nats a token) of ordinary text in the last half of the prompts; `kl` is KL(full || candidate) a token;
    `top1` the share of positions with the same arg max; both over the last half.
    """

    length: int
    prompts: int
    density: float
    cra_mean: float
    cra_min: float
    loss_full: float
    loss: float
    needles: int
    recalled_full: int
    recalled: int
    logits_max_abs: float
    logits_relative: float
    kl_mean: float
    kl_max: float
    top1: float
    greedy_tokens: int
    greedy_same: int
    seconds_full: float
    seconds: float
    sites: list[SiteResult] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def loss_change(self) -> float:
        """Relative: 0.005 = half a percent worse than full attention."""
        return self.loss / self.loss_full - 1 if self.loss_full else math.nan

    @property
    def recall_ratio(self) -> float:
        """Share of full attention's recalled needles (1 when full attention recalls none)."""
        return self.recalled / self.recalled_full if self.recalled_full else 1.0


@dataclass(frozen=True)
class HeadMap:
    """Where the arrays of one head's picture are in `check.npz`.

    `<key>/blocks` bool [nQ, nK] kept blocks; `<key>/mass` float32 [nQ, nK], the true attention: mean probability of each key block over the tile's rows.
    """

    key: str
    candidate: str
    site: str
    head: int
    length: int
    block_q: int
    block_k: int
    density: float
    cra_min: float


@dataclass(frozen=True)
class Candidate:
    """One rewritten model: what was asked of it and what came out."""

    name: str
    model: str
    settings: dict[str, Any]  # site id -> attributes of its policy
    exact: list[ExactCase]
    lengths: list[LengthResult]
    maps: list[HeadMap] = field(default_factory=list)
    gated: bool = True  # a candidate shown for comparison only does not decide the exit status

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.exact) and all(g.ok for row in self.lengths for g in row.gates)


@dataclass(frozen=True)
class CheckResult:
    """Everything of one run of `check`."""

    full: str
    candidates: list[Candidate]
    declined: list[dict[str, str]]  # sites left dense: id, node, reason
    versions: dict[str, str]
    machine: str
    command: str
    seed: int
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.candidates if c.gated)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived figures and verdicts written out."""
        out = asdict(self)
        out["ok"] = self.ok
        for c, d in zip(self.candidates, out["candidates"], strict=True):
            d["ok"] = c.ok
            for e, x in zip(c.exact, d["exact"], strict=True):
                x["ok"] = e.ok
            for row, x in zip(c.lengths, d["lengths"], strict=True):
                x["loss_change"], x["recall_ratio"] = row.loss_change, row.recall_ratio
                for g, y in zip(row.gates, x["gates"], strict=True):
                    y["ok"] = g.ok
        return out

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def load_result(path: Path) -> CheckResult:
    """Reads `check.json`.

    Raises:
        UserError: no such file, not JSON, or of another schema.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; run `sa-export check` first, it writes check.json.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("schema") != SCHEMA:
            raise UserError(f"{path} has schema {raw.get('schema')!r}; this version reads schema {SCHEMA}: run `sa-export check` again.")
        candidates = []
        for c in raw["candidates"]:
            lengths = []
            for row in c["lengths"]:
                values = {k: v for k, v in row.items() if k not in ("loss_change", "recall_ratio")}
                values["sites"] = [SiteResult(**s) for s in row["sites"]]
                values["gates"] = [Gate(**{k: v for k, v in g.items() if k != "ok"}) for g in row["gates"]]
                lengths.append(LengthResult(**values))
            exact = [ExactCase(**{k: v for k, v in e.items() if k != "ok"}) for e in c["exact"]]
            maps = [HeadMap(**m) for m in c["maps"]]
            candidates.append(Candidate(c["name"], c["model"], c["settings"], exact, lengths, maps, c["gated"]))
        return CheckResult(
            raw["full"], candidates, raw["declined"], raw["versions"], raw["machine"], raw["command"], raw["seed"], raw["schema"]
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a check.json of this tool ({error}); run `sa-export check` again.") from None
