"""Engines against full attention on real prompts: logits, loss, recall and continuation, with the files that let polygraphy repeat it.

What an engine keeps of each head cannot be seen from outside: density and CRA are measured on the ONNX file (`sa-export check` without
--runtime).
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.check.decoder import DecoderInputs, feed, greedy, open_session, split_outputs
from sa_export.check.metrics import LogitFigures, PromptScore, compare_logits, score
from sa_export.check.prompts import Prompt, make_prompts
from sa_export.check.quality import Thresholds
from sa_export.check.result import Gate
from sa_export.check.run import CheckOptions, refuse_early
from sa_export.errors import UserError
from sa_export.files import staged_folder
from sa_export.tensorrt import commands
from sa_export.tensorrt.build import read_description

__all__ = ["EngineResult", "compare", "engine_runner", "is_engine", "profile_for", "result_text"]

OpenRunner = Callable[[str, Path], Any]
_FILES = {"engines.json", "inputs.json", "full_outputs.json", "polygraphy.sh"}


@dataclass(frozen=True)
class EngineResult:
    """One engine at one prompt length; the figures are those of `check.result.LengthResult`."""

    engine: str
    length: int
    prompts: int
    loss_full: float
    loss: float
    needles: int
    recalled_full: int
    recalled: int
    logits_relative: float
    kl_mean: float
    top1: float
    greedy_tokens: int
    greedy_same: int
    seconds_full: float
    seconds: float
    gates: list[Gate] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(gate.ok for gate in self.gates)


def is_engine(path: Path) -> bool:
    """Whether a file is an engine of `sa-export build`: its description lies beside it."""
    return path.with_name(path.name + ".json").is_file()


def compare(
    full: Path,
    engines: Sequence[tuple[str, Path]],
    output: Path,
    options: CheckOptions,
    *,
    tokenizer_folder: Path | None = None,
    force: bool = False,
    progress: Callable[[str, float | None], None] = lambda _what, _share: None,
    open_runner: OpenRunner | None = None,
) -> list[EngineResult]:
    """Runs full attention and the engines on the same prompts through polygraphy's Comparator, and writes a folder.

    The folder gets `engines.json` (the figures), `inputs.json` and `full_outputs.json` (the first prompt and full attention's logits, as
    polygraphy saves them) and `polygraphy.sh` (the comparison without this tool).

    Args:
        full: an ONNX file, run by ONNX Runtime, or a dense engine.
        engines: (name, engine); each needs its description beside it.
        open_runner: makes the runner of an engine from its name and path; None runs it with TensorRT.

    Raises:
        UserError: missing files, prompts that an engine or the model cannot take, `output` in the way, no GPU.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    descriptions = {name: read_description(path) for name, path in engines}
    described = read_description(full) if is_engine(full) else None
    source = Path(described["model"]) if described else full
    inputs = DecoderInputs.from_model(source)
    folder = tokenizer_folder or source.parent
    refuse_early(folder, options)
    for name, found in [*descriptions.items(), *([("full attention", described)] if described else [])]:
        for length in options.lengths:
            profile_for(found, _shapes(feed(inputs, np.zeros((1, length), np.int64))), name)
    sets = _prompts(folder, options)
    make = open_runner or engine_runner
    runners = [make("full attention", full) if described else OnnxrtRunner(lambda: open_session(full), name="full attention")]
    runners += [make(name, path) for name, path in engines]
    results: list[EngineResult] = []
    with staged_folder(output, force=force, owner=_earlier) as stage, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for prompts in sets:
            tallies: list[_Tally] = [_Tally() for _ in engines]
            feeds = [feed(inputs, p.ids[None]) for p in prompts]
            for index, single in enumerate(Comparator.run(runners, feeds, streaming=True)):
                _tally(single, prompts[index], tallies, options.thresholds)
                if not results and index == 0:
                    _save_first(stage, feeds[0], single)
                progress(f"{len(prompts[0].ids)} tokens: prompt {index + 1} of {len(prompts)}", (index + 1) / len(prompts))
            same = _continuations(runners, inputs, prompts[0], options.greedy_tokens)
            results += [_result(name, prompts, t, s, options) for (name, _), t, s in zip(engines, tallies, same, strict=True)]
        text = json.dumps({"full": str(full), "engines": descriptions, "results": [asdict(r) | {"ok": r.ok} for r in results]}, indent=1)
        (stage / "engines.json").write_text(text + "\n", encoding="utf-8")
        _write_script(stage, output, engines, descriptions)
    return results


