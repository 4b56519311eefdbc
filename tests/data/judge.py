"""Runs a graph and its rewritten twin, at alpha 1, in every way in which generation calls it, in ONNX Runtime.

The untouched graph is the oracle, never the torch model: exporters change models. Compared are the logits of real tokens and the
presents of real keys; what lies under padding means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from graph_passes.config import Config
from graph_passes.op import Policy
from graph_passes.pipeline import rewrite
from graph_passes.report import RewriteReport
from tests.data.families import HEAD_SIZE, VOCABULARY, WINDOW
from tests.graph_passes.builder import padding_mask

__all__ = ["EXACT", "SITUATIONS", "Difference", "Judgement", "Runner", "feeds", "judge", "tolerance"]

EXACT = Config(Policy(alpha=(1.0,), min_length=0))
"""Every site goes through the new node's own code, and keeps everything."""

SITUATIONS: dict[str, tuple[int, int, int, str]] = {
    "prefill": (1, 30, 0, "none"),
    "prefill, left padding": (3, 20, 0, "left"),
    "prefill, right padding": (3, 20, 0, "right"),
    "chunk": (1, 18, 13, "none"),
    "chunk, left padding": (2, 18, 13, "left"),
    "decode": (2, 1, 21, "none"),
    "decode, left padding": (2, 1, 21, "left"),
}
"""Batch, rows, past and padding of each call. All are longer than `families.WINDOW`; more rows than 16 go through the sparse path."""


@dataclass(frozen=True)
class Difference:
    """One call: the largest difference of an output as a share of its largest magnitude, or why it says nothing.

    Attributes:
        skipped: the original refuses the call (ONNX Runtime's first words), or the graph has no such input.
    """

    situation: str
    relative: float = 0.0
    output: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Judgement:
    """What became of one graph.

    Attributes:
        half: it computes in float16 or coarser.
    """

    report: RewriteReport
    half: bool
    differences: tuple[Difference, ...] = ()
    broken: str = ""
    """Why the rewritten graph does not load or run although the original does."""
    unusable: str = ""
    """Why the original itself cannot be run by ONNX Runtime on a CPU."""
    notes: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> float:
        return max((d.relative for d in self.differences if not d.skipped), default=0.0)

    @property
    def equal(self) -> bool:
        """The twin ran wherever the original did, and agrees."""
        return not self.broken and self.worst <= tolerance(self.half)


def tolerance(half: bool) -> float:
    """The relative difference allowed."""
    return 2e-2 if half else 1e-4


class Runner:
    """A graph in ONNX Runtime on the CPU.

    Attributes:
        shapes, types: of its inputs, by name.
        outputs: their names.
        operators: what its graph is made of.
        ring: caches of sliding layers are rings of fixed capacity.
    """

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        nodes = onnx.load(str(path), load_external_data=False).graph.node
        self.operators = {n.op_type for n in nodes}
        self.ring = any(a.name == "sliding_window_cache" and a.i for n in nodes for a in n.attribute)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # transformers' exporter names a fixed length by its digits.
        self.shapes = {i.name: [int(n) if str(n).isdigit() else n for n in i.shape] for i in self._session.get_inputs()}
        self.types = {i.name: _NUMPY[i.type] for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]
        self.half = any(o.type == "tensor(float16)" for o in self._session.get_outputs())

    def __call__(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(None, data), strict=True))


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def judge(path: Path, *, head_size: int = HEAD_SIZE) -> Judgement:
    """Rewrites a graph beside itself and compares.

    Args:
        path: an ONNX file in a folder that may be written.
        head_size: of the cache, where the graph does not say.
    """
    twin = path.with_suffix(".sa.onnx")
    report = rewrite(path, twin, EXACT, force=True)
    try:
        original = Runner(path)
    except Exception as error:  # ONNX Runtime has no public base class of its errors
        return Judgement(report, False, unusable=_first_words(error))
    half = original.half or "MatMulNBits" in original.operators  # it rounds its inputs to 8 bits
    if not report.ok:
        return Judgement(report, half)
    try:
        changed = Runner(twin)
    except Exception as error:
        return Judgement(report, half, broken=_first_words(error))
    counts = "GroupQueryAttention" in original.operators
    differences: list[Difference] = []
    for name, (batch, rows, past, pad) in (_fixed(original) or SITUATIONS).items():
        data = feeds(original, batch, rows, past, pad, head_size)
        if isinstance(data, str):
            differences.append(Difference(name, skipped=data))
            continue
        try:
            expected = original(data)
        except Exception as error:
            differences.append(Difference(name, skipped=_first_words(error)))
            continue
        try:
            got = changed(data)
        except Exception as error:
            return Judgement(report, half, tuple(differences), broken=f"{name}: {_first_words(error)}")
        mask = padding_mask(batch, past + rows, pad)
        # GroupQueryAttention only counts the ones of the mask: the real keys of an item lie in front of its cache, wherever the zeros were.
        keys = np.sort(mask, 1)[:, ::-1] if counts else mask
        if not all(np.isfinite(v).all() for v in _real(expected, mask, keys, rows).values()):
            differences.append(Difference(name, skipped="the original gives numbers that are not finite"))
            continue
        compared = [Difference(name, relative, output) for output, relative in _compare(expected, got, mask, keys, rows)]
        differences.append(max(compared, key=lambda d: d.relative, default=Difference(name, skipped="no output could be compared")))
    return Judgement(report, half, tuple(differences))


