"""Tiny random checkpoints, and a generation loop over an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 1/sqrt(12) is no power of two: a scale that is rounded or lost shows
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Weights large enough for attention to be far from uniform, so that a wrong mask changes the logits.
    "initializer_range": 0.15,
}


def save_checkpoint(folder: Path, config_class: str = "LlamaConfig", *, seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**TINY, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        fast.save_pretrained(folder)
    return folder


class Session:
    """A minimal generation loop over an exported model: the caller gives ids and mask, the cache is kept here."""

    def __init__(self, model_path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.run = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        self.past: dict[str, np.ndarray] = {}

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits for the new `ids` [B, S]; `mask` [B, P + S] covers the tokens before, too."""
        if not self.past:
            for value in self.run.get_inputs():
                if value.name.startswith("past_key_values."):
                    element = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
                    self.past[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), element)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.past}
        logits, *present = self.run.run(None, feed)
        self.past = dict(zip(self.past, present, strict=True))
        return logits.astype(np.float32)
