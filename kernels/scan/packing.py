"""Where packed sequences lie in a line of tokens, read on their device without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Marks of N packed sequences in T rows.

    `number` [T]: the sequence of every row, N for padding. `first`, `last`, `inside` [T] bool: edges (those of the
    padding too) and what is no padding. `starts`, `ends` [N]: rows, meaningful where `filled` [N], not empty.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    inside: Tensor
    starts: Tensor
    ends: Tensor
    filled: Tensor


def packing(cu_seqlens: Tensor | None, time: int) -> Packing | None:
    """The marks of `cu_seqlens` [N+1] in `time` rows."""
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.to(torch.int64)
    sequences = bounds.shape[0] - 1
    rows = torch.arange(time, device=bounds.device)
    number = (torch.searchsorted(bounds, rows, right=True) - 1).clamp(max=sequences)
    change = number[1:] != number[:-1]
    edge = torch.ones(1, dtype=torch.bool, device=bounds.device)
    return Packing(
        number=number,
        first=torch.cat((edge, change)),
        last=torch.cat((change, edge)),
        inside=number < sequences,
        starts=bounds[:-1].clamp(max=time - 1),
        ends=(bounds[1:] - 1).clamp(min=0),
        filled=bounds[1:] > bounds[:-1],
    )
