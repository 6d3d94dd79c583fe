"""One attention with a twist between its projections and its core, and what `inspect` says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.inspection import inspect
from fla_swap.types import AttentionSite, NearMiss

H, D, WIDTH = 2, 8, 16


class Attention(nn.Module):
    """Causal attention; `twist` changes one thing between the projections and the core."""

    def __init__(self, twist: Callable[..., Any]):
        super().__init__()
        self.twist = twist
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.shared, self.wide = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(WIDTH))
        self.table, self.number = nn.Parameter(torch.ones(H, D)), nn.Parameter(torch.ones(H))
        self.norms = nn.ModuleList([nn.LayerNorm(D) for _ in range(H)])
        self.down, self.up = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH, bias=False)
        self.down2, self.up2 = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.biased = nn.Linear(3, WIDTH)
        self.magnitude = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, D)) for p in (self.q, self.k, self.v))
        q, k, v = self.twist(self, q, k, v, x)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT).masked_fill(~seen, float("-inf"))
        return self.o((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(F.silu(x))


def report(twist: Callable[..., Any], attention: type[Attention] = Attention) -> Any:
    torch.manual_seed(0)
    return inspect(Block(attention(twist)), torch.randn(1, 7, WIDTH), strict=False)


def site(twist: Callable[..., Any], attention: type[Attention] = Attention) -> AttentionSite:
    found = report(twist, attention)
    assert not found.near_misses, found.near_misses
    assert found.sites[0].proved
    return found.sites[0]


def miss(twist: Callable[..., Any]) -> NearMiss:
    found = report(twist)
    assert not found.sites and len(found.near_misses) == 1
    return found.near_misses[0]
