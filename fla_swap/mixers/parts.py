"""Parts of recurrent mixers: documents and padding, short convolution, output gate.

Legend for shapes: B batch, T time, D hidden size, H heads, C channels, V value width, N sequences (B, or the packed
documents), W taps of the convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.fused.ops import short_conv
from fla_swap.mixers.base import wide

RESET = -64.0
"""Log decay at the first token of a document: exp(−64) of the old state is below any float's precision of the new one.

Not more negative, because chunked kernels subtract sums of log decays."""


class Tokens(NamedTuple):
    """Which tokens count and where documents start; fields as the arguments of `TokenMixer.forward`."""

    valid: Tensor | None = None
    starts: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def keep(self, x: Tensor) -> Tensor:
        """x [B, T, …] with zeros at padding."""
        if self.valid is None:
            return x
        return torch.where(self.valid.view(*self.valid.shape, *(1,) * (x.ndim - 2)), x, 0)

    def decay(self, g: Tensor) -> Tensor:
        """Log decays [B, T, …]: none at padding, all of it where a document starts."""
        g = self.keep(g)
        if self.starts is None or self.cu_seqlens is not None:
            return g
        return torch.where(self.starts.view(*self.starts.shape, *(1,) * (g.ndim - 2)), RESET, g)


def token_positions(x: Tensor, tokens: Tokens, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions [B, T] counted in each document over valid tokens, on from `offset` [N]; and the next offset."""
    steps = x.shape[1]
    rows = torch.arange(steps, device=x.device)
    if tokens.cu_seqlens is not None:
        bounds = tokens.cu_seqlens.long()
        number = (torch.searchsorted(bounds, rows, right=True) - 1).clamp(max=bounds.shape[0] - 2)
        lengths = bounds[1:] - bounds[:-1]
        offset = torch.zeros_like(lengths) if offset is None else offset
        return (rows - bounds[number] + offset[number])[None], offset + lengths
    offset = torch.zeros(x.shape[0], device=x.device, dtype=torch.int64) if offset is None else offset
    if tokens.valid is None:
        counted = offset[:, None] + rows + 1
    else:
        counted = offset[:, None] + tokens.valid.long().cumsum(1)
    if tokens.starts is not None:
        before = torch.where(tokens.starts, counted - 1, 0).cummax(1).values
        counted = counted - before
    return (counted - 1).clamp(min=0), counted[:, -1]


def close_gaps(x: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens, Tensor]:
    """x [B, T, C] with the padding of every row moved to its end; its marks; and where each token stands now, [B, T].

    A document that starts at padding starts at its first token.
    """
    assert tokens.valid is not None
    order = (~tokens.valid).int().argsort(dim=1, stable=True)
    valid, starts = tokens.valid.gather(1, order), None
    if tokens.starts is not None:
        number = tokens.starts.long().cumsum(1)
        number = torch.where(valid, number.gather(1, order), number[:, -1:])
        starts = number != F.pad(number[:, :-1], (1, 0))
    moved = x.gather(1, order[..., None].expand_as(x))
    return moved, Tokens(valid, starts), order.argsort(dim=1)


