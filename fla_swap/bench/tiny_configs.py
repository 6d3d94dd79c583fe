"""Tiny configs of transformers' model types: the defaults, shrunk by the names that config fields have."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

LAYERS = 4
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16

# What a field is set to where the config has it (with a value that is no None), by what it means.
SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        """hidden_size d_model n_embd embedding_size word_embed_proj_dim backbone_hidden_size lru_width
        attention_hidden_size input_embedding_size output_embedding_size dim_model_base emb_dim embed_dim
        feed_forward_size linear_d_model projection_size hidden_size_global""",
    ),
    (
        96,
        """intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size d_inner dff dim_ff n_inner
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size
        d_ff""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        linear_num_heads linear_num_value_heads index_n_heads""",
    ),
    (
        KV_HEADS,
        """num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups
        num_shared_experts n_shared_experts moe_num_shared_experts num_experts_per_tok num_experts_per_token
        moe_topk moe_k first_k_dense_replace num_dense_layers""",
    ),
    (
        HEAD_DIM,
        """head_dim swa_head_dim qk_nope_head_dim v_head_dim dim_head linear_head_dim linear_key_head_dim
        linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim d_head d_kv kv_channels index_head_dim
        ssm_state_size mamba_d_state state_size attention_head_size prompt_mid_dim router_hidden_size
        kv_lora_rank shape_embed_dim pronunciation_embed_dim attention_head_dim""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_experts n_routed_experts num_local_experts moe_num_experts max_window_layers""",
    ),
    (32, "q_lora_rank"),
    (
        8,
        """sliding_window attention_chunk_size sliding_window_size attention_window_size window_size local_attention
        rotary_dim qk_rope_head_dim mamba_chunk_size num_mel_bins""",
    ),
    (
        1,
        """n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups num_codebooks
        num_nextn_predict_layers""",
    ),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length"),
    (128, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
)
RULES = {name: size for size, names in SIZES for name in names.split()}
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types")
EXACT = ("head_dim", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "hidden_size", "num_heads")
TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
)
# Where the rules by name are not enough. None as a value: leave the field to the config's own default.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "audio-spectrogram-transformer": {"num_mel_bins": 32, "max_length": 64},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {
        "num_key_value_heads": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 1e4},
        "ffn_config": None,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "distilbert": {"dim": 64, "hidden_dim": 96},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "neomme": {"per_layer_config": None},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": [0.0] * LAYERS, "num_kv_shared_layers": 0},
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": None},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
            for kind, theta in (("full_attention", 5e6), ("sliding_attention", 1e4))
        }
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "perceiver": {
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attends_per_block": 4,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 127},
    "siglip_text_model": {"projection_size": 64},
    "siglip_vision_model": {"image_size": 32, "patch_size": 16},
    "xlstm": {"embedding_dim": 64, "num_blocks": 4, "chunk_size": 13},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1],
    },
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 6,
        "n_mamba_heads": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "layers_block_type": None,
    },
}

# A drafting head: all its layers read the keys and values of the model that it drafts for.
DRAFTER = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 128,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}
DRAFTERS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
OWN |= {drafter: {"text_config": {"model_type": own, **DRAFTER}} for drafter, own in DRAFTERS.items()}
# Causal language models that take a part of their type's config: its name.
PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}

STAGES = {"out_features": None, "stage_names": None, "out_indices": None}  # follow from the number of layers

GROUPS = {
    "decoder": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "encoder": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "vision": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
# Decoders and encoders are taken whole; of the other groups these.
CHOSEN: dict[str, str] = {
    "encoder-decoder": "bart blenderbot fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x "
    "plbart prophetnet switch_transformers t5 t5gemma umt5",
    "speech": "speech_to_text whisper",
    "vision": "clip clip_vision_model deit dinov2 dinov2_with_registers dinov3_vit ijepa "
    "siglip siglip_vision_model vit vit_mae vit_msn yolos",
}


def model_types(group: str) -> tuple[str, ...]:
    """The model types of a group, sorted. A type may be in several (BERT can be a decoder)."""
    known = getattr(modeling_auto, GROUPS[group][1])
    chosen = CHOSEN[group].split() if group in CHOSEN else known
    return tuple(sorted(t for t in chosen if t in known))


def tiny_config(model_type: str, group: str = "decoder") -> Any:
    """The type's default config with every size shrunk, its sub-configs too. As a decoder where it can be one."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind = configuration_auto.CONFIG_MAPPING[model_type]
    if group == "decoder" and model_type in PART:
        kind = kind.sub_configs[PART[model_type]]
    values = _shrunk(kind())
    if group == "decoder" and "is_decoder" in values and not values.get("is_encoder_decoder"):
        values["is_decoder"] = True
    return kind(**values)


def tiny_model(model_type: str, group: str, implementation: str) -> nn.Module:
    """A randomly initialised tiny model in eval mode."""
    auto, names = GROUPS[group]
    config, kind = tiny_config(model_type, group), getattr(transformers, auto)
    if group == "decoder" and model_type in PART:
        kind = getattr(transformers, getattr(modeling_auto, names)[model_type])
        return kind._from_config(config, attn_implementation=implementation).eval()
    return kind.from_config(config, attn_implementation=implementation).eval()


def example_for(model: Any, model_type: str) -> dict[str, Any] | None:
    """One call's arguments where a model's forward asks for more than token ids; None where `inspect` makes them."""
    if model_type not in DRAFTERS:
        return None
    layers = {layer.self_attn.layer_type: layer.self_attn for layer in model.model.layers}
    given = {
        kind: tuple(torch.randn(2, HEADS // a.num_key_value_groups, 13, a.head_dim) for _ in range(2))
        for kind, a in layers.items()
    }
    return {"inputs_embeds": torch.randn(2, 13, model.pre_projection.in_features), "shared_kv_states": given}


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments for the config's class."""
    own = OWN.get(config.model_type, {}) | STAGES
    values: dict[str, Any] = {}
    stated: dict[str, Any] = config.to_dict()
    subs = {n: v for n, v in vars(config).items() if isinstance(v, transformers.PreTrainedConfig)}
    for name, value in stated.items():
        if name in subs:
            values[name] = _shrunk(subs[name])
        elif name in RULES and isinstance(value, int) and not isinstance(value, bool):
            values[name] = RULES[name] if name in EXACT else min(value, RULES[name])
        elif name in TOKENS and value is not None:
            values[name] = TOKENS.index(name) + 1
        elif name in PER_LAYER and isinstance(value, list) and value:
            values[name] = _representative(value)
    if stated.get("num_key_value_heads") and stated.get("num_key_value_heads") == stated.get("num_attention_heads"):
        values["num_key_value_heads"] = values.get("num_attention_heads", HEADS)
    if stated.get("qk_rope_head_dim"):  # latent attention: the rotary part is what the config calls a head
        values |= {"head_dim": RULES["qk_rope_head_dim"], "qk_head_dim": HEAD_DIM + RULES["qk_rope_head_dim"]}
    keep = {
        n: v
        for n, v in stated.items()
        if n not in values and n not in ("model_type", "transformers_version", "architectures")
    }
    merged = {**keep, **{n: v for n, v in values.items() if n in stated}, **own}
    return {n: v for n, v in merged.items() if not n.startswith("_") and (v is not None or n not in own)}


def _representative(kinds: list[Any]) -> list[Any]:
    """Four layers in which every kind of layer occurs (the first four kinds, the most frequent repeated)."""
    distinct = list(dict.fromkeys(kinds))[:LAYERS]
    common = max(distinct, key=kinds.count)
    return (distinct + [common] * LAYERS)[:LAYERS]
