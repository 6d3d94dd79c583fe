"""Attention as people write it by hand: one class a style, each `x [B, T, 32] → [B, T, 32]`, four heads of eight.

`plain(style)` puts two of them into a decoder (embedding → blocks → head) that takes `input_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# Contractions and layouts


@style
class EinsumBhtd(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.weights(torch.einsum("bhtd,bhsd->bhts", q, k) * K**-0.5, x)
        return self.o(torch.einsum("bhts,bhsd->bhtd", weights, v).transpose(1, 2).reshape(*x.shape))


@style
class EinsumBthd(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], H, K) for p in (self.q, self.k, self.v))
        weights = self.weights(torch.einsum("bqhd,bkhd->bhqk", q, k) * K**-0.5, x)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


@style
class EinsumHeadsLast(Attention):
    """Scores lie as [B, T, S, H], the softmax runs over the third dimension."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], H, K) for p in (self.q, self.k, self.v))
        scores = torch.einsum("bqhd,bkhd->bqkh", q, k) * K**-0.5
        weights = scores.masked_fill(~causal(x)[None, :, :, None], float("-inf")).softmax(2)
        return self.o(torch.einsum("bqkh,bkhd->bqhd", weights, v).flatten(2))


@style
class EinsumEllipsis(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.weights(torch.einsum("...qd,...kd->...qk", q, k) * K**-0.5, x)
        return self.o(torch.einsum("...qk,...kd->...qd", weights, v).transpose(1, 2).flatten(2))


@style
class EinsumWeights(nn.Module):
    """Everything is an einsum, with weights that keep the heads apart, as in papers' code."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(D, H, K) * 0.2) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(H, K, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
        weights = torch.where(causal(x), scores, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshk,hkd->btd", weights, v, self.wo)


@style
class HeadMatrices(nn.Module):
    """x [B, 1, T, D] @ W [H, D, K], and the output projection on the heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(H, D, K) * 0.2) for _ in range(3))
        self.o = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x[:, None] @ w for w in (self.wq, self.wk, self.wv))
        scores = (q @ k.mT * K**-0.5).masked_fill(~causal(x), -1e9)
        return self.o((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(*x.shape))


@style
class Transposed(Attention):
    """k qᵀ, softmax over its first axis, and vᵀ on the left."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (k @ q.mT * K**-0.5).masked_fill(~causal(x).T, float("-inf"))
        return self.o((v.mT @ scores.softmax(-2)).permute(0, 3, 1, 2).flatten(2))


@style
class Bmm(Attention):
    """Heads folded into the batch, as in fairseq."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.reshape(b * H, t, K) for p in self.heads(x))
        weights = torch.bmm(q * K**-0.5, k.transpose(1, 2)).masked_fill(~causal(x), float("-inf")).softmax(-1)
        return self.o(torch.bmm(weights, v).view(b, H, t, K).transpose(1, 2).reshape(b, t, D))


@style
class Baddbmm(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.reshape(b * H, t, K) for p in self.heads(x))
        mask = torch.zeros(t, t).masked_fill(~causal(x), float("-inf")).expand(b * H, t, t)
        weights = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=K**-0.5).softmax(-1)
        return self.o(torch.bmm(weights, v).view(b, H, t, K).transpose(1, 2).reshape(b, t, D))


# Projections


@style
class FusedQkv(Attention):
    """One projection, split as q, k, v; heads split by hand as einops' `b t (h k) -> b h t k` does."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(D, 3 * D, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        return tuple(p.reshape(b, t, H, K).permute(0, 2, 1, 3) for p in self.qkv(x).chunk(3, -1))  # type: ignore


@style
class FusedByHead(FusedQkv):
    """`b t (h three k) -> three b h t k`, and the order of the three is v, q, k."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, q, k = self.qkv(x).reshape(*x.shape[:2], H, 3, K).permute(3, 0, 2, 1, 4)
        return q, k, v


@style
class FusedChannelsFirst(FusedQkv):
    """`b t (k h three)`: the heads are neighbouring channels."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], K, H, 3).permute(4, 0, 3, 1, 2).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.o((self.weights(self.scores(q, k), x) @ v).transpose(1, 2).flatten(2))


@style
class RawParameters(Attention):
    """Weights as parameters that are multiplied, stored [in, out], with biases added by hand."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(D, D) * 0.2) for _ in range(3))
        self.bq = nn.Parameter(torch.randn(D))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x @ self.wq + self.bq, torch.matmul(x, self.wk), x @ self.wv
        return tuple(p.view(*x.shape[:2], H, K).transpose(1, 2) for p in (q, k, v))  # type: ignore


@style
class StackedParameter(Attention):
    """One parameter [3, out, in], one slice for each of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.w = nn.Parameter(torch.randn(3, D, D) * 0.2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(F.linear(x, w).view(*x.shape[:2], H, K).transpose(1, 2) for w in self.w)  # type: ignore


@style
class SlicedWeights(Attention):
    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.w, self.b = nn.Parameter(torch.randn(3 * D, D) * 0.2), nn.Parameter(torch.randn(3 * D))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [F.linear(x, self.w[i * D : (i + 1) * D], self.b[i * D : (i + 1) * D]) for i in range(3)]
        return tuple(p.unflatten(-1, (H, K)).transpose(1, 2) for p in parts)  # type: ignore


@style
class Conv1x1(Attention):
    """Projections as convolutions with kernels of one token, on [B, D, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(D, D, 1) for _ in range(3))
        self.o = nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x.mT).unflatten(1, (H, K)).transpose(2, 3) for p in (self.q, self.k, self.v))
        mixed = self.weights(self.scores(q, k), x) @ v
        return self.o(mixed.transpose(2, 3).flatten(1, 2)).mT


@style
class TiedQk(Attention):
    """Queries and keys are the same, as in Reformer."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, v = (p(x).unflatten(-1, (H, K)).transpose(1, 2) for p in (self.q, self.v))
        return q, q, v


@style
class KeysAreValues(Attention):
    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _ = super().heads(x)
        return q, k, k


class OneHead(nn.Module):
    """A head of the well-known lecture: projections of its own, a `tril` buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, K, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(256, 256)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * K**-0.5
        scores = scores.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


@style
class ModuleListHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead() for _ in range(H))
        self.proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


@style
class LoopOverChunks(Attention):
    """One projection for all heads, cut into chunks, a loop over them."""

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(*(p(x).chunk(H, -1) for p in (self.q, self.k, self.v)), strict=True)
        mixed = [self.weights(self.scores(q, k), x) @ v for q, k, v in parts]
        return self.o(torch.cat(mixed, -1))


@style
class LoopStacked(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = [self.weights(self.scores(q[:, h], k[:, h]), x) @ v[:, h] for h in range(H)]
        return self.o(torch.stack(mixed, 2).flatten(2))


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