class ShortConv(nn.Module):
    """Causal convolution of every channel on its own over the document's last `taps` tokens; starts as the identity.

    Args:
        channels: C.
        taps: W; weight [C, W], the last tap weighs the token itself.
        activation: None or "silu".
        bias: whether it has a bias [C].
    """

    def __init__(self, channels: int, taps: int, activation: str | None = None, *, bias: bool = False):
        super().__init__()
        if taps < 1 or activation not in (None, "silu"):
            raise MixerError(f"conv_size must be at least 1 and conv_activation None or 'silu': {taps}, {activation!r}")
        self.taps, self.activation = taps, activation
        self.weight = nn.Parameter(torch.zeros(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make it the identity (but for the activation)."""
        self.weight.zero_()
        self.weight[:, -1] = 1
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, tokens: Tokens, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C] and the W − 1 inputs before it, past [N, W−1, C] (None: zeros).

        Returns y [B, T, C] and the new past (None if there was none). Sums are taken in fp32 or wider.
        """
        return convolve(x, self.weight, self.bias, self.activation, tokens, past)


def shift_tokens(x: Tensor, tokens: Tokens, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The token before each one of x [B, T, C] in its document, zero before the first; past [N, 1, C] as above."""
    weight = x.new_ones(x.shape[2], 2)
    weight[:, 1] = 0
    return convolve(x, weight, None, None, tokens, past)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, tokens: Tokens, past: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What `ShortConv` computes, of documents and padding as `tokens` has them; weight [C, W], bias [C] or None."""
    taps = weight.shape[1]
    if tokens.cu_seqlens is not None:
        y, after = short_conv(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=None if past is None else past.mT,
            output_final_state=past is not None,
            cu_seqlens=tokens.cu_seqlens,
        )
        return y, None if after is None else after.mT
    back = None
    if tokens.valid is not None and x.shape[1] > 1:
        x, tokens, back = close_gaps(x, tokens)
    x = tokens.keep(x)
    front = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if past is None else past.to(x.dtype)
    line = torch.cat((front, x), 1)
    age = None if tokens.starts is None else _age(tokens.starts, taps)
    y = _sum(wide(line), wide(weight), x.shape[1], age)
    y = y if bias is None else y + wide(bias)
    y = (F.silu(y) if activation else y).to(x.dtype)
    y = y if back is None else y.gather(1, back[..., None].expand_as(y))
    return y, None if past is None else _last(line, taps - 1, age, tokens.valid)


def _sum(line: Tensor, weight: Tensor, steps: int, age: Tensor | None) -> Tensor:
    """Sum over the taps; `line` [B, W−1+T, C]."""
    taps = weight.shape[1]
    y = line[:, taps - 1 :] * weight[:, -1]
    for back in range(1, taps):
        earlier = line[:, taps - 1 - back :][:, :steps]
        if age is not None:
            earlier = earlier.masked_fill((age < back)[..., None], 0)
        y = torch.addcmul(y, earlier, weight[:, -1 - back])
    return y


def _age(starts: Tensor, taps: int) -> Tensor:
    """Rows since the document's first one, int64 [B, T]; W or more before the first start."""
    rows = torch.arange(starts.shape[1], device=starts.device)
    return rows - torch.where(starts, rows, -taps).cummax(1).values


def _last(line: Tensor, keep: int, age: Tensor | None, valid: Tensor | None) -> Tensor:
    """The last `keep` valid rows of `line`; zeros for those before the last document."""
    if age is not None:
        back = torch.arange(line.shape[1] - 1, -1, -1, device=line.device)
        line = torch.where((back <= age[:, -1:])[..., None], line, 0)
    if valid is None:
        return line[:, line.shape[1] - keep :]
    counted = F.pad(valid.long(), (keep, 0), value=1).cumsum(1)
    wanted = counted[:, -1:] - torch.arange(keep - 1, -1, -1, device=line.device)
    index = torch.searchsorted(counted, wanted)
    return line.gather(1, index[..., None].expand(-1, -1, line.shape[2]))


class OutputGate(nn.Module):
    """Gate on the heads' outputs that starts as exactly 1: 2·sigmoid(z), or swish(z), z linear in the token.

    Args:
        hidden: D. width: H·V.
        kind: "sigmoid" or "swish".
        rank: inner width of a low-rank map; None for a full one.
    """

    def __init__(self, hidden: int, width: int, kind: str, rank: int | None):
        super().__init__()
        if kind not in ("sigmoid", "swish"):
            raise MixerError(f"output_gate must be 'sigmoid', 'swish' or None, got {kind!r}")
        self.kind = kind
        self.down = None if rank is None else nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(hidden if rank is None else rank, width)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make it neutral."""
        self.up.weight.zero_()
        self.up.bias.fill_(0.0 if self.kind == "sigmoid" else SWISH_ONE)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H·V]."""
        z = wide(self.up(x if self.down is None else self.down(x)))
        return 2 * z.sigmoid() if self.kind == "sigmoid" else F.silu(z)


SWISH_ONE = 1.278464542761074
"""Where x · sigmoid(x) is 1."""


def head_rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, computed in fp32 or wider and returned so."""
    x = wide(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def activate(x: Tensor, kind: str | None) -> Tensor:
    """A feature map on q and k: None, "silu", "relu" or "elu" (elu + 1, 2006.16236)."""
    if kind is None:
        return x
    if kind == "elu":
        return F.elu(x) + 1
    return F.silu(x) if kind == "silu" else F.relu(x)


def check_activation(kind: str | None, where: str, option: str = "qk_activation") -> None:
    if kind not in (None, "silu", "relu", "elu"):
        raise MixerError(f"{where}: {option} must be None, 'silu', 'relu' or 'elu', got {kind!r}")


def log_decay_of(half_life: Tensor) -> Tensor:
    """Natural log of the decay per token that halves a memory in `half_life` tokens."""
    return -math.log(2.0) / half_life


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def spread_half_lives(heads: int, shortest: float, longest: float) -> list[float]:
    """`heads` half-lives in tokens, evenly spaced in their logarithm."""
    if heads == 1:
        return [math.sqrt(shortest * longest)]
    ratio = longest / shortest
    return [shortest * ratio ** (h / (heads - 1)) for h in range(heads)]
