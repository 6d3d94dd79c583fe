"""Tiny models of real families, built from their configs: what the graph tests run on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 128}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 32}),
    "phi3": ("Phi3Config", SMALL),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": 21}),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 16, "sliding_window": 8}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "olmo2": ("Olmo2Config", SMALL),
    "cohere": ("CohereConfig", SMALL),
    "olmo": ("OlmoConfig", {**SMALL, "clip_qkv": 0.5}),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "gpt_oss": (
        "GptOssConfig",
        {**SMALL, "head_dim": 16, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def tiny(family: str, implementation: str = "sdpa", **options: Any) -> nn.Module:
    """A randomly initialised two-layer causal language model in eval mode, the same for the same arguments."""
    name, base = FAMILIES[family]
    config = getattr(transformers, name)(**{**base, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()
