"""A softmax between two products of data is an attention; routers, pooling by learned queries, vocabularies are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fla_swap as fs
from fla_swap.types import AttentionReport

D, EXPERTS = 16, 4


def report_of(module: nn.Module) -> AttentionReport:
    torch.manual_seed(0)
    return fs.inspect(module, torch.randn(2, 7, D), strict=False)


class Block(nn.Module):
    """Causal attention of one head: the product that a search from what follows must not come back to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / 4
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + self.o(scores.masked_fill(hidden, -1e9).softmax(-1) @ self.v(x))


class Routed(nn.Module):
    """A mixture of experts, weighted in a product with what the experts compute."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.router, self.experts = nn.Linear(D, EXPERTS), nn.Linear(D, EXPERTS * D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        weights = self.router(x).softmax(-1)
        mixed = weights[:, :, None] @ self.experts(x).unflatten(-1, (EXPERTS, D))
        return x + mixed[:, :, 0]


class Pooled(nn.Module):
    """Tokens pooled by a query that is stored: no product of two tensors of data."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.query = nn.Parameter(torch.randn(1, D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return (self.query @ x.mT).softmax(-1) @ x


class Vocabulary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(D, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x)).softmax(-1)


class Compared(nn.Module):
    """Rows of two projections compared with each other: a product before, but no values after."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.a, self.b = Block(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return (self.a(x) @ self.b(x).mT).softmax(-1)


class FarApart(Block):
    """Thirty steps between q kᵀ and the softmax, and as many after it."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        for step in range(30):
            scores = scores.sin() + step
        weights = scores.softmax(-1)
        for _ in range(30):
            weights = weights.cos()
        return self.o(weights @ self.v(x))


class Summed(Block):
    """q kᵀ and the values' sum as elementwise products."""

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x)[:, :, None] * self.k(x)[:, None]).sum(-1)
        return self.o((scores.softmax(-1)[..., None] * self.v(x)[:, None]).sum(2))


def test_a_softmax_without_a_product_of_data_before_it_or_after_it_is_unclaimed() -> None:
    for module in (Routed(), Pooled(), Vocabulary(), Compared()):
        report = report_of(module)
        assert [s.fqn for s in report.sites] == ["block"], type(module).__name__
        assert not report.near_misses, report.near_misses[0].reason
        (line,) = report.unclaimed
        assert "softmax.int" in line and "test_between_products.py:" in line


def test_however_far_its_products_are_an_attention_is_a_near_miss() -> None:
    reasons = {FarApart: "cos.default between the softmax and the values", Summed: "between the softmax and the values"}
    for cls, reason in reasons.items():
        report = report_of(cls())
        (miss,) = report.near_misses
        assert not report.sites and not report.unclaimed
        assert miss.slot == "scores" and reason in miss.reason and "test_between_products.py:" in miss.source
