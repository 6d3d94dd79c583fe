"""Whole models whose attention has no module of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from plain_base import Attention, D, H, K, causal
from torch import Tensor, nn
from torch.nn import functional as F

# Attention without a module of its own: whole models


def attend(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
    """A function outside any module; weights [out, in]."""
    q, k, v = (F.linear(x, w).unflatten(-1, (H, K)).transpose(1, 2) for w in (wq, wk, wv))
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), wo)


class Functions(nn.Module):
    """The whole model is one module: two layers of plain functions on a dictionary of weights."""

    def __init__(self) -> None:
        super().__init__()
        names = [f"{layer}_{w}" for layer in range(2) for w in ("q", "k", "v", "o")]
        self.w = nn.ParameterDict({n: nn.Parameter(torch.randn(D, D) * 0.2) for n in names})
        self.embed = nn.Parameter(torch.randn(61, D))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed[input_ids]
        for layer in range(2):
            x = x + attend(F.layer_norm(x, (D,)), *(self.w[f"{layer}_{w}"] for w in ("q", "k", "v", "o")))
        return x @ self.embed.T


class BlockInOne(nn.Module):
    """Norm, attention, residual and MLP in one forward, no module for the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj, self.fc = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (H, K)).transpose(1, 2) for p in self.qkv(self.ln1(x)).chunk(3, -1))
        scores = (q @ k.mT * K**-0.5).masked_fill(~causal(x), float("-inf"))
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.fc(self.ln2(x)).relu()


class TwoAttentions(nn.Module):
    """Two attentions one after the other in one module, and no output projection for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv1, self.proj, self.qkv2 = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, 3 * D)

    def mix(self, qkv: nn.Linear, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (H, K)).transpose(1, 2) for p in qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.mix(self.qkv1, x))
        return x + self.mix(self.qkv2, x).tanh()


class Stack(nn.Module):
    """Embedding, blocks, head; `shared`: one block called twice."""

    def __init__(self, block: Callable[[], nn.Module], *, shared: bool = False):
        super().__init__()
        self.embed, self.head = nn.Embedding(61, D), nn.Linear(D, 61)
        first = block()
        self.blocks = nn.ModuleList([first, first if shared else block()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "functions": Functions,
    "block in one": lambda: Stack(BlockInOne),
    "two attentions": lambda: Stack(TwoAttentions),
    "shared": lambda: Stack(Attention, shared=True),
}


def whole(name: str) -> nn.Module:
    """One of `MODELS`, in eval mode, the same on every call."""
    torch.manual_seed(0)
    return MODELS[name]().eval()
