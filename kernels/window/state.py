"""The state of a sliding window: the last W keys and values in a ring, of constant size and at fixed addresses.

Token number p (counted from 0, padding included) lives in slot p mod W. Legend: N sequences, W window,
HK key/value heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla_swap.errors import KernelError


class WindowState(NamedTuple):
    """Ring of the last W tokens. Every tensor's first dimension is the sequence, so rows can be reordered.

    k: [N, HK, W, K] and v: [N, HK, W, V] in the inputs' dtype. valid: bool [N, W], whether the slot holds a key that
    counts. count: int64 [N], tokens seen so far (padding included).
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    count: Tensor


def new_window_state(
    sequences: int,
    window: int,
    *,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> WindowState:
    """An empty state: nothing seen yet."""
    return WindowState(
        k=torch.zeros(sequences, kv_heads, window, key_dim, dtype=dtype, device=device),
        v=torch.zeros(sequences, kv_heads, window, value_dim, dtype=dtype, device=device),
        valid=torch.zeros(sequences, window, dtype=torch.bool, device=device),
        count=torch.zeros(sequences, dtype=torch.int64, device=device),
    )


def check_state(state: WindowState, sequences: int, k: Tensor, v: Tensor, window: int) -> None:
    """Raise unless the state belongs to this window and to tensors of this shape."""
    heads = k.shape[2]
    expected = (
        ("k", state.k, (sequences, heads, window, k.shape[3])),
        ("v", state.v, (sequences, heads, window, v.shape[3])),
        ("valid", state.valid, (sequences, window)),
        ("count", state.count, (sequences,)),
    )
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise KernelError(f"state.{name} must have shape {shape}, got {tuple(tensor.shape)}")


def unroll(state: WindowState) -> tuple[Tensor, Tensor, Tensor]:
    """The ring's content, oldest token first: k [N, W, HK, K], v [N, W, HK, V], valid [N, W]."""
    window = state.valid.shape[1]
    slots = torch.arange(window, device=state.count.device)
    order = (state.count[:, None] + slots) % window
    return _take(state.k, order), _take(state.v, order), state.valid.gather(1, order)


def roll(k: Tensor, v: Tensor, valid: Tensor, count: Tensor) -> WindowState:
    """The ring after `count` [N] tokens of which these are the last W, oldest first: the inverse of `unroll`."""
    window = valid.shape[1]
    slots = torch.arange(window, device=count.device)
    order = (slots - count[:, None]) % window
    ring_k = _take(k.transpose(1, 2), order).transpose(1, 2).contiguous()
    ring_v = _take(v.transpose(1, 2), order).transpose(1, 2).contiguous()
    return WindowState(k=ring_k, v=ring_v, valid=valid.gather(1, order), count=count)


def _take(heads_first: Tensor, order: Tensor) -> Tensor:
    """Rows `order` [N, W] of [N, HK, W, D], as [N, W, HK, D]."""
    sequences, heads, window, width = heads_first.shape
    index = order[:, None, :, None].expand(sequences, heads, window, width)
    return heads_first.gather(2, index).transpose(1, 2)
