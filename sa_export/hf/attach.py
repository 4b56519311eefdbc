"""Weights for models that were exported from a configuration alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.export import give_weights, placement_notes
from sa_export.hf.folder import MANIFEST
from sa_export.hf.load import in_dtype, load_checkpoint
from sa_export.hf.placement import Placement
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import quiet_libraries
from sa_export.hf.trace import DATA_FILE
from sa_export.hf.verify import Verification, memory_shortage, verify_export

__all__ = ["AttachResult", "attach_weights"]


@dataclass(frozen=True)
class AttachResult:
    """What was attached."""

    models: tuple[Path, ...]
    placement: Placement
    verification: Verification | None
    """Of the first model; None when it was not asked for or memory is short."""
    notes: tuple[str, ...]


def attach_weights(
    models: Sequence[Path],
    source: str | Path,
    *,
    weights: str = "auto",
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> AttachResult:
    """Gives pending models the weights of a checkpoint of the same configuration; they are changed in place, all or none.

    Args:
        models: ONNX files of one folder: an export with `from_config`, and what was rewritten from it.
        source: the checkpoint: a folder or a hub id (`load_checkpoint`, with `cache_dir`, `revision`, `token`, `trust_remote_code`).
        weights: one of `placement.WEIGHTS`.
        verify: compares the first model with the torch model.
        progress: stages "download", "load", "write", "verify".

    Raises:
        UserError, GraphError: a model is not pending, the checkpoint does not fit it, there is no space, or the comparison fails. The
            models are then what they were before.
    """
    from graph_passes import model_io

    paths = tuple(dict.fromkeys(Path(path).expanduser().absolute() for path in models))
    folder = paths[0].parent
    protos = [_pending(path, folder) for path in paths]
    dtype = _element_type(protos[0])
    checkpoint = load_checkpoint(
        source,
        dtype=dtype,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        deferred=True,
        progress=progress,
    )
    before = {path: path.read_bytes() for path in paths}
    may_make = (folder / DATA_FILE, *(folder / path.relative_to(checkpoint.folder) for path in checkpoint.files))
    made = [path for path in may_make if not path.exists()]
    if (folder / DATA_FILE).exists():
        raise UserError(f"{folder / DATA_FILE} exists; move it away, the weights are written to a file of that name.")
    try:
        with quiet_libraries():
            placement = give_weights(protos, checkpoint, folder, weights, progress=progress)
            for path, proto in zip(paths, protos, strict=True):
                model_io.write(proto, path)
            notes = [*checkpoint.notes, *placement_notes(placement, checkpoint)]
            shortage = memory_shortage(sum(p.numel() for p in checkpoint.model.parameters()), checkpoint.dtype) if verify else None
            if shortage is not None:
                notes.append(shortage)
            verification = None
            if verify and shortage is None:
                verification = verify_export(paths[0], in_dtype(checkpoint), progress=progress)
        _note_in_manifest(folder, checkpoint.source, placement, verification, notes)
    except BaseException:
        for path, content in before.items():
            path.write_bytes(content)
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return AttachResult(paths, placement, verification, tuple(notes))


def _pending(path: Path, folder: Path) -> Any:
    from graph_passes import external_data, model_io

    if path.parent != folder:
        raise UserError(f"{path} lies in another folder than the first model; attach the models of one folder at a time.")
    model = model_io.load(path)
    if not external_data.is_pending(model):
        raise UserError(f"{path} has its weights already; only models that were exported with --from-config wait for them.")
    return model


def _element_type(model: Any) -> str:
    """What the model computes in: the type of its key/value cache."""
    from onnx import TensorProto

    cache = next((v for v in model.graph.input if v.name.startswith("past_key_values.")), None)
    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    found = names.get(cache.type.tensor_type.elem_type) if cache is not None else None
    if found is None:
        raise UserError("The model is no export of this tool with a key/value cache; attach weights to an export with --from-config.")
    return found


def _note_in_manifest(folder: Path, source: str, placement: Placement, verification: Verification | None, notes: list[str]) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = json.loads(path.read_text(encoding="utf-8"))
    made = placement.files if placement.how != "reference" else tuple(name for name in placement.files if name == DATA_FILE)
    manifest["files"] = sorted({*manifest["files"], *made})
    manifest["weights"] = {**placement.as_dict(), "attached_from": source}
    manifest["verification"] = verification.as_dict() if verification else None
    manifest["notes"] = [*manifest["notes"], *notes]
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
