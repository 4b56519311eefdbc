"""Rewritten models against full attention on real prompts: logits, recall, loss, continuation, and what each head kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.check.decoder import DecoderInputs, feed, greedy, open_session, split_outputs
from sa_export.check.metrics import LogitFigures, PromptScore, compare_logits, score
from sa_export.check.probe import ProbedSite, SiteFigures, pair_density, probe_model, site_figures, with_outputs
from sa_export.check.prompts import Prompt
from sa_export.check.result import Gate, HeadMap, LengthResult, SiteResult
from sa_export.errors import UserError

__all__ = ["Thresholds", "measure"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Thresholds:
    """The gates; a check fails when one is missed.

    Attributes:
        recall: least share of full attention's recalled needles.
        loss: largest relative rise of the text loss.
        top1: least share of positions with the same arg max.
        kl: largest mean KL(full || candidate), nats a token.
        density: largest mean density.
    """

    recall: float = 0.99
    loss: float = 0.005
    top1: float = 0.93
    kl: float = 0.06
    density: float = 1.0

    def gates(self, row: LengthResult) -> list[Gate]:
        gates = [
            Gate("loss rise", row.loss_change, "<=", self.loss),
            Gate("top-1 agreement", row.top1, ">=", self.top1),
            Gate("mean KL", row.kl_mean, "<=", self.kl),
            Gate("density", row.density, "<=", self.density),
        ]
        return [Gate("needle recall / full", row.recall_ratio, ">=", self.recall), *gates] if row.needles else gates


@dataclass
class _Tally:
    """What accumulates over the prompts of one candidate."""

    figures: list[LogitFigures] = field(default_factory=list)
    full: list[PromptScore] = field(default_factory=list)
    own: list[PromptScore] = field(default_factory=list)
    densities: list[list[np.ndarray]] = field(default_factory=list)  # a prompt: a site: [Hq] (sites may differ in heads)
    sites: list[list[SiteFigures]] = field(default_factory=list)  # a probed prompt: one a site
    seconds: float = 0.0
    seconds_full: float = 0.0
    greedy_same: int = 0


@dataclass(frozen=True)
class Measured:
    """Per candidate one `LengthResult`, the head pictures and their arrays."""

    rows: list[LengthResult]
    maps: list[list[HeadMap]]
    arrays: dict[str, np.ndarray]


def measure(
    full: Path,
    candidates: Sequence[tuple[str, Path]],
    prompts: Sequence[Prompt],
    *,
    thresholds: Thresholds,
    greedy_tokens: int,
    probed_prompts: int = 1,
    heads_shown: int = 4,
    progress: Progress = lambda _what, _share: None,
) -> Measured:
    """Runs the original and all candidates over prompts of one length.

    Args:
        full: the original model; candidates: (name, rewritten model).
        prompts: all of one length.
        greedy_tokens: tokens of the continuation compared after the first prompt; 0 = none.
        probed_prompts: prompts on which CRA and output errors of every site are measured (it costs several times a plain run).
        heads_shown: heads of each candidate whose kept blocks are kept as pictures.

    Raises:
        UserError: the model gives logits of the last token only.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator

    inputs = DecoderInputs.from_model(full)
    length = len(prompts[0].ids)
    steps = len(prompts) + probed_prompts + 1
    tallies = [_Tally() for _ in candidates]
    probes = [probe_model(path, tap_inputs=False) for _, path in candidates]
    runners = [OnnxrtRunner(lambda: open_session(full), name="full attention")]
    for (name, path), (model, _) in zip(candidates, probes, strict=True):
        runners.append(OnnxrtRunner(lambda m=model, p=path: open_session(m, p.parent), name=name))

    done = 0
    full_score: PromptScore | None = None

    def compare(first: Any, second: Any) -> dict[str, bool]:
        nonlocal full_score
        index = names.index(second.runner_name)
        prompt, tally = prompts[done], tallies[index]
        a, b = split_outputs(first)[0][0], split_outputs(second)[0][0]
        if a.shape[0] != length:
            raise UserError(
                f"{full} gives logits of {a.shape[0]} of {length} positions; check compares all of them: export with --logits all."
            )
        if full_score is None:
            full_score = score(a, prompt)
        tally.full.append(full_score)
        tally.own.append(score(b, prompt))
        tally.figures.append(compare_logits(a, b))
        tally.seconds_full += first.runtime
        tally.seconds += second.runtime
        tally.densities.append([_density(s, second, length) for s in probes[index][1]])
        figures = tally.figures[-1]
        return {"logits": figures.top1 >= thresholds.top1 and figures.kl_mean <= thresholds.kl}

    names = [name for name, _ in candidates]
    stream = Comparator.run(runners, [feed(inputs, p.ids[None]) for p in prompts], streaming=True)
    for single in stream:
        full_score = None
        Comparator.compare_accuracy(single, comparisons=[(0, i + 1) for i in range(len(candidates))], compare_func=compare)
        done += 1
        progress(f"{length} tokens: prompt {done} of {len(prompts)}", done / steps)

    if greedy_tokens:
        sequences = []
        for runner in runners:
            with runner:
                sequences.append(greedy(runner, inputs, prompts[0].ids[: length - greedy_tokens], greedy_tokens))
        for tally, tokens in zip(tallies, sequences[1:], strict=True):
            same = np.asarray(sequences[0]) == np.asarray(tokens)
            tally.greedy_same = int(same.argmin()) if not same.all() else len(same)
        progress(f"{length} tokens: continuation", (done + 1) / steps)

    arrays: dict[str, np.ndarray] = {}
    maps: list[list[HeadMap]] = [[] for _ in candidates]
    for n in range(probed_prompts):
        values = feed(inputs, prompts[n].ids[None])
        reference = _site_outputs(full, {s.output for _, sites in probes for s in sites}, values)
        for i, ((name, path), tally) in enumerate(zip(candidates, tallies, strict=True)):
            maps[i] += _probe(name, path, values, reference, tally, heads_shown if n == 0 else 0, arrays)
            progress(f"{length} tokens: sites of {name}", (len(prompts) + 1 + n + (i + 1) / len(candidates)) / (steps + 1))
    rows = []
    for tally, (_, sites) in zip(tallies, probes, strict=True):
        rows.append(_row(length, prompts, tally, sites, greedy_tokens, thresholds))
    return Measured(rows, maps, arrays)


