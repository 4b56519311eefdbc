"""An exported model against the torch model that it came from: the same tokens, the same numbers."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa_export.errors import UserError
from sa_export.hf.cases import Case, cases, drawable_ids
from sa_export.hf.load import Checkpoint
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import sentence_of
from sa_export.hf.step import cached_tensors, new_cache

FLOAT32_TOLERANCE = 1e-4
"""Largest difference allowed in float32, as a share of the largest magnitude of the tensor compared."""
LOW_PRECISION_RMS = {"float16": 2.0, "bfloat16": 1.0}
"""How many times torch's own error (root mean square, against float32) the graph's may be. The bfloat16 graph runs in float32 and errs by
its rounded constants alone (where 1/sqrt(D) is no power of two: up to 0.6 of torch's error in a small model)."""
LARGEST_PER_RMS = 2.0
"""What largest differences may be on top of that: those of two correct implementations of equal root mean square differ by up to this."""

_BYTES_A_PARAMETER = {"float32": 8, "float16": 8, "bfloat16": 10}
_MARGIN_BYTES = 2**29


@dataclass(frozen=True)
class CaseResult:
    """How far one case is off. All differences are over attended positions; `relative` is `absolute` / largest magnitude."""

    name: str
    absolute: float
    """Largest difference of a logit."""
    relative: float
    allowed: float
    """What `relative` may be."""
    rms: float
    """Root mean square difference of the logits, as a share of the largest magnitude."""
    allowed_rms: float
    cache_relative: float
    """Largest difference of a present key or value, as a share of the largest magnitude in its tensor."""
    allowed_cache: float

    @property
    def passed(self) -> bool:
        pairs = ((self.relative, self.allowed), (self.rms, self.allowed_rms), (self.cache_relative, self.allowed_cache))
        return all(got <= limit for got, limit in pairs)  # a NaN is no pass


@dataclass(frozen=True)
class Verification:
    """The evidence that an export computes what the torch model computes."""

    runtime: str
    method: str
    seed: int
    cases: tuple[CaseResult, ...]

    @property
    def worst(self) -> CaseResult:
        return max(self.cases, key=lambda case: case.relative / (case.allowed or 1.0))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cases": [{**asdict(case), "passed": case.passed} for case in self.cases]}


@dataclass(frozen=True, eq=False)
class _Outputs:
    """Logits [B, T, V] and the present keys and values [B, H, T, D] of all layers, float32."""

    logits: np.ndarray
    cache: tuple[np.ndarray, ...]


def memory_shortage(parameters: int, dtype: str) -> str | None:
    """Why an export cannot be compared with torch on this machine, as a sentence; None when there is memory enough.

    Counted are, in float32, ONNX Runtime's weights and the transposed copies it makes of them; in float16 and bfloat16 the torch model in
    float32 stands in their place first. The checkpoint itself is mapped and can be paged out.
    """
    need = parameters * _BYTES_A_PARAMETER[dtype] + _MARGIN_BYTES
    free = _available_bytes()
    if free is None or need <= free:
        return None
    return (
        f"Not compared with the torch model: that takes about {need / 2**30:.0f} GiB of memory and {free / 2**30:.0f} GiB are free; "
        f"to prove this export, run it on a machine with more."
    )


def _available_bytes() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def verify_export(model_path: str | Path, checkpoint: Checkpoint, *, seed: int = 0, progress: Progress = silent) -> Verification:
    """Compares an exported model in ONNX Runtime (CPU) with the torch model on random ordinary tokens.

    The torch model always runs whole sequences without a cache; the graph is fed its own presents. Compared are the logits and the
    presents at attended positions, for prefill, batches with left and with right padding, chunked prefill, and decode steps.

    Tolerance: float32: 1e-4 of the largest magnitude. float16: the root mean square difference from the torch model *in float32* may be
    twice that of the torch model in float16, the largest difference four times. bfloat16: ONNX Runtime has no bfloat16 kernels for CPUs,
    so the graph runs with its weights and constants cast to float32, and may be once and twice as far off as torch in bfloat16.

    Args:
        model_path: `model.onnx` of an export of `checkpoint`, its weights beside it.
        checkpoint: what it was made from. For float16 and bfloat16 its weights are float32 for a moment, and restored exactly.
        seed: of the tokens.
        progress: stage "verify".

    Raises:
        UserError: the torch model gives no finite numbers, ONNX Runtime refuses the graph, or a case differs too much (with the figures).
    """
    import onnxruntime

    low_precision = checkpoint.dtype != "float32"
    emulated = checkpoint.dtype == "bfloat16"
    limit = getattr(checkpoint.text_config, "max_position_embeddings", None)
    todo = cases(drawable_ids(checkpoint), limit, seed)
    steps = len(todo) * (3 if low_precision else 2)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress("verify", done / steps)

    progress("verify", 0.0)
    own = []
    for case in todo:
        own.append(_torch_outputs(checkpoint.model, case))
        if not np.isfinite(own[-1].logits[case.mask > 0]).all():
            raise UserError(f"{checkpoint.source} gives logits that are not finite in {checkpoint.dtype}; choose another --dtype.")
        tick()
    exact = own
    if low_precision:
        exact = []
        with _in_float32(checkpoint.model):
            for case in todo:
                exact.append(_torch_outputs(checkpoint.model, case))
                tick()
    allowed = _allowed(todo, own, exact, checkpoint.dtype)
    results = []
    with _runnable(Path(model_path), emulated) as path:
        session = _session(path)
        for case, want in zip(todo, exact, strict=True):
            graph = _graph_outputs(session, case, np.float32 if emulated else np.dtype(checkpoint.dtype))
            results.append(_compare(case, graph, want, allowed))
            tick()
        del session
    _return_memory()
    verification = Verification(
        runtime=f"onnxruntime {onnxruntime.__version__}, CPU",
        method=_method(checkpoint.dtype),
        seed=seed,
        cases=tuple(results),
    )
    _refuse_failures(verification, checkpoint)
    return verification


def _refuse_failures(verification: Verification, checkpoint: Checkpoint) -> None:
    failed = [case for case in verification.cases if not case.passed]
    if not failed:
        return
    parts = "; ".join(
        f"{c.name}: logits {c.relative:.1e} of their scale (allowed {c.allowed:.1e}, rms {c.rms:.1e} of {c.allowed_rms:.1e}), "
        f"cache {c.cache_relative:.1e} (allowed {c.allowed_cache:.1e})"
        for c in failed
    )
    raise UserError(
        f"The exported graph differs from {checkpoint.source} in {len(failed)} of {len(verification.cases)} cases ({parts}); "
        f"it is not kept, try another opset, attention or dtype."
    )


def _method(dtype: str) -> str:
    if dtype == "float32":
        return f"largest difference at most {FLOAT32_TOLERANCE:g} of the largest magnitude"
    factor = LOW_PRECISION_RMS[dtype]
    limits = f"error against torch float32 at most {factor:g} (rms) and {factor * LARGEST_PER_RMS:g} (largest) times that of torch {dtype}"
    return limits if dtype == "float16" else f"graph run with weights and constants cast to float32; {limits}"


def _torch_outputs(model: Any, case: Case) -> _Outputs:
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(case.ids),
            attention_mask=torch.from_numpy(case.mask),
            position_ids=torch.from_numpy(case.positions),
            past_key_values=new_cache(),
            use_cache=True,
            return_dict=True,
        )
    return _Outputs(out.logits.float().numpy(), tuple(t.float().numpy() for pair in cached_tensors(out.past_key_values) for t in pair))


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """The model's low-precision tensors as float32, one by one in place; the same bits come back afterwards."""
    import torch

    low = (torch.float16, torch.bfloat16)
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.dtype in low}
    types = {key: tensor.dtype for key, tensor in held.items()}
    try:
        for tensor in held.values():
            tensor.data = tensor.data.float()
        yield
    finally:
        for key, tensor in held.items():
            tensor.data = tensor.data.to(types[key])
        _return_memory()


