"""The whole check: exactness at alpha 1, quality at each length, gates, and the files that let others repeat it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.check.decoder import DecoderInputs, feed
from sa_export.check.exactness import exact_cases
from sa_export.check.prompts import make_prompts
from sa_export.check.quality import Thresholds, measure
from sa_export.check.result import Candidate, CheckResult, HeadMap, LengthResult
from sa_export.errors import UserError
from sa_export.files import check_replaceable, staged_folder
from sa_export.hf.quiet import sentence_of
from sa_export.versions import versions

__all__ = ["CheckOptions", "Subject", "load_tokenizer", "refuse_early", "run_check"]

_EXACT_LENGTH = 200
_PACKAGES = ("sa-export", "torch", "transformers", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy", "numpy")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Subject:
    """A rewritten model to be checked; one that is not `gated` is shown beside the others and decides nothing."""

    name: str
    model: Path
    gated: bool = True


@dataclass(frozen=True)
class CheckOptions:
    """What is run.

    Attributes:
        lengths: prompt lengths in tokens.
        prompts: prompts of each length; needles: questions in each prompt.
        greedy_tokens: tokens of the continuation compared with full attention's.
        probed_prompts: prompts on which every site's CRA and output error are measured.
        text: filler text of the prompts; None = held-out sources of the running Python's standard library.
    """

    lengths: tuple[int, ...] = (4096,)
    prompts: int = 10
    needles: int = 20
    greedy_tokens: int = 32
    probed_prompts: int = 1
    seed: int = 0
    thresholds: Thresholds = field(default_factory=Thresholds)
    text: str | None = None


def run_check(
    full: Path,
    subjects: Sequence[Subject],
    output: Path,
    options: CheckOptions,
    *,
    tokenizer_folder: Path | None = None,
    declined: Sequence[dict[str, str]] = (),
    command: str = "",
    force: bool = False,
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> CheckResult:
    """Checks rewritten models against the original and writes `check.json`, `check.npz`, `inputs.json` and `polygraphy.sh` to `output`.

    Args:
        full: the original ONNX model; subjects: the rewritten ones.
        output: a new folder (or, with `force`, one that an earlier check wrote).
        tokenizer_folder: where tokenizer and config.json lie; by default the folder of `full`.
        declined: sites that were left dense, for the report.
        command: the command line that the report shows.

    Raises:
        UserError: missing files, a prompt longer than the model's limit, a model that is no causal LM, `output` in the way.
    """
    from sa_export.report import write_report

    output = Path(os.path.abspath(output))
    check_replaceable(output, force=force, owner=_earlier_check)
    inputs = DecoderInputs.from_model(full)
    for subject in subjects:
        DecoderInputs.from_model(subject.model)
    folder = tokenizer_folder or full.parent
    refuse_early(folder, options)
    tokenizer, config = load_tokenizer(folder), _config(folder)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    sets = [
        make_prompts(
            encode, length=n, count=options.prompts, needles=options.needles, seed=options.seed, first_ids=first, text=options.text
        )
        for n in options.lengths
    ]
    with staged_folder(output, force=force, owner=_earlier_check) as stage, _quiet_polygraphy():
        exact = []
        for i, subject in enumerate(subjects):
            progress(f"alpha 1: {subject.name}", 0.1 * i / len(subjects))
            exact.append(
                exact_cases(
                    full,
                    subject.model,
                    dtype=_dtype(full),
                    length=_EXACT_LENGTH,
                    vocabulary=int(config.get("vocab_size") or len(tokenizer)),
                    seed=options.seed,
                )
            )
        rows: list[list[LengthResult]] = [[] for _ in subjects]
        maps: list[list[HeadMap]] = [[] for _ in subjects]
        arrays: dict[str, np.ndarray] = {}
        for n, prompts in enumerate(sets):
            begin, end = (0.1 + 0.9 * k / len(sets) for k in (n, n + 1))
            measured = measure(
                full,
                [(s.name, s.model) for s in subjects],
                prompts,
                thresholds=options.thresholds,
                greedy_tokens=options.greedy_tokens,
                probed_prompts=min(options.probed_prompts, len(prompts)),
                progress=lambda what, share, b=begin, e=end: progress(what, b + (e - b) * share),  # type: ignore[misc]
            )
            for i in range(len(subjects)):
                rows[i].append(measured.rows[i])
                maps[i] += measured.maps[i]
            arrays |= measured.arrays
        result = CheckResult(
            full=str(full),
            candidates=[
                Candidate(s.name, str(s.model), _settings(s.model), exact[i], rows[i], maps[i], s.gated) for i, s in enumerate(subjects)
            ],
            declined=list(declined),
            versions=versions(_PACKAGES),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            command=command,
            seed=options.seed,
        )
        result.write(stage / "check.json")
        np.savez_compressed(stage / "check.npz", **arrays)  # type: ignore[arg-type]
        write_report(result, stage / "check.npz", stage)
        _write_polygraphy(stage, output, full, subjects, feed(inputs, sets[0][0].ids[None]))
    return result


def refuse_early(folder: Path, options: CheckOptions) -> None:
    """What can be told from a checkpoint's or an export's folder before anything runs.

    Raises:
        UserError: no tokenizer, or prompts that the model cannot take.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{folder} holds no tokenizer (tokenizer.json), which check needs for real prompts; give its folder with --tokenizer."
        )
    limit = _config(folder).get("max_position_embeddings")
    for length in options.lengths:
        if limit and length > limit:
            raise UserError(
                f"A prompt of {length} tokens is longer than the model's limit of {limit} (max_position_embeddings in {folder / 'config.json'}); ask for at most {limit}."
            )
        if length < 2 * options.greedy_tokens:
            raise UserError(
                f"A prompt of {length} tokens is too short for a continuation of {options.greedy_tokens}; use longer prompts or --greedy-tokens {length // 2}."
            )


