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


class Banded(Block):
    """Scores of blocks of tokens are written into a table that was made before, as block-wise attention does."""

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_full((len(x), x.shape[1], x.shape[1]), -1e9)
        for start in range(0, x.shape[1], 4):
            block = x[:, start : start + 4]
            table[:, start : start + 4, start : start + 4] = self.q(block) @ self.k(block).mT
        return self.o(table.softmax(-1) @ self.v(x))


class Chosen(nn.Module):
    """Experts on the tokens that chose them: how many these are depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.router, self.expert = nn.Linear(D, EXPERTS), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.block(x).flatten(0, 1)
        weights = self.router(flat).softmax(-1)
        own = torch.nonzero(weights.argmax(-1) == 0)[:, 0]
        mixed = torch.zeros_like(flat).index_add(0, own, self.expert(flat[own]).sigmoid() * weights[own, :1])
        return (flat + mixed).view_as(x)


def test_scores_that_are_written_into_a_table_are_a_near_miss() -> None:
    report = report_of(Banded())
    (miss,) = report.near_misses
    assert not report.sites and not report.unclaimed and miss.slot == "scores"
    assert "between the softmax and q kᵀ" in miss.reason and "test_between_products.py:" in miss.source


def test_activations_of_a_size_that_depends_on_the_data_are_no_attention() -> None:
    report = report_of(Chosen())
    assert [s.fqn for s in report.sites] == ["block"] and not report.near_misses and len(report.unclaimed) == 1


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