def engine_runner(name: str, path: Path) -> Any:
    """A polygraphy runner of an engine that takes, for each call, the profile that fits its shapes.

    The engine's runtime is chosen when polygraphy is first imported (POLYGRAPHY_USE_TENSORRT_RTX), so engines of both runtimes do not
    meet in one process.

    Raises:
        UserError: the runtime is not installed or is the other one, or the plugin is missing.
    """
    from polygraphy import config
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    from sa_export.tensorrt.library import find_plugin
    from sa_export.tensorrt.runtime import find_runtime
    from sa_export.tensorrt.worker import Failure, load_plugin, tensorrt

    description = read_description(path)
    find_runtime(description["runtime"])
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError(
            f"{path} cannot run here: there is no NVIDIA driver (libcuda.so.1); run the check on the machine with the GPU."
        ) from None
    if (description["runtime"] == "tensorrt_rtx") != config.USE_TENSORRT_RTX:
        raise UserError(
            f"{path} was built with {description['runtime']}; run this with POLYGRAPHY_USE_TENSORRT_RTX={int(not config.USE_TENSORRT_RTX)}."
        )

    class Runner(TrtRunner):
        def infer_impl(self, feed_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            wanted = profile_for(description, _shapes(feed_dict), name)
            if wanted != getattr(self, "current", None):
                self.set_profile(wanted)
                self.current = wanted
            return super().infer_impl(feed_dict, *args, **kwargs)

    try:
        load_plugin(tensorrt(), str(find_plugin(_existing(description["plugin"]))) if description["sites"] else None)
    except Failure as error:
        raise UserError(f"{error}.") from None
    return Runner(EngineFromBytes(BytesFromPath(str(path))), name=name)


def profile_for(description: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str = "the engine") -> int:
    """The profile of an engine that takes these input shapes; the narrowest of several, so that a single token is a decode step.

    Raises:
        UserError: none does.
    """
    fitting = []
    for index, profile in enumerate(description["profiles"]):
        bounds = [(profile["min"][n], profile["max"][n], shapes[n]) for n in profile["min"] if n in shapes]
        if all(low <= got <= high for least, most, shape in bounds for low, got, high in zip(least, shape, most, strict=True)):
            fitting.append((sum(high - low for least, most, _ in bounds for low, high in zip(least, most, strict=True)), index))
    if not fitting:
        got = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in shapes.items() if not n.startswith("past_key_values."))
        raise UserError(f"{name} has no profile for {got}; build it with a larger --max-seq-len, --max-chunk-len or --max-batch-size.")
    return min(fitting)[1]


def result_text(results: Sequence[EngineResult]) -> str:
    """A table for a terminal."""
    lines = [f"{'engine':<20}{'length':>8}{'loss full / engine':>22}{'needles':>14}{'top-1':>8}{'mean KL':>9}{'same greedy':>13}  gates"]
    for r in results:
        missed = ", ".join(f"{g.name} {g.value:.4g} ({g.sense} {g.limit:g})" for g in r.gates if not g.ok)
        lines.append(
            f"{r.engine:<20}{r.length:>8}{f'{r.loss_full:.4f} / {r.loss:.4f}':>22}{f'{r.recalled}/{r.recalled_full} of {r.needles}':>14}"
            f"{r.top1:>8.4f}{r.kl_mean:>9.4f}{f'{r.greedy_same}/{r.greedy_tokens}':>13}  {'missed: ' + missed if missed else 'ok'}"
        )
    return "\n".join(lines)


@dataclass
class _Tally:
    figures: list[LogitFigures] = field(default_factory=list)
    full: list[PromptScore] = field(default_factory=list)
    own: list[PromptScore] = field(default_factory=list)
    seconds_full: float = 0.0
    seconds: float = 0.0


def _tally(single: Any, prompt: Prompt, tallies: list[_Tally], thresholds: Thresholds) -> None:
    from polygraphy.comparator import Comparator

    order = iter(tallies)

    def judge(first: Any, second: Any) -> dict[str, bool]:
        tally = next(order)
        a, b = split_outputs(first)[0][0], split_outputs(second)[0][0]
        if len(a) != len(prompt.ids) or len(b) != len(a):
            raise UserError(f"The models give logits of {len(a)} and {len(b)} of {len(prompt.ids)} positions; export with --logits all.")
        tally.full.append(score(a, prompt))
        tally.own.append(score(b, prompt))
        tally.figures.append(compare_logits(a, b))
        tally.seconds_full += first.runtime
        tally.seconds += second.runtime
        return {"logits": tally.figures[-1].top1 >= thresholds.top1 and tally.figures[-1].kl_mean <= thresholds.kl}

    Comparator.compare_accuracy(single, comparisons=[(0, i + 1) for i in range(len(tallies))], compare_func=judge)


