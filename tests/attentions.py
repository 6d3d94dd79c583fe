"""Tiny models with every kind of attention that a rewrite replaces, and one that nobody registered anywhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

from fla_swap.types import ArgPath, AttentionSite, CallContract, Mask, Projection, WeightRef

WINDOW = 6
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "llama": lambda: LlamaConfig(**SMALL),
    "bloom": lambda: BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "llama4": lambda: Llama4TextConfig(
        **(SMALL | {"num_hidden_layers": 4}),
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        num_local_experts=2,
        moe_layers=[],
    ),
}
WINDOWED, FUSED = "fla_swap::window_attention_fwd", "scaled_dot_product_attention"


def build(family: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(length))


class Hand(nn.Module):
    """Attention that nobody registered anywhere, with a stored triangular mask (as in minimal GPTs)."""

    def __init__(self, *, dropout=0.0, weights=False, bias=0.0, cap=False, turned=False, einsum=False):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(dropout)
        self.given = SimpleNamespace(weights=weights, bias=bias, cap=cap, turned=turned, einsum=einsum)
        self.register_buffer("seen", torch.ones(32, 32).tril().view(1, 1, 32, 32))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, 4, -1).transpose(1, 2) for y in self.qkv(x).split(width, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        if self.given.turned:
            scores = scores.transpose(-2, -1)
        if self.given.einsum:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(k.shape[-1])
        if self.given.bias:
            place = torch.arange(length, device=x.device)
            scores = scores + self.given.bias * (place[None] - place[:, None]) ** 2
        if self.given.cap:
            scores = torch.tanh(scores)
        scores = scores.masked_fill(self.seen[:, :, :length, :length] == 0, float("-inf"))
        probabilities = self.drop(F.softmax(scores, -1))
        mixed = self.out((probabilities @ v).transpose(1, 2).reshape(batch, length, width))
        return (mixed, probabilities) if self.given.weights else mixed


def hand(**options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Hand(**options).eval(), torch.randn(2, 19, 16)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-6))


class Twice(nn.Module):
    """Two attentions in one module, written out in its forward: neither has a module of its own."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(24, 16) / 4 for _ in range(2)])
        self.outs = nn.ParameterList([torch.randn(16, 8) / 4 for _ in range(2)])

    def forward(self, x):
        for weight, out in zip(self.weights, self.outs, strict=True):
            q, k, v = ((x @ weight.t())[..., n * 8 : n * 8 + 8].unflatten(-1, (2, 4)).transpose(1, 2) for n in range(3))
            scores = (q @ k.transpose(-2, -1) * 0.7).masked_fill(self.hidden(x.shape[1]), -1e9)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ out.t()
        return x

    @staticmethod
    def hidden(length):
        place = torch.arange(length)
        return place[None] > place[:, None]

    def site(self, number: int) -> AttentionSite:
        name = f"weights.{number}"
        q, k, v = (Projection(weight=WeightRef(name=name, rows=((n, n + 8),))) for n in (0, 8, 16))
        return AttentionSite(
            fqn=f"#{number}",
            layer=number,
            place="graph",
            q=q,
            k=k,
            v=v,
            o=Projection(weight=WeightRef(name=f"outs.{number}")),
            hidden_size=16,
            heads=2,
            kv_heads=2,
            head_dim=4,
            v_head_dim=4,
            scale=0.7,
            mask=Mask(kind="causal"),
            call=CallContract(hidden=ArgPath(position=0)),
        )
