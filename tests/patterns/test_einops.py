"""Attention whose heads are split, joined and contracted by einops: functions, a layer, and its own einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fla_swap as fs
from fla_swap.types import Mask

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")

D, H, K, T = 32, 4, 8, 11


def hidden_future(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


class Rearranged(nn.Module):
    """One projection of q, k and v, which are parted and split into heads in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = einops.rearrange(self.qkv(x), "b t (three h k) -> three b h t k", three=3, h=H)
        scores = einops.einsum(q, k, "b h t k, b h s k -> b h t s") * K**-0.5
        mixed = scores.masked_fill(hidden_future(x), float("-inf")).softmax(-1)
        return self.o(einops.rearrange(mixed @ v, "b h t k -> b t (h k)"))


class Layered(nn.Module):
    """Heads beside the batch, by a layer; keys and values repeated for the query heads that share them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.kv = nn.Linear(D, 2 * 2 * K, bias=False)
        self.split: Any = layers.Rearrange("b t (h k) -> (b h) t k", k=K)

    def forward(self, x: Tensor) -> Tensor:
        k, v = einops.rearrange(self.kv(x), "b t (two h k) -> two b t h k", two=2, k=K)
        k, v = (einops.repeat(y, "b t h k -> (b h g) t k", g=2) for y in (k, v))
        scores = torch.bmm(self.split(self.q(x)), k.mT) / K**0.5
        mixed = torch.bmm(scores.masked_fill(hidden_future(x), float("-inf")).softmax(-1), v)
        return self.o(einops.rearrange(mixed, "(b h) t k -> b t (h k)", h=H))


@pytest.mark.parametrize(("attention", "kv_heads"), [(Rearranged, 4), (Layered, 2)])
def test_heads_that_einops_splits_are_found_stated_and_proved(attention: type[nn.Module], kv_heads: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), attention()).eval()
    x = torch.randn(2, T, D)
    report = fs.inspect(model, x)
    (site,) = report.sites
    assert site.proved and site.fqn == "1" and not report.near_misses and not report.unclaimed
    assert (site.heads, site.kv_heads, site.head_dim, site.mask) == (H, kv_heads, K, Mask(kind="causal"))
    assert site.scale == pytest.approx(K**-0.5)
    wanted = model(x)
    fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
    assert torch.allclose(model(x), wanted, atol=1e-5)
