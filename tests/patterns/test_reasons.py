"""Why a factor is refused: the reason names what the code does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fla_swap as fs


class Attention(nn.Module):
    """Causal attention of four heads; `queries` is what q reads, `scores` what becomes of q kᵀ."""

    def __init__(self, queries=None, scores=None):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.p = nn.Parameter(torch.tensor(0.3))
        self.queries, self.scores = queries, scores

    def forward(self, x: Tensor) -> Tensor:
        read = x if self.queries is None else self.queries(x)
        q, k, v = (f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f, y in ((self.q, read), (self.k, x), (self.v, x)))
        scores = q @ k.mT if self.scores is None else self.scores(q @ k.mT, self.p)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.o((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2))


def miss(attention: nn.Module) -> fs.NearMiss:
    report = fs.inspect(attention, torch.randn(2, 11, 32), strict=False)
    assert report.sites == ()
    return report.near_misses[0]


def test_queries_that_read_another_multiple_of_the_input():
    found = miss(Attention(queries=lambda x: x * 1.25))
    assert found.reason.startswith("q reads the hidden states times 1.25 before the projection, k and v without")


@pytest.mark.parametrize(
    "scores", [lambda s, p: s * p, lambda s, p: p * s, lambda s, p: s / p, lambda s, p: s * p.exp()]
)
def test_a_learned_scale(scores):
    assert miss(Attention(scores=scores)).reason == "a learned factor of the scores, made of the parameter 'p'"