def _return_memory() -> None:
    """Hands freed memory back to the system where the C library can (glibc keeps what tensors of middling size have freed)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Packed copies of the weights pay over many calls; here there are a dozen.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no public base class of its errors
        raise UserError(f"ONNX Runtime {onnxruntime.__version__} refuses the exported graph: {sentence_of(error)}") from error


def _graph_outputs(session: Any, case: Case, element: Any) -> _Outputs:
    """The graph's outputs over all calls of a case. Logits of one row a call stand at their row, the other rows are NaN."""
    items, total = case.ids.shape
    names = [value.name for value in session.get_outputs()]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    cached = [name for name in shapes if name.startswith("past_key_values.")]
    past = {name: np.zeros((items, shapes[name][1], 0, shapes[name][3]), element) for name in cached}
    vocabulary = session.get_outputs()[0].shape[2]
    logits = np.full((items, total, vocabulary), np.nan, np.float32)
    for start, end in zip(case.cuts[:-1], case.cuts[1:], strict=True):
        feed = {"input_ids": case.ids[:, start:end], "attention_mask": case.mask[:, :end], "position_ids": case.positions[:, start:end]}
        out = _run(session, names, {**feed, **past}, case.name)
        if out[0].shape[1] == end - start:
            logits[:, start:end] = out[0]
        else:
            rows = start + last_rows(case.mask[:, start:end])
            logits[np.arange(items), rows] = out[0][:, 0]
        past = dict(zip(cached, out[1:], strict=True))
    return _Outputs(logits, tuple(past[name].astype(np.float32) for name in cached))


