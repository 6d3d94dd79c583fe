"""Distinct modules that share weights: each site calls them by the names inside its own module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs

D = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Of three layers the second has the first's query matrix and value projection, the third all but its output."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = Attention(), Attention(), Attention()
        second.q.weight, second.v = first.q.weight, first.v
        third.q, third.k, third.v = first.q, first.k, first.v
        self.layers = nn.ModuleList((first, second, third))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_shared_weights_are_called_as_the_owner_calls_them() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 7, D)
    report = fs.inspect(model, x)
    assert not report.near_misses and [s.fqn for s in report.sites] == [f"layers.{n}" for n in range(3)]
    for site in report.sites:
        assert site.proved and site.o is not None
        found = [(p.weight.name, p.bias.name if p.bias else None) for p in (site.q, site.k, site.v, site.o)]
        assert found == [(f"{site.fqn}.{side}.weight", f"{site.fqn}.{side}.bias") for side in "qkvo"]


def test_they_are_swapped_and_restored_as_others_are() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 7, D)
    with torch.no_grad():
        before = model(x)
        fs.swap_(model, fs.plan(fs.inspect(model, x), mixer="softmax", keep=0))
        assert float((model(x) - before).abs().max()) < 1e-5
        fs.restore_(model)
        assert torch.equal(model(x), before)
    assert model.layers[1].q.weight is model.layers[0].q.weight
