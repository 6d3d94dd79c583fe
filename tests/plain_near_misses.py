"""Code that looks like attention and is not what a site can say."""

from __future__ import annotations

import math

import torch
from plain_base import Attention, H, causal, near_miss
from torch import Tensor, nn
from torch.nn import functional as F

# What looks like attention and is not what a site can say


@near_miss
class WrongAxis(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.masked_fill(~causal(x), -1e9).softmax(-2)


@near_miss
class OverHeads(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.masked_fill(~causal(x), -1e9).softmax(1)


@near_miss
class ValueMask(Attention):
    """Tokens with a small first channel are hidden: the mask depends on what the model reads."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        hidden = (x[:, None, None, :, 0] < 0) | ~causal(x)
        return scores.masked_fill(hidden & ~torch.eye(x.shape[1], dtype=torch.bool), float("-inf")).softmax(-1)


@near_miss
class SwappedKeyHead(Attention):
    """Two key heads are exchanged: values and keys of a group no longer stand together."""

    kv_heads = 2

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return q, k.repeat_interleave(2, 1)[:, [0, 2, 1, 3]], v.repeat_interleave(2, 1)


@near_miss
class ShuffledTokens(Attention):
    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return q, k, v.flip(2)


@near_miss
class WeightsTimesTable(Attention):
    """Probabilities are multiplied after the softmax: they no longer add up to one."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.masked_fill(~causal(x), -1e9).softmax(-1) * causal(x).float().mul(0.5)


@near_miss
class MaskedAfterwards(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.softmax(-1).masked_fill(~causal(x), 0.0)


@near_miss
class SumWithoutMask(Attention):
    """Masked exponentials over the sum of all of them."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        return e * causal(x) / e.sum(-1, keepdim=True)


@near_miss
class EpsilonInSum(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        e = torch.exp(scores) * causal(x)
        return e / (e.sum(-1, keepdim=True) + 1e-1)


@near_miss
class TwoInOne(Attention):
    """Differential attention: one softmax minus another."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        scores = scores.masked_fill(~causal(x), -1e9)
        return scores.softmax(-1) - 0.2 * (scores * 0.5).softmax(-1)


@near_miss
class HeadScales(Attention):
    """A learned temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * self.temperature


@near_miss
class TalkingHeads(Attention):
    """Heads are mixed before the softmax (2003.02436)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bhts,hg->bgts", q @ k.mT, self.mix)


@near_miss
class TalkingHeadsAfter(TalkingHeads):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        probabilities = scores.masked_fill(~causal(x), -1e9).softmax(-1)
        return F.conv2d(probabilities, self.mix[:, :, None, None])


@near_miss
class TwoProducts(Attention):
    """The scores are a sum of two products, the second shifted, as relative positions make them (1901.02860)."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT + (q @ k.mT).roll(1, -1)


@near_miss
class ProbabilitiesInParts(Attention):
    """Two stretches of the keys, each with a product of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        p = self.weights(self.scores(q, k), x)
        y = p[..., :5] @ v[:, :, :5] + p[..., 5:] @ v[:, :, 5:]
        return self.o(y.transpose(1, 2).flatten(2))


@near_miss
class Squared(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).square()


class WithoutSoftmax(Attention):
    """Weights made of each score alone."""

    def each(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return self.each(scores).masked_fill(~causal(x), 0.0)


@near_miss
class ExpAlone(WithoutSoftmax):
    """exp(scores) @ v, nothing divides it."""

    def each(self, scores: Tensor) -> Tensor:
        return scores.exp()


@near_miss
class ExpOverLength(WithoutSoftmax):
    """Divided by how many keys a query sees."""

    def each(self, scores: Tensor) -> Tensor:
        return scores.exp() / torch.arange(1, scores.shape[-1] + 1)[:, None]


@near_miss
class ExpOverClampedSum(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        e = torch.exp(scores) * causal(x)
        return e / e.sum(-1, keepdim=True).clamp(min=1.0)


@near_miss
class SumAfterwards(Attention):
    """The values' sum is divided, after the product, by the exponentials' sum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        e = torch.exp(self.scores(q, k)) * causal(x)
        y = (e @ v) / e.sum(-1, keepdim=True)
        return self.o(y.transpose(1, 2).flatten(2))


@near_miss
class Sigmoid(WithoutSoftmax):
    """Sigmoid attention (2409.04431)."""

    def each(self, scores: Tensor) -> Tensor:
        return (scores - math.log(scores.shape[-1])).sigmoid()


@near_miss
class Relu(WithoutSoftmax):
    def each(self, scores: Tensor) -> Tensor:
        return scores.relu().square() / scores.shape[-1]


@near_miss
class SigmoidEinsum(Attention):
    """The same without a dimension for the heads in front, and added to a term that is closed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        weights = torch.einsum("bthk,bshk->bhts", q, k).add(0.5).sigmoid() * causal(x)
        return self.o(torch.einsum("bhts,bshk->bthk", weights, v).flatten(2))