def _earlier_check(folder: Path) -> set[str] | None:
    if not (folder / "check.json").is_file():
        return None
    pictures = {p.name for p in folder.glob("*.png")}
    return {"check.json", "check.npz", "inputs.json", "polygraphy.sh", "report.html", "full_outputs.json", *pictures}


def _write_polygraphy(stage: Path, output: Path, full: Path, subjects: Sequence[Subject], values: dict[str, np.ndarray]) -> None:
    """The first prompt as polygraphy's own inputs file, and the commands that repeat the comparison without this tool."""
    from polygraphy.json import save_json

    save_json([values], str(stage / "inputs.json"))
    quote = lambda path: shlex.quote(os.path.relpath(path, output))  # noqa: E731
    lines = [
        "#!/bin/sh",
        "# The first prompt of this check through plain polygraphy: full attention, then each rewritten model against it.",
        "# The figures are elementwise; what is acceptable for sparse attention is judged by the gates in check.json.",
        'cd "$(dirname "$0")" || exit 1',
        f"polygraphy run {quote(full)} --onnxrt --load-inputs inputs.json --save-outputs full_outputs.json || exit 1",
    ]
    lines += [
        f"polygraphy run {quote(s.model)} --onnxrt --load-inputs inputs.json --load-outputs full_outputs.json --check-error-stat median --atol 0.05 --rtol 0.05"
        for s in subjects
    ]
    script = stage / "polygraphy.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    script.chmod(0o755)


def _settings(model: Path) -> dict[str, Any]:
    import onnx

    from graph_passes.op import DOMAIN, policy_from_attributes

    graph = onnx.load(model, load_external_data=False).graph
    out = {}
    for node in graph.node:
        if node.domain == DOMAIN:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            out[node.name] = policy_from_attributes(attributes).as_dict()
    return out


def _dtype(model: Path) -> str:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}
    sizes: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_type in kinds:
            name = kinds[tensor.data_type]
            sizes[name] = sizes.get(name, 0) + int(np.prod(tensor.dims))
    return max(sizes, key=lambda k: sizes[k]) if sizes else "float32"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, offline. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise UserError(
            f"The tokenizer in {folder} does not load ({sentence_of(error).rstrip('.')[:200]}); give another with --tokenizer."
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); export the model again.") from None


@contextlib.contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Polygraphy reports every comparison at length; the report does it here."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
