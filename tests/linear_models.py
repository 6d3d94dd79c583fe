"""Tiny models of families whose layers are linear already, with weights that hide nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

import fla_swap as fs

SHARED: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
ATTENTION: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
DELTA: dict[str, Any] = dict(
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    layer_types=["linear_attention", "full_attention"],
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **ATTENTION,
            **DELTA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**ATTENTION, **DELTA}),
    "bamba": (
        "BambaConfig",
        {
            **ATTENTION,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 12,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 16,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2, "chunk_size": 16, "expand": 2},
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **ATTENTION,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
LINEAR = {
    "qwen3_next": ["model.layers.0.linear_attn"],
    "qwen3_5": ["model.layers.0.linear_attn"],
    "bamba": ["model.layers.0.mamba"],
    "mamba2": ["backbone.layers.0.mixer", "backbone.layers.1.mixer"],
    "minimax": ["model.layers.0.self_attn"],
}


def linear_model(family: str, **options: Any) -> Any:
    """In eval mode, the same for the same arguments; matrices three times as large as they start, vectors moved."""
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHARED, **own, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


@functools.cache
def linear_report(family: str) -> fs.AttentionReport:
    return fs.inspect(linear_model(family))
