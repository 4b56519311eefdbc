"""A Hugging Face checkpoint in memory: configuration, causal language model and, where there is one, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.architecture import check_architecture, read_config
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import quiet_libraries, sentence_of
from sa_export.hf.skeleton import build_skeleton
from sa_export.hf.source import resolve_source
from sa_export.hf.weights import check_weights, stored_dtype

DTYPES = ("float32", "float16", "bfloat16")
_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A causal language model, in evaluation mode, on the CPU.

    Its parameters are in `dtype`, unless it was loaded `deferred`: then they are what the files hold (see `in_dtype`). From a
    configuration alone it has none: they are fake tensors.
    """

    source: str
    """What the user named: a folder or a hub id."""
    folder: Path
    """Where its files lie."""
    config: Any
    model: Any = field(repr=False)
    tokenizer: Any | None = field(repr=False)
    dtype: str
    """One of `DTYPES`: what is exported."""
    random_weights: bool
    trust_remote_code: bool
    notes: tuple[str, ...] = ()
    """Sentences that the user should see: what was found and is not an error."""
    files: tuple[Path, ...] = ()
    """The weight files; none for random weights and for a configuration alone."""
    loaded_dtype: str | None = None
    """The element type of `model`'s parameters; None when they have no values."""

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the language model (the whole of it for a text-only model)."""
        return self.config.get_text_config(decoder=True)


def load_checkpoint(
    source: str | Path,
    *,
    dtype: str | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    from_config: bool = False,
    deferred: bool = False,
    num_layers: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Checkpoint:
    """Loads a decoder-only causal language model. The network is used only when `source` is a hub id.

    The weights are held once, in `dtype`: they go from the memory-mapped file to their place tensor by tensor. Weights that are stored in
    `dtype` stay in the mapped file and are read when they are used.

    Args:
        source: a folder with config.json and weights, or a hub id such as `org/name`.
        dtype: float32, float16 or bfloat16 (fp32, fp16, bf16 are understood); None keeps the checkpoint's own.
        cache_dir, revision, token: as in `hf download`; for a hub id.
        trust_remote_code: lets Python code of the checkpoint run.
        random_weights: builds the model from the configuration alone, its weights drawn with `seed`.
        from_config: builds the model from the configuration alone, without any weights.
        deferred: leaves weights that are stored in another type than `dtype` as they are, so that nothing is read; `in_dtype` converts.
        num_layers: with `random_weights` or `from_config`: how many layers the model gets (1 .. the configuration's).
        progress: stages "download" and "load".

    Raises:
        UserError: anything that is wrong with the checkpoint or the arguments, in one sentence.
    """
    named = str(source)
    chosen = _dtype(dtype) if dtype is not None else None
    if random_weights and from_config:
        raise UserError("Random weights and no weights exclude each other; give --random-weights or --from-config.")
    unread = random_weights or from_config
    if num_layers is not None and not unread:
        raise UserError("num_layers makes a test model and goes with random weights or none; add --random-weights or --from-config.")
    folder = resolve_source(
        source,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        weights=not unread,
        remote_code=trust_remote_code,
        progress=progress,
    )
    raw = read_config(folder)
    progress("load", None)
    with quiet_libraries():
        check_architecture(raw, named, trust_remote_code=trust_remote_code)
        files = () if unread else check_weights(folder)
        config = _config(folder, named, trust_remote_code)
        chosen = chosen or _own_dtype(config, named)
        loaded = None if from_config else (stored_dtype(files) or chosen) if deferred and files else chosen
        notes: tuple[str, ...] = ()
        if num_layers is not None:
            _shorten(config.get_text_config(decoder=True), num_layers)
        if loaded is None:
            model = build_skeleton(config, named, chosen, trust_remote_code=trust_remote_code)
        elif random_weights:
            model = _random_model(config, named, loaded, seed, trust_remote_code)
        else:
            model, notes = _pretrained_model(folder, config, named, loaded, trust_remote_code)
        tokenizer, more = _tokenizer(folder, trust_remote_code)
    model.eval().requires_grad_(False)
    progress("load", 1.0)
    return Checkpoint(
        named, folder, model.config, model, tokenizer, chosen, random_weights, trust_remote_code, (*notes, *more), files, loaded
    )


def in_dtype(checkpoint: Checkpoint) -> Checkpoint:
    """A deferred checkpoint with its model in its `dtype`: loaded again where the files hold another one, itself otherwise.

    Raises:
        UserError: as `load_checkpoint`.
    """
    if checkpoint.loaded_dtype == checkpoint.dtype or not checkpoint.files:
        return checkpoint
    named = checkpoint.source
    with quiet_libraries():
        config = _config(checkpoint.folder, named, checkpoint.trust_remote_code)
        model, _ = _pretrained_model(checkpoint.folder, config, named, checkpoint.dtype, checkpoint.trust_remote_code)
    model.eval().requires_grad_(False)
    return replace(checkpoint, model=model, config=model.config, loaded_dtype=checkpoint.dtype)


def _dtype(name: str) -> str:
    known = _ALIASES.get(name, name)
    if known not in DTYPES:
        raise UserError(f"dtype is {name!r}; allowed is {', '.join(DTYPES)}.")
    return known


def _own_dtype(config: Any, named: str) -> str:
    own = str(getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None) or "float32")
    own = own.removeprefix("torch.")
    if own not in DTYPES:
        raise UserError(f"{named} is stored in {own}; choose what to export with --dtype ({', '.join(DTYPES)}).")
    return own


def _config(folder: Path, named: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration class, possibly the checkpoint's own, makes of a bad file
        raise UserError(f"{named}: its config.json is refused by transformers: {sentence_of(error)}") from error


def _pretrained_model(folder: Path, config: Any, named: str, dtype: str, trust_remote_code: bool) -> tuple[Any, tuple[str, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except MemoryError as error:
        raise UserError(f"{named} does not fit into memory in {dtype}; use a machine with more, or a narrower --dtype.") from error
    except Exception as error:
        raise UserError(f"{named} cannot be loaded: {sentence_of(error)}") from error
    # transformers fills what a checkpoint lacks with random numbers and goes on.
    for what, names in (("lacks", info["missing_keys"]), ("has another shape for", {key[0] for key in info["mismatched_keys"]})):
        if names:
            example = min(names)
            raise UserError(
                f"{named} {what} {len(names)} of the tensors that its architecture needs (such as {example}); "
                f"the weights and config.json do not belong together, fetch the checkpoint again."
            )
    unused = info["unexpected_keys"]
    if unused:
        return model, (f"{len(unused)} tensors of the checkpoint are not used by the architecture (such as {min(unused)}).",)
    return model, ()


def _random_model(config: Any, named: str, dtype: str, seed: int, trust_remote_code: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
        except Exception as error:
            raise UserError(f"{named}: no model can be built from its config.json: {sentence_of(error)}") from error


def _shorten(config: Any, num_layers: int) -> None:
    """Cuts the configuration to its first layers, with every list in it that has one entry a layer."""
    have = config.num_hidden_layers
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= have:
        raise UserError(f"num_layers is {num_layers!r}; allowed is an integer from 1 to {have}, the layers of the checkpoint.")
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == have:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def _tokenizer(folder: Path, trust_remote_code: bool) -> tuple[Any | None, tuple[str, ...]]:
    """The tokenizer, or None with the reason where files are there and cannot be used: an export does not depend on it."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None, ()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True), ()
    except Exception as error:
        return None, (f"The tokenizer of the checkpoint cannot be loaded: {sentence_of(error)}",)
