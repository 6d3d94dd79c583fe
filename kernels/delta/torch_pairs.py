"""What decay does to the products of pairs of rows inside a chunk, for gates per head and per key channel.

    P_ij = Σ_c x_ic y_jc e^(g_(j+1),c + … + g_i,c)    for j ≤ i, else 0

With one gate per head that is x yᵀ times a matrix. With a gate per channel, the pairs are split by binary levels: at
level s (1, 2, … L/2) those whose row lies in the second half and whose column in the first half of the same block of
2s rows. Each of these passes the block's middle, so its decay is a product of two factors ≤ 1, and a level is one
matrix product per block: nothing is ever divided by a vanished number. X chunks, L rows, K key width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadPairs:
    """One gate per head: `decay` [X, L, L] is e^(G_i − G_j) for i ≥ j and 0 above."""

    decay: Tensor

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x, y.mT).mul_(self.decay)

    def apply(self, weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of Σ weights ∘ products(x, y) for x and y."""
        weights = weights * self.decay
        return torch.bmm(weights, y), torch.bmm(weights.mT, x)


@dataclass(frozen=True, kw_only=True)
class ChannelPairs:
    """A gate per key channel. levels: (s, row factors, column factors), both [X, L/2s, s, K]."""

    levels: tuple[tuple[int, Tensor, Tensor], ...]

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
        out.diagonal(dim1=1, dim2=2).copy_((x * y).sum(-1))
        for size, row, column in self.levels:
            _block(out, size).copy_(torch.matmul(_second(x, size) * row, (_first(y, size) * column).mT))
        return out

    def apply(self, weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of Σ weights ∘ products(x, y) for x and y, without the diagonal (which no gate reaches)."""
        to_x, to_y = torch.zeros_like(x), torch.zeros_like(y)
        for size, row, column in self.levels:
            block = _block(weights, size)
            _second(to_x, size).addcmul_(torch.matmul(block, _first(y, size) * column), row)
            _first(to_y, size).addcmul_(torch.matmul(block.mT, _second(x, size) * row), column)
        return to_x, to_y


def _second(x: Tensor, size: int) -> Tensor:
    return x.view(x.shape[0], -1, 2, size, x.shape[-1])[:, :, 1]


def _first(x: Tensor, size: int) -> Tensor:
    return x.view(x.shape[0], -1, 2, size, x.shape[-1])[:, :, 0]


def _block(matrix: Tensor, size: int) -> Tensor:
    """The [L/2s] blocks (second half × first half) on the diagonal of [X, L, L]: a view [X, L/2s, s, s]."""
    split = matrix.view(matrix.shape[0], -1, 2, size, matrix.shape[1] // (2 * size), 2, size)
    return split[:, :, 1, :, :, 0, :].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def head_pairs(gates: Tensor) -> tuple[HeadPairs, Tensor, Tensor, Tensor]:
    """From gates [X, L, 1]: the pairs; decay from the chunk's start to each row, from there to its end, and of all."""
    summed = gates.cumsum(1)
    last, length = summed[:, -1:], gates.shape[1]
    above = torch.full((length, length), float("-inf"), dtype=gates.dtype, device=gates.device).triu_(1)
    pairs = HeadPairs(decay=(summed - summed.mT).add_(above).exp_())
    return pairs, summed.exp(), (last - summed).exp_(), last.exp()


def channel_pairs(gates: Tensor) -> tuple[ChannelPairs, Tensor, Tensor, Tensor]:
    """The same from gates [X, L, K]; the last is [X, K, 1]. Sums grow block by block: none is a difference."""
    before, after = gates.clone(), torch.zeros_like(gates)  # up to and with each row; behind it, inside its block
    levels = []
    size = 1
    while size < gates.shape[1]:
        levels.append((size, _second(before, size).exp(), _first(after, size).exp()))
        _first(after, size).add_(_second(before, size)[:, :, -1:])
        _second(before, size).add_(_first(before, size)[:, :, -1:])
        size *= 2
    return ChannelPairs(levels=tuple(levels)), before.exp(), after.exp_(), before[:, -1].unsqueeze(-1).exp()
