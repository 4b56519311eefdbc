"""Tiny random models of the families that people export, and what each of their layers truly computes.

The configurations hold for every release of transformers that a route needs, so they name nothing that was renamed between 4.57 and 5.x.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FAMILIES", "WINDOW", "Family", "build", "save"]

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 2, 4, 2, 16, 64
WINDOW = 8
"""Keys that a sliding layer sees; shorter than every prompt of the checks, so that a window that is lost shows in the numbers."""

FULL, WINDOWED, SINKS, ALIBI = "full", "window", "sinks", "alibi"
BIAS, DIFFERENCE, SELECTED = "bias", "difference", "selected"


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: name of the configuration class in transformers.
        options: what differs from `COMMON`.
        layers: what each layer is: `full` (causal with padding, perhaps soft-capped: to be rewritten), `window`, `sinks`, `alibi`, `bias`
            (learned), `difference` (of two attentions) or `selected` (keys chosen by an index of their own); all to be declined, for
            that reason. Layers without attention are left out.
        only: True when `COMMON` does not apply and `options` are the whole configuration.
        like: models whose checkpoints have this shape but ship their own code.
        routes: the only routes that it is frozen of; empty: all that take every family.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = (FULL,) * LAYERS
    only: bool = False
    like: str = ""
    routes: tuple[str, ...] = ()

    @property
    def head_size(self) -> int:
        """Of the cached keys and values, where they are equally long."""
        return self.options.get("head_dim") or HEADS * HEAD_SIZE // self.options.get("num_attention_heads", HEADS)


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 256,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256}
_FALCON = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")}
_MIXED = ["sliding_attention", "full_attention"]
_BARE = {"vocab_size": VOCABULARY}
_LATENT = {
    "head_dim": None,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
"""Multi-head latent attention of DeepSeek-V3."""
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "internlm2": Family("LlamaConfig", {"num_key_value_heads": 1, "rope_theta": 1e6}, like="InternLM2 (packed wqkv unpacked)"),
    "internlm3": Family("LlamaConfig", {"attention_bias": True, "head_dim": 32}, like="InternLM3 (qkv_bias, head_dim of its own)"),
    "qwen2": Family("Qwen2Config", {"head_dim": None}),
    "qwen2-window": Family(
        "Qwen2Config",
        {"head_dim": None, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        (FULL, WINDOWED),
    ),
    "qwen3": Family("Qwen3Config"),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True},
    ),
    "mistral": Family("MistralConfig", {"sliding_window": None}),
    "mistral-window": Family("MistralConfig", {"sliding_window": WINDOW}, (WINDOWED, WINDOWED)),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "phi": Family("PhiConfig", {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": None, "partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3Config", {"head_dim": None, "sliding_window": None, "original_max_position_embeddings": 256}),
    "gemma": Family("GemmaConfig"),
    "gemma2": Family(
        "Gemma2Config", {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}, (WINDOWED, FULL)
    ),
    "gemma3": Family("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24}, (WINDOWED, FULL)),
    "glm": Family("GlmConfig", {"attention_bias": True}),
    "glm4": Family("Glm4Config", {"attention_bias": True}),
    "gpt-neox": Family("GPTNeoXConfig", {"head_dim": None, "num_key_value_heads": None, "rotary_pct": 0.5}),
    "gpt2": Family("GPT2Config", _GPT2, only=True),
    "gptj": Family("GPTJConfig", {**_GPT2, "rotary_dim": 8}, only=True),
    "gpt-bigcode": Family("GPTBigCodeConfig", {**_GPT2, "multi_query": True}, only=True),
    "codegen": Family("CodeGenConfig", {**_GPT2, "rotary_dim": 8, "n_ctx": 256}, only=True),
    "opt": Family(
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
        only=True,
    ),
    "falcon": Family("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "alibi": False}, only=True),
    "falcon-mqa": Family("FalconConfig", {**_FALCON, "multi_query": True, "alibi": False}, only=True),
    "olmo2": Family("Olmo2Config", {"head_dim": None}),
    "starcoder2": Family("Starcoder2Config", {"head_dim": None, "sliding_window": None}),
    "stablelm": Family("StableLmConfig", {"head_dim": None, "partial_rotary_factor": 0.5}),
    "cohere": Family("CohereConfig", {"head_dim": None, "use_qk_norm": True}),
    "cohere2": Family("Cohere2Config", {"sliding_window": WINDOW, "layer_types": _MIXED}, (WINDOWED, FULL)),
    "granite": Family("GraniteConfig", {"head_dim": None, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "smollm3": Family("SmolLM3Config", {"head_dim": None, "no_rope_layers": [1, 0]}),
    "deepseek-v3": Family(
        "DeepseekV3Config",
        {
            **_LATENT,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": _MIXED},
        (f"{WINDOWED}+{SINKS}", SINKS),
    ),
    "bloom": Family(
        "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": LAYERS, "n_head": HEADS}, (ALIBI,) * LAYERS, only=True
    ),
    "mpt": Family(
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 256, "expansion_ratio": 1},
        (ALIBI,) * LAYERS,
        only=True,
    ),
    "xglm": Family(
        "XGLMConfig",
        {**_BARE, "d_model": 64, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": HEADS, "max_position_embeddings": 256},
        only=True,
        routes=("torchscript-eager-18",),
    ),
    "openai-gpt": Family(
        "OpenAIGPTConfig",
        {**_BARE, "n_positions": 256, "n_embd": 64, "n_layer": LAYERS, "n_head": HEADS},
        only=True,
        routes=("torchscript-eager-18-nopast",),
    ),
    "gpt-neo": Family(
        "GPTNeoConfig",
        {
            **_BARE,
            "hidden_size": 64,
            "num_layers": LAYERS,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": HEADS,
            "intermediate_size": 48,
            "window_size": WINDOW,
            "max_position_embeddings": 256,
        },
        (FULL, WINDOWED),
        only=True,
        routes=("torchscript-eager-18",),
    ),
    "lfm2": Family(
        "Lfm2Config",
        {"head_dim": None, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        (FULL,),
        routes=("torchscript-eager-18-nopast",),
    ),
    "zaya": Family(
        "ZayaConfig",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "layer_types": ["hybrid"] * 2, "router_hidden_size": 16},
        routes=("torchscript-eager-18-nopast",),
    ),
    "ministral3": Family(
        "Ministral3Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
        routes=("dynamo-sdpa-20",),
    ),
    "mimo-v2": Family(
        "MiMoV2FlashConfig",
        {
            **_EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "v_head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "mlp_layer_types": ["dense", "sparse"],
        },
        (f"{WINDOWED}+{SINKS}", FULL),
        routes=("dynamo-sdpa-20",),
    ),
    "granite-swa": Family(
        "GraniteSWAConfig",
        {"head_dim": None, "sliding_window": WINDOW, "layer_types": _MIXED, "layer_rope_theta": [1e4, 1e4]},
        (f"{WINDOWED}+{SINKS}", SINKS),
        routes=("dynamo-sdpa-20",),
    ),
    "diffllama": Family("DiffLlamaConfig", {}, (DIFFERENCE,) * LAYERS, routes=("dynamo-sdpa-20",)),
    "doge": Family("DogeConfig", {"head_dim": None}, (BIAS,) * LAYERS, routes=("dynamo-sdpa-20",)),
    "deepseek-v3.2": Family(
        "DeepseekV32Config",
        {
            **_EXPERTS,
            **_LATENT,
            "n_group": 1,
            "topk_group": 1,
            "index_topk": 4,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["indexed_attention"] * LAYERS,
        },
        (SELECTED,) * LAYERS,
        routes=("dynamo-sdpa-20-nopast",),
    ),
}


def build(name: str, attention: str = "eager", dtype: str = "float32", vocabulary: int = VOCABULARY) -> Any:
    """A model of the family with weights that depend on their names and shapes alone.

    Weights take one of four values a tensor: attention is far from uniform, and the files compress to a tenth.
    """
    import torch
    import transformers

    family = FAMILIES[name]
    options = {k: v for k, v in {**({} if family.only else COMMON), **family.options}.items() if v is not None or k == "sliding_window"}
    config = getattr(transformers, family.config)(**{**options, **_TOKENS, "vocab_size": vocabulary})
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError:  # the class has no sdpa: users get eager
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # the other forms of expert layers cannot be exported
    with torch.no_grad():
        for key, tensor in {**dict(model.named_parameters()), **_weights_in_buffers(model)}.items():
            tensor.copy_(_draw(key, tensor))
    return model.to(getattr(torch, dtype))


def save(name: str, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """The same model as a checkpoint with a tokenizer, for routes that read a folder."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    build(name, vocabulary=vocabulary).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def _weights_in_buffers(model: Any) -> dict[str, Any]:
    """Learned buffers (the router correction of DeepSeek)."""
    return {k: b for k, b in model.named_buffers() if k.endswith("e_score_correction_bias")}


def _draw(key: str, like: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {tuple(like.shape)}".encode()))
    level = torch.randint(0, 4, tuple(like.shape), generator=generator).float() - 1.5
    if like.ndim < 2:
        return 0.125 * level + (1.0 if key.endswith("weight") else 0.0)  # norms around 1, biases around 0
    # Products of unit variance with a little more, so that logits of attention spread over several units.
    return level * (1.25 / like.shape[-1] ** 0.5 if "embed" not in key and "wte" not in key else 0.5)
