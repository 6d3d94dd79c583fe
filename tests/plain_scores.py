"""Attention by hand: masks, softmaxes, scales and grouped heads in every spelling."""

from __future__ import annotations

import math

import torch
from plain_base import Attention, D, H, K, causal, style
from torch import Tensor
from torch.nn import functional as F

# Masks


@style
class TrilBuffer(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        t = x.shape[1]
        return F.softmax(scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")), dim=-1)


@style
class AddedMask(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return (scores + torch.triu(torch.full((x.shape[1], x.shape[1]), -1e9), diagonal=1)).softmax(-1)


@style
class WhereMask(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return torch.where(causal(x), scores, torch.full_like(scores, float("-inf"))).softmax(-1)


@style
class MultipliedMask(Attention):
    """`scores · b − 1e9 · (1 − b)`, as in the first GPT."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        b = causal(x).float()
        return (scores * b + -1e9 * (1 - b)).softmax(-1)


@style
class WindowMask(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        seen = causal(x) & ~causal(x).tril(-9)
        return scores.masked_fill(seen.logical_not(), float("-inf")).softmax(-1)


@style
class Alibi(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        return (scores - slopes * (i[:, None] - i)).masked_fill(~causal(x), float("-inf")).softmax(-1)


@style
class Bidirectional(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores.softmax(-1)


# Softmax and scale


@style
class MaskedTwice(Attention):
    """The probabilities of hidden keys are set to zero again, and again by a product."""

    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        seen = causal(x)
        return scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0) * seen.float()


@style
class WrittenSoftmax(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        scores = scores.masked_fill(~causal(x), float("-inf"))
        e = torch.exp(scores - scores.max(-1, keepdim=True).values)
        return e / e.sum(-1, keepdim=True)


@style
class UnshiftedSoftmax(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        scores = scores.masked_fill(~causal(x), -1e9)
        return scores.exp() / scores.exp().sum(-1).unsqueeze(-1)


@style
class ExponentialsTimesMask(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        e = torch.exp(scores - scores.amax(-1, keepdim=True)) * causal(x)
        return e / e.sum(-1, keepdim=True)


@style
class LogSoftmax(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        return F.log_softmax(scores.masked_fill(~causal(x), float("-inf")), -1).exp()


@style
class LogSumExp(Attention):
    def weights(self, scores: Tensor, x: Tensor) -> Tensor:
        scores = scores.masked_fill(~causal(x), float("-inf"))
        return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))


@style
class ScaleBuffer(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.sqrt(torch.tensor(float(K))))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.permute(0, 1, 3, 2)) / self.scale


@style
class ScaledQueries(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * K**-0.25) @ (k * K**-0.25).mT


# The fused call


@style
class FusedCausal(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(1, 2).flatten(2))


@style
class FusedOneHead(Attention):
    """No split at all: one head as wide as the model."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


# Grouped and shared key/value heads


@style
class FusedGqa(Attention):
    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.heads(x), is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


@style
class RepeatInterleaved(Attention):
    kv_heads = 2

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return q, k.repeat_interleave(2, 1), torch.repeat_interleave(v, repeats=2, dim=1)


@style
class ExpandedGroups(Attention):
    kv_heads = 2

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        b, g, t, _ = k.shape
        k, v = (y[:, :, None].expand(b, g, 2, t, K).reshape(b, H, t, K) for y in (k, v))
        return q, k, v


@style
class GroupedFive(Attention):
    """Scores [B, G, R, T, S]: key/value heads are broadcast, never repeated."""

    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * K**-0.5
        mixed = self.weights(scores, x) @ v.unsqueeze(2)
        return self.o(mixed.flatten(1, 2).transpose(1, 2).flatten(2))


@style
class GroupedEinsum(Attention):
    kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 2, K)
        k, v = self.k(x).view(b, t, 2, K), self.v(x).view(b, t, 2, K)
        weights = self.weights(torch.einsum("btgrk,bsgk->bgrts", q, k) * K**-0.5, x)
        return self.o(torch.einsum("bgrts,bsgk->btgrk", weights, v).reshape(b, t, D))


@style
class MultiQuery(Attention):
    kv_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.o((self.weights(self.scores(q, k), x) @ v).transpose(1, 2).flatten(2))


@style
class MultiQueryFolded(Attention):
    """The queries of all heads stand in one dimension with the tokens, as in GPT-BigCode."""

    kv_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).reshape(b, t * H, K)
        scores = (q @ self.k(x).mT).view(b, t, H, t) * K**-0.5
        weights = scores.masked_fill(~causal(x)[:, None, :], float("-inf")).softmax(-1)
        return self.o((weights.view(b, t * H, t) @ self.v(x)).view(b, t, D))


# On the way to the scores


@style
class NegativeRotation(Attention):
    """Rotary positions turned the other way: the frequencies are negative."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, K, 2) / K)
        cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))
        q, k = (t * cos - torch.cat((-t[..., K // 2 :], t[..., : K // 2]), -1) * sin for t in (q, k))
        return q, k, v


@style
class EmptyJoin(Attention):
    """Keys and values joined with a past that is empty."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        past = torch.zeros(*k.shape[:2], 0, K)
        return q, torch.cat((past, k), 2), torch.cat((past, v), 2)