def _fixed(session: Runner) -> dict[str, tuple[int, int, int, str]]:
    """The calls that a graph with a fixed number of rows allows; none when it is free."""
    batch, rows = session.shapes.get("input_ids", ["", ""])[:2]
    if not isinstance(rows, int):
        return {}
    batch = batch if isinstance(batch, int) else 2
    past = next((shape[2] for name, shape in session.shapes.items() if _is_cache(name)), 0)
    return {f"as exported, {pad} padding": (batch, rows, past, pad) for pad in ("none", "left", "right")}


def feeds(session: Runner, batch: int, rows: int, past: int, pad: str, head_size: int = HEAD_SIZE) -> dict[str, np.ndarray] | str:
    """Inputs of a call by the names that exporters use, or why the graph cannot be called so."""
    mask = padding_mask(batch, past + rows, pad)
    draw = np.random.default_rng(1)
    has_past = any(_is_cache(n) for n in session.shapes)
    if past and not has_past:
        return "the graph has no past"
    if pad != "none" and "attention_mask" not in session.shapes:
        return "the graph takes no padding"
    values = {
        "input_ids": draw.integers(3, VOCABULARY, (batch, rows)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
        "past_sequence_length": np.array(past),
        "use_cache_branch": np.array([past > 0]),
    }
    out: dict[str, np.ndarray] = {}
    for name, shape in session.shapes.items():
        if _is_cache(name):
            length = WINDOW if session.ring and "sliding" in str(shape[2]) else past
            size = shape[3] if isinstance(shape[3], int) else head_size
            value = draw.standard_normal([batch, shape[1], length, size])
        else:
            value = values.get(name)
        if value is None:
            return f"the input {name} is not known"
        fixed = [(n, m) for n, m in zip(shape, value.shape, strict=False) if isinstance(n, int) and n != m]
        if len(shape) != value.ndim or fixed:
            return f"the graph fixes {name} to {shape}"
        out[name] = np.ascontiguousarray(value).astype(session.types[name])
    return out


def _is_cache(name: str) -> bool:
    return re.search(r"past_key|past_value|past\.", name) is not None


def _compare(
    expected: dict[str, np.ndarray], got: dict[str, np.ndarray], mask: np.ndarray, keys: np.ndarray, rows: int
) -> Iterator[tuple[str, float]]:
    """Each output and its relative difference over what is real."""
    ours = _real(got, mask, keys, rows)
    for name, value in _real(expected, mask, keys, rows).items():
        yield name, _relative(value, ours[name]) if value.shape == ours[name].shape else float("inf")


def _real(outputs: dict[str, np.ndarray], mask: np.ndarray, keys: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """The float outputs; of logits [B, S, V] the rows where `mask` [B, T] is 1, of presents [B, H, T, D] those where `keys` [B, T] is."""
    out = {}
    for name, value in outputs.items():
        if value.dtype.kind != "f":
            continue
        real = value
        if value.ndim == 3 and value.shape[:2] == (len(mask), rows):
            real = value[mask[:, -rows:].astype(bool)]
        elif value.ndim == 4 and value.shape[2] == mask.shape[1]:
            real = value.swapaxes(1, 2)[keys.astype(bool)]
        out[name] = real.astype(np.float64)
    return out


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    if not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0) / max(float(np.abs(a).max(initial=0.0)), 1e-30))


def _first_words(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].split("Status Message: ")[-1].split("FAIL : ")[-1]
    return re.sub(r"(/[\w.~-]+){2,}", "", line)[:200]
