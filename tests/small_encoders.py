"""A small attention to vary, a module around it, and a report in short."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.types import AttentionReport

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
VIT: dict[str, Any] = {**BERT, "image_size": 32, "patch_size": 8}
TEXT = {**BERT, "max_position_embeddings": 77}

# name → (config class, model class, config, what its sites are: "kind mask" in order)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "bert": ("BertConfig", "BertModel", BERT, ["self bidirectional"] * 2),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        ["self bidirectional"] * 2,
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {**BERT, "local_attention": 16, "global_attn_every_n_layers": 2},
        ["self bidirectional", "self local"],
    ),
    "vit": ("ViTConfig", "ViTModel", VIT, ["self bidirectional"] * 2),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VIT},
        ["self bidirectional"] * 2 + ["self causal"] * 2,
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        BART,
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
    "marian": (
        "MarianConfig",
        "MarianMTModel",
        {**BART, "pad_token_id": 98, "decoder_start_token_id": 98},
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 64, "pad_token_id": 0},
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
}


def tiny(family: str, implementation: str = "sdpa") -> nn.Module:
    config, model, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**options)
    return getattr(transformers, model)._from_config(made, attn_implementation=implementation).eval()


def kinds(report: AttentionReport) -> list[str]:
    return [f"{s.kind} {s.mask.kind}" for s in report.sites]


class Small(nn.Module):
    """One attention of four heads over 16 channels, with a twist."""

    def __init__(self, twist: str = "none"):
        super().__init__()
        self.twist = twist
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(64, 64))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (
            p(y).unflatten(-1, (4, 4)).transpose(1, 2) for p, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        mask = None
        if self.twist == "bias":
            mask = self.bias[: x.shape[1], : x.shape[1]][None, None]
        if self.twist == "other values":
            v = self.v(x.sin()).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.twist == "causal")
        return self.o(y.transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Holds one; with `places` it has a vector for each of so many tokens, and takes no other number."""

    def __init__(self, inner: nn.Module, places: int | None = None):
        super().__init__()
        self.inner = inner
        self.places = None if places is None else nn.Parameter(torch.randn(places, 16))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x if self.places is None else x + self.places
        return x + (self.inner(x) if memory is None else self.inner(x, memory))
