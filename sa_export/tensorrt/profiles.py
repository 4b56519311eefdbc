"""Optimisation profiles of a decoder with an explicit cache: prefill, chunked prefill and decode.

Letters: B batch, S tokens of a call, P tokens in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa_export.errors import UserError

__all__ = ["Limits", "Profile", "Shape", "profiles_of"]

Shape = tuple[int, ...]

_CHUNK = 2048
"""Tokens of a chunk unless asked for: long enough to fill a GPU, short enough that decode steps of others do not wait for long."""


@dataclass(frozen=True)
class Limits:
    """What an engine must take.

    Attributes:
        max_batch, opt_batch: sequences of a call.
        max_seq: tokens of a sequence, prompt and answer together.
        opt_seq: tokens of the prompt that the prefill profile is tuned for.
        max_chunk: tokens of a call that has a cache in front of it.

    Raises:
        UserError: a number that makes no sense.
    """

    max_batch: int = 1
    max_seq: int = 4096
    opt_batch: int | None = None
    opt_seq: int | None = None
    max_chunk: int | None = None

    def __post_init__(self) -> None:
        for option, value, high, of in (
            ("--max-batch-size", self.max_batch, 65535, ""),
            ("--max-seq-len", self.max_seq, 2**30, ""),
            ("--opt-batch-size", self.opt_batch, self.max_batch, " (--max-batch-size)"),
            ("--opt-seq-len", self.opt_seq, self.max_seq, " (--max-seq-len)"),
            ("--max-chunk-len", self.max_chunk, self.max_seq, " (--max-seq-len)"),
        ):
            if value is not None and not 1 <= value <= high:
                raise UserError(f"{option} is {value}; allowed is an integer from 1 to {high}{of}.")

    @property
    def chunk(self) -> int:
        return self.max_chunk or min(self.max_seq, _CHUNK)


@dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest shape of each input; an input that is not named has a fixed shape."""

    name: str
    least: dict[str, Shape]
    usual: dict[str, Shape]
    most: dict[str, Shape]

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "min": self.least, "opt": self.usual, "max": self.most}


@dataclass(frozen=True)
class _Call:
    batch: int
    tokens: int
    cached: int


def profiles_of(model: Path, limits: Limits) -> list[Profile]:
    """The profiles of a decoder as `sa-export export` writes it.

    `prefill` begins a sequence (no cache), `chunk` goes on with one, `decode` takes one token. A model without cache inputs has `prefill` alone.
    The lengths of the mask are those of cache and tokens together, at the bounds too: the largest mask is longer than `max_seq`
    by a chunk, because TensorRT checks every bound for itself.

    Raises:
        UserError: the model is no decoder, or an input has a fixed length that the limits do not fit.
    """
    import onnx

    from sa_export.check.decoder import DecoderInputs

    inputs = DecoderInputs.from_model(model)
    graph = onnx.load(model, load_external_data=False).graph
    declared = {v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in graph.input if v.name in inputs.names}
    batch, most = limits.opt_batch or 1, limits.max_batch
    usual = limits.opt_seq or max(1, limits.max_seq // 2)
    chunk, last = limits.chunk, limits.max_seq - 1
    calls = {"prefill": (_Call(1, 1, 0), _Call(batch, usual, 0), _Call(most, limits.max_seq, 0))}
    if inputs.past:
        calls["chunk"] = (_Call(1, 1, 0), _Call(batch, min(chunk, usual), min(usual, last)), _Call(most, chunk, last))
        calls["decode"] = (_Call(1, 1, 0), _Call(batch, 1, min(usual, last)), _Call(most, 1, last))
    out = []
    for name, bounds in calls.items():
        shapes = [{n: _shape(n, call, dims, model) for n, dims in declared.items() if None in dims} for call in bounds]
        out.append(Profile(name, *shapes))
    return out


def _shape(name: str, call: _Call, declared: list[int | None], model: Path) -> Shape:
    if name.startswith("past_key_values."):
        wanted: tuple[int | None, ...] = (call.batch, declared[1], call.cached, declared[3])
    else:
        wanted = (call.batch, call.tokens + (call.cached if name == "attention_mask" else 0))
    if len(wanted) != len(declared):
        raise UserError(f"{model}: the input {name} has {len(declared)} axes, {len(wanted)} are needed; export the model again.")
    for got, want in zip(declared, wanted, strict=True):
        if got is not None and got != want:
            raise UserError(
                f"{model}: the input {name} has the fixed length {got} where {want} is asked for; export the model with free batch and lengths."
            )
    return tuple(w for w in wanted if w is not None)