def _run(session: Any, names: list[str], feed: dict[str, np.ndarray], case: str) -> list[np.ndarray]:
    try:
        return session.run(names, feed)
    except Exception as error:
        raise UserError(f"ONNX Runtime fails on the exported graph ({case}): {sentence_of(error)}") from error


def last_rows(mask: np.ndarray) -> np.ndarray:
    """Index of the last 1 of each row of a 0/1 mask [B, S], 0 where there is none."""
    return np.where(mask.any(-1), mask.shape[1] - 1 - mask[:, ::-1].argmax(-1), 0)


def _allowed(todo: tuple[Case, ...], own: list[_Outputs], exact: list[_Outputs], dtype: str) -> tuple[float, float, float]:
    """What a case may be off: largest logit difference, its root mean square, largest cache difference, all as shares of the scale.

    In low precision this is the worst that torch does over all cases; a single case has too few maxima to measure by.
    """
    if dtype == "float32":
        return FLOAT32_TOLERANCE, FLOAT32_TOLERANCE, FLOAT32_TOLERANCE
    factor = LOW_PRECISION_RMS[dtype]
    torch_errors = [_case_errors(case, got, want)[1:] for case, got, want in zip(todo, own, exact, strict=True)]
    relative, rms, cache = (factor * max(column) for column in zip(*torch_errors, strict=True))
    return LARGEST_PER_RMS * relative, rms, LARGEST_PER_RMS * cache


def _compare(case: Case, graph: _Outputs, exact: _Outputs, allowed: tuple[float, float, float]) -> CaseResult:
    absolute, relative, rms, cache = _case_errors(case, graph, exact)
    return CaseResult(case.name, absolute, relative, allowed[0], rms, allowed[1], cache, allowed[2])


def _case_errors(case: Case, got: _Outputs, exact: _Outputs) -> tuple[float, float, float, float]:
    """Largest logit difference; as a share of the scale; root mean square likewise; largest cache difference likewise."""
    real = case.mask > 0
    # A graph with one row of logits a call leaves the others NaN as a whole; a single NaN in a row is an error and stays.
    given = real & ~np.isnan(got.logits).all(-1)
    absolute, relative, rms = _errors(got.logits[given], exact.logits[given])
    cache = [_errors(_attended(g, real), _attended(e, real))[1] for g, e in zip(got.cache, exact.cache, strict=True)]
    return absolute, relative, rms, float(np.max(cache))


def _attended(cache: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[B, H, T, D] -> the vectors of attended positions."""
    return cache.transpose(0, 2, 1, 3)[keys]


def _errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float, float]:
    """Largest difference; the same and the root mean square as shares of the largest magnitude of `want`. NaN when there is a NaN."""
    scale = float(np.abs(want).max()) or 1.0
    difference = np.abs(got - want)
    absolute = float(difference.max())
    return absolute, absolute / scale, float(np.sqrt(np.square(difference, dtype=np.float64).mean())) / scale


@contextmanager
def _runnable(path: Path, emulated: bool) -> Iterator[Path]:
    """The graph to run: itself, or for bfloat16 a float32 twin that lies beside it for a moment and reads the same weights."""
    if not emulated:
        yield path
        return
    import onnx

    from sa_export.hf.twin import float32_twin

    twin = float32_twin(onnx.load(path, load_external_data=False))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".float32-", suffix=".onnx") as file:
        file.write(twin.SerializeToString())
        file.flush()
        yield Path(file.name)
