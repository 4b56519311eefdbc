"""Whether a configuration describes what can be exported: a decoder-only causal language model with ordinary weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sa_export.errors import UserError

_ONLY = "only decoder-only causal language models can be exported"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint as plain values.

    Raises:
        UserError: `folder` is no checkpoint, or holds another kind of one.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} is a PEFT adapter, not a model; merge it into its base model and give the merged folder.")
        if any(folder.glob("*.gguf")):
            raise UserError(f"{folder} holds GGUF files; give the Hugging Face checkpoint (config.json and safetensors) of the model.")
        raise UserError(f"{folder} is no Hugging Face checkpoint: it has no config.json; give a folder with config.json and weights.")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch or save the checkpoint again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type", ""), str):
        raise UserError(f"{path} is no model configuration; fetch or save the checkpoint again.")
    return raw


def check_architecture(raw: dict[str, Any], source: str, *, trust_remote_code: bool) -> None:
    """Refuses a configuration that no exporter here can serve, before anything heavy is loaded.

    Args:
        raw: `config.json`.
        source: how the user named the checkpoint, for the sentence.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        UserError: unknown architecture; encoder-decoder; encoder or otherwise bidirectional; no language-model head; quantized
            weights; code of the checkpoint is needed and was not allowed.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    model_type = raw.get("model_type", "")
    architectures = tuple(str(name) for name in raw.get("architectures") or ())
    named = f"{source} ({', '.join(architectures) or model_type or 'no model_type'})"
    if raw.get("is_encoder_decoder"):
        raise UserError(f"{named} is an encoder-decoder; {_ONLY}.")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "an unnamed method"
        raise UserError(
            f"{named} holds weights quantized with {method}; only float32, float16 and bfloat16 weights can be exported, "
            f"so give the unquantized checkpoint."
        )
    own_code = raw.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING:
        if not own_code:
            raise UserError(
                f"{source} has model_type {model_type!r}, which the installed transformers does not know; "
                f"install a release that does, or give another checkpoint."
            )
        if not trust_remote_code:
            raise UserError(f"{named} needs Python code from the checkpoint; read it, and allow it with --trust-remote-code.")
        if "AutoModelForCausalLM" not in own_code:
            raise UserError(f"{named} offers no AutoModelForCausalLM in its own code; {_ONLY}.")
        return
    # BERT's kin share one class for both directions, and `is_decoder` is the switch.
    if (model_type in MASKED and not raw.get("is_decoder")) or raw.get("is_causal") is False:
        raise UserError(f"{named} is an encoder: its attention is bidirectional; {_ONLY}.")
    text = raw.get("text_config")
    configs = (raw, text) if isinstance(text, dict) else (raw,)
    if any(config.get("use_bidirectional_attention") in (True, "all") for config in configs):
        raise UserError(f"{named} is an encoder: its attention is bidirectional; {_ONLY}.")
    if model_type not in CAUSAL or (architectures and not _has_causal_head(architectures, model_type, own_code, CAUSAL)):
        raise UserError(f"{named} has no causal language-model head; {_ONLY}.")


def _has_causal_head(architectures: tuple[str, ...], model_type: str, own_code: dict[str, Any], causal: dict[str, str]) -> bool:
    suffixes = ("ForCausalLM", "LMHeadModel")
    return "AutoModelForCausalLM" in own_code or any(a == causal[model_type] or a.endswith(suffixes) for a in architectures)
