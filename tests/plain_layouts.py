"""Attention by hand: contractions, layouts, projections and heads in every spelling."""

from __future__ import annotations

import torch
from plain_base import Attention, D, H, K, causal, style
from torch import Tensor, nn
from torch.nn import functional as F

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
