"""Where a checkpoint lies: a folder that exists, or a hub id that is fetched into the cache first."""

from __future__ import annotations

import re
from pathlib import Path

from sa_export.errors import UserError
from sa_export.hf.progress import Progress, silent
from sa_export.hf.quiet import sentence_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_FOREIGN = ("*/*", "consolidated*", "*.gguf")
"""Never fetched: other formats in subfolders (onnx/, original/, gguf/) and duplicates of the same weights."""


def resolve_source(
    source: str | Path,
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    remote_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """The local folder of a checkpoint. The network is touched only when `source` is no folder here and has the form of a hub id.

    Args:
        source: a folder, or a hub id such as `org/name`.
        cache_dir, revision, token: as in `hf download`; they matter for a hub id only.
        weights: whether the weights are needed, or the configuration and the tokenizer suffice.
        remote_code: whether the checkpoint's own Python files are fetched, too.

    Raises:
        UserError: there is no such folder, or the hub does not give the checkpoint; the sentence says which and why.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists():
        hint = " GGUF files cannot be exported." if folder.suffix == ".gguf" else ""
        raise UserError(f"{text} is a file; give the folder that holds config.json and the weights.{hint}")
    if not _HUB_ID.fullmatch(text):
        raise UserError(f"{text} does not exist; give a folder with a Hugging Face checkpoint, or a hub id such as org/name.")
    return _fetch(text, cache_dir, revision, token, weights, remote_code, progress)


def _fetch(
    hub_id: str,
    cache_dir: str | Path | None,
    revision: str | None,
    token: str | None,
    weights: bool,
    remote_code: bool,
    progress: Progress,
) -> Path:
    from huggingface_hub import errors, snapshot_download

    def snapshot(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                cache_dir=cache_dir,
                revision=revision,
                token=token,
                allow_patterns=list(patterns),
                ignore_patterns=list(_FOREIGN),
            )
        )

    progress("download", None)
    where = f"{hub_id} is no folder here, and the Hugging Face hub"
    try:
        folder = snapshot(*_SIDE_FILES, *(("*.py",) if remote_code else ()))
        if weights:
            folder = snapshot("*.safetensors")
            if not any(folder.glob("*.safetensors")):
                folder = snapshot("pytorch_model*.bin")
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} asks for its licence to be accepted first; accept it on the model's page and pass a token (--token)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where} has it, but not the revision {revision!r}; give an existing branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{where} has no such model (or it is private: pass --token); check the spelling.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{where} cannot be reached and the cache does not hold it; give a local folder, or connect to the network."
        ) from error
    except (errors.HFValidationError, OSError) as error:
        raise UserError(f"{where} did not give it ({sentence_of(error).rstrip('.')}); give a local folder, or try again.") from error
    progress("download", 1.0)
    return folder
