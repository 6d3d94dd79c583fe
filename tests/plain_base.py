"""What the hand-written attentions share: a decoder around them, a plain attention to vary, and their lists."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

D, H, K = 32, 4, 8
STYLES: dict[str, type[nn.Module]] = {}
NEAR_MISSES: dict[str, type[nn.Module]] = {}


class Decoder(nn.Module):
    """Two pre-norm blocks of `attention()` and a small MLP, residuals around them."""

    def __init__(self, attention: Callable[[], nn.Module], layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(61, D)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(D), "attn": attention(), "mlp": nn.Linear(D, D)}) for _ in range(layers)
        )
        self.head = nn.Linear(D, 61)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
            x = x + block["mlp"](x).relu()
        return self.head(x)


def plain(style: str) -> nn.Module:
    """The decoder with the attention of that name, in eval mode, the same on every call."""
    torch.manual_seed(0)
    return Decoder({**STYLES, **NEAR_MISSES}[style]).eval()


def style(cls: type[nn.Module]) -> type[nn.Module]:
    STYLES[cls.__name__] = cls
    return cls


def near_miss(cls: type[nn.Module]) -> type[nn.Module]:
    NEAR_MISSES[cls.__name__] = cls
    return cls


def causal(x: Tensor, length: int | None = None) -> Tensor:
    """bool [T, T]: the keys that a query sees."""
    size = x.shape[1] if length is None else length
    return torch.ones(size, size, dtype=torch.bool, device=x.device).tril()


class Attention(nn.Module):
    """Separate projections with biases, heads split as [B, H, T, K]; a style overrides one step or several."""

    kv_heads = H

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = nn.Linear(D, self.kv_heads * K), nn.Linear(D, self.kv_heads * K)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(p(x).unflatten(-1, (-1, K)).transpose(1, 2) for p in (self.q, self.k, self.v))  # type: ignore

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / math.sqrt(K)

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.masked_fill(~causal(x), float("-inf")).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = self.weights(self.scores(q, k), x) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))