def _continuations(runners: Sequence[Any], inputs: DecoderInputs, prompt: Prompt, tokens: int) -> list[int]:
    """How many tokens of each engine's greedy continuation are full attention's."""
    if not (tokens and inputs.past):
        return [0] * (len(runners) - 1)
    answers = []
    for runner in runners:
        with runner:
            answers.append(greedy(runner, inputs, prompt.ids[: len(prompt.ids) - tokens], tokens))
    return [sum(a == b for a, b in zip(answers[0], other, strict=True)) for other in answers[1:]]


def _result(name: str, prompts: Sequence[Prompt], t: _Tally, same: int, options: CheckOptions) -> EngineResult:
    loss_full, loss = (float(np.mean([s.loss for s in part])) for part in (t.full, t.own))
    recalled_full, recalled = (sum(s.recalled for s in part) for part in (t.full, t.own))
    needles = sum(len(p.answers) for p in prompts)
    top1, kl = (float(np.mean([getattr(f, name_) for f in t.figures])) for name_ in ("top1", "kl_mean"))
    limits = options.thresholds
    gates = [
        Gate("loss rise", loss / loss_full - 1, "<=", limits.loss),
        Gate("top-1 agreement", top1, ">=", limits.top1),
        Gate("mean KL", kl, "<=", limits.kl),
    ]
    if needles:
        gates.insert(0, Gate("needle recall / full", recalled / recalled_full if recalled_full else 1.0, ">=", limits.recall))
    return EngineResult(
        engine=name,
        length=len(prompts[0].ids),
        prompts=len(prompts),
        loss_full=loss_full,
        loss=loss,
        needles=needles,
        recalled_full=recalled_full,
        recalled=recalled,
        logits_relative=float(np.mean([f.relative for f in t.figures])),
        kl_mean=kl,
        top1=top1,
        greedy_tokens=options.greedy_tokens,
        greedy_same=same,
        seconds_full=t.seconds_full / len(prompts),
        seconds=t.seconds / len(prompts),
        gates=gates,
    )


def _prompts(folder: Path, options: CheckOptions) -> list[list[Prompt]]:
    from sa_export.check.run import load_tokenizer

    tokenizer = load_tokenizer(folder)
    first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    return [
        make_prompts(
            encode, length=n, count=options.prompts, needles=options.needles, seed=options.seed, first_ids=first, text=options.text
        )
        for n in options.lengths
    ]


def _save_first(stage: Path, values: dict[str, np.ndarray], single: Any) -> None:
    """The first prompt and full attention's logits. The caches are left out: they are many times the size and follow from the logits' layers."""
    from polygraphy.comparator import RunResults
    from polygraphy.comparator.struct import IterationResult
    from polygraphy.json import save_json

    save_json([values], str(stage / "inputs.json"))
    iteration = next(iter(single.values()))[0]
    kept = IterationResult({"logits": np.asarray(iteration["logits"])}, runtime=iteration.runtime, runner_name=iteration.runner_name)
    RunResults([(iteration.runner_name, [kept])]).save(str(stage / "full_outputs.json"))


def _write_script(stage: Path, output: Path, engines: Sequence[tuple[str, Path]], descriptions: dict[str, dict[str, Any]]) -> None:
    lines = [
        "#!/bin/sh",
        "# The first prompt of this check through plain polygraphy: each engine against full attention's saved logits.",
        "# The figures are elementwise; what is acceptable for sparse attention is judged by the gates in engines.json.",
        'cd "$(dirname "$0")" || exit 1',
    ]
    for name, path in engines:
        found = descriptions[name]
        arguments = commands.polygraphy_run(
            Path(os.path.relpath(path.absolute(), output.absolute())),
            plugin=Path(found["plugin"]) if found["plugin"] else None,
            inputs="inputs.json",
            reference="full_outputs.json",
        )
        lines.append(commands.script(arguments, environment="POLYGRAPHY_USE_TENSORRT_RTX=1" if found["runtime"] == "tensorrt_rtx" else ""))
    script = stage / "polygraphy.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)


def _shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _existing(path: str | None) -> Path | None:
    """The plugin that the engine was built with, where it still is; else it is looked for as for a build."""
    return Path(path) if path and Path(path).is_file() else None


def _earlier(folder: Path) -> set[str] | None:
    return set(_FILES) if (folder / "engines.json").is_file() else None