def _density(site: ProbedSite, outputs: Any, length: int) -> np.ndarray:
    a = site.attributes
    return pair_density(np.asarray(outputs[site.blocks])[0], length, length, a["block_q"], a["block_k"])


def _site_outputs(full: Path, names: set[str], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original model's tensors of these names; names that it does not have are left out."""
    import onnx

    original = onnx.load(full, load_external_data=False)
    shared = [o for node in original.graph.node for o in node.output if o in names]
    return dict(zip(shared, open_session(with_outputs(original, shared).SerializeToString(), full.parent).run(shared, values), strict=True))


def _probe(
    name: str,
    path: Path,
    values: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    tally: _Tally,
    heads: int,
    arrays: dict[str, np.ndarray],
) -> list[HeadMap]:
    """Adds the figures of every site on one prompt to the tally; returns the pictures of the `heads` chosen heads."""
    model, sites = probe_model(path, tap_inputs=True)
    length = values["input_ids"].shape[1]
    wanted = list(
        dict.fromkeys(
            n for s in sites for n in (s.query, s.key, s.value, s.output, s.blocks, s.row_cra, *([s.key_mask] if s.key_mask else []))
        )
    )
    outputs = dict(zip(wanted, open_session(model, path.parent).run(wanted, values), strict=True))
    tally.sites.append([site_figures(s, outputs, reference.get(s.output)) for s in sites])

    # The pictures show the extremes and the middle: heads in order of density, evenly picked.
    ranked = sorted(((float(f.density[h]), i, h) for i, f in enumerate(tally.sites[-1]) for h in range(len(f.density))))
    picked = [ranked[round(x)] for x in np.linspace(0, len(ranked) - 1, heads)] if heads and ranked else []
    shown = []
    for density, i, h in dict.fromkeys(picked):
        site = sites[i]
        a = site.attributes
        key = f"{name}/{length}/{site.id}/{h}"
        arrays[f"{key}/blocks"] = np.asarray(outputs[site.blocks])[0, h]
        arrays[f"{key}/mass"] = _true_mass(outputs[site.query][0], outputs[site.key][0], h, a)
        shown.append(HeadMap(key, name, site.id, h, length, a["block_q"], a["block_k"], density, float(tally.sites[-1][i].cra_min[h])))
    return shown


def _true_mass(q: np.ndarray, k: np.ndarray, head: int, attributes: dict[str, Any]) -> np.ndarray:
    """[nQ, nK] mean probability of each key block over the rows of each tile, full attention of one head of an unpadded prompt."""
    bq, bk = attributes["block_q"], attributes["block_k"]
    keys = k[head // (q.shape[0] // k.shape[0])].astype(np.float32)
    S, T = q.shape[1], len(keys)
    out = np.zeros((-(-S // bq), -(-T // bk)), np.float32)
    for t in range(len(out)):
        rows = np.arange(t * bq, min((t + 1) * bq, S))
        s = attributes["scale"] * (q[head, rows].astype(np.float32) @ keys.T)
        if attributes["softcap"] > 0:
            s = attributes["softcap"] * np.tanh(s / attributes["softcap"])
        s = np.where(np.arange(T)[None] <= (rows + T - S)[:, None], s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[t] = np.add.reduceat(p.mean(0), np.arange(0, T, bk))
    return out


def _row(
    length: int, prompts: Sequence[Prompt], tally: _Tally, sites: list[ProbedSite], greedy_tokens: int, thresholds: Thresholds
) -> LengthResult:
    density = [np.mean([d[i] for d in tally.densities], 0) for i in range(len(sites))]
    results = []
    for i, site in enumerate(sites):
        figures = [probed[i] for probed in tally.sites]
        results.append(
            SiteResult(
                id=site.id,
                policy=_text(site.attributes["policy"]),
                density=[float(x) for x in density[i]],
                cra_mean=[float(x) for x in np.mean([f.cra_mean for f in figures], 0)],
                cra_min=[float(x) for x in np.min([f.cra_min for f in figures], 0)],
                output_error=float(np.mean([f.output_error for f in figures])),
                drift=float(np.mean([f.drift for f in figures])),
            )
        )
    f = tally.figures
    row = LengthResult(
        length=length,
        prompts=len(prompts),
        density=float(np.concatenate(density).mean()),
        cra_mean=float(np.mean([s.cra_mean for s in results])),
        cra_min=float(np.min([s.cra_min for s in results])),
        loss_full=float(np.mean([s.loss for s in tally.full])),
        loss=float(np.mean([s.loss for s in tally.own])),
        needles=sum(len(p.answers) for p in prompts),
        recalled_full=sum(s.recalled for s in tally.full),
        recalled=sum(s.recalled for s in tally.own),
        logits_max_abs=float(np.max([x.max_abs for x in f])),
        logits_relative=float(np.mean([x.relative for x in f])),
        kl_mean=float(np.mean([x.kl_mean for x in f])),
        kl_max=float(np.max([x.kl_max for x in f])),
        top1=float(np.mean([x.top1 for x in f])),
        greedy_tokens=greedy_tokens,
        greedy_same=tally.greedy_same,
        seconds_full=tally.seconds_full / len(prompts),
        seconds=tally.seconds / len(prompts),
        sites=results,
    )
    row.gates.extend(thresholds.gates(row))
    return row


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
