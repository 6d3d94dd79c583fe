"""Feature maps: what makes a similarity of q and k a scalar product, and so attention linear in time.

A polynomial similarity c0 + c1 s + c2 s² of s = scale · q·k is a sum over monomials of k: 1, the channels, and the
products of two channels, each product once. The keys' features are the bare monomials, so that a state does not depend
on the scale; the queries' carry the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAYLOR = (1.0, 1.0, 0.5)
SQUARE = (0.0, 0.0, 1.0)


def feature_count(width: int, *, taylor: bool) -> int:
    """Monomials of `width` channels: 153 of 16 up to degree two (`taylor`), 136 of degree two."""
    pairs = width * (width + 1) // 2
    return pairs + width + 1 if taylor else pairs


def channels(width: int, *, taylor: bool, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The two channels whose product each feature is, int64 [F] twice; the index `width` stands for the constant 1.

    First the products by the distance of their channels around the circle (d = 0: the squares), then, with `taylor`,
    the channels themselves, and the constant.
    """
    features = torch.arange(feature_count(width, taylor=taylor), device=device)
    pairs = feature_count(width, taylor=False)
    first = features % width
    second = (first + features // width) % width
    first = torch.where(features < pairs, first, features - pairs)
    return first, torch.where(features < pairs, second, width)


def key_features(k: Tensor, *, taylor: bool) -> Tensor:
    """Monomials of k [..., K]: [..., F], in k's dtype."""
    first, second = channels(k.shape[-1], taylor=taylor, device=k.device)
    wide = torch.cat((k, torch.ones_like(k[..., :1])), -1) if taylor else k
    return _pick(wide, first) * _pick(wide, second)


def query_features(q: Tensor, *, scale: float, taylor: bool) -> Tensor:
    """[..., F] whose product with `key_features` is 1 + s + s²/2 (`taylor`) or s², with s = scale · q·k."""
    width = q.shape[-1]
    pairs = feature_count(width, taylor=False)
    _, linear, square = TAYLOR if taylor else SQUARE
    features = torch.arange(feature_count(width, taylor=taylor), device=q.device)
    coefficient = torch.where(
        features < width, q.new_full((), square * scale**2), q.new_full((), 2 * square * scale**2)
    )
    if taylor:
        coefficient = torch.where(features < pairs, coefficient, q.new_full((), linear * scale))
        coefficient = torch.where(features == pairs + width, q.new_full((), TAYLOR[0]), coefficient)
    return key_features(q, taylor=taylor) * coefficient


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index] as a product with ones and zeros: its gradient is a product too, not a scatter."""
    picked = torch.arange(x.shape[-1], device=x.device)[:, None] == index[None, :]
    return x @ picked.to(x.dtype)


def hedgehog_features(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog, 2402.04347: softmax of a learned map of each head and softmax of its negation, side by side.

    x [B,T,H,K], weight [H,F,K] → [B,T,H,2F], in x's dtype; computed in fp32 or wider.
    """
    mapped = torch.einsum("bthk,hfk->bthf", x, weight)
    mapped = mapped if mapped.dtype == torch.float64 else mapped.float()
    return torch.cat((mapped.softmax(-1), (-mapped).softmax(-1)), -1).to(x.dtype)
