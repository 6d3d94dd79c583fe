"""Windowed softmax attention as a plain loop over tokens: the oracle. Works in float64, differentiable by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.window.ops import window_attention
from fla_swap.kernels.window.state import WindowState, new_window_state, roll, unroll


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    initial_state: WindowState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Same contract as `fla_swap.kernels.window.ops.window_attention`."""
    batch, total = q.shape[:2]
    bounds = [(row, 0, total) for row in range(batch)]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        bounds = [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]
    if valid is None:
        valid = torch.ones(batch, total, dtype=torch.bool, device=q.device)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    states = []
    options: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "alibi": alibi}
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    for n, (row, begin, end) in enumerate(bounds):
        part = slice(begin, end)
        past = None
        if window is not None:
            past = _row(initial_state, n) if initial_state is not None else _empty(k, v, window)
        keys, values, counts = k[row, part], v[row, part], valid[row, part]
        if past is not None:
            past_k, past_v, past_valid = unroll(past)
            keys, values = torch.cat((past_k[0], keys)), torch.cat((past_v[0], values))
            counts = torch.cat((past_valid[0], counts))
        rows = [
            _token(q[row, t], keys, values, counts, keys.shape[0] - end + t, window, **options)
            for t in range(begin, end)
        ]
        if rows:
            out = out.index_put((torch.tensor(row), torch.arange(begin, end)), torch.stack(rows))
        if past is not None and window is not None:
            tail = slice(-window, None)
            count = past.count + (end - begin)
            states.append(roll(keys[None, tail], values[None, tail], counts[None, tail], count))
    if not output_final_state:
        return out, None
    return out, WindowState(*(torch.cat(parts) for parts in zip(*states, strict=True)))


def _token(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    position: int,
    window: int | None,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
) -> Tensor:
    """One query [H, K] at index `position` of keys [L, HK, K]: its output [H, V]."""
    groups = q.shape[0] // keys.shape[1]
    if not bool(counts[position]):
        return (q[:, :1] * 0.0).expand(-1, values.shape[-1])
    first = 0 if window is None else max(0, position - window + 1)
    seen = torch.arange(first, position + 1, device=q.device)
    seen = seen[counts[seen]]
    k = keys[seen].repeat_interleave(groups, dim=1)
    v = values[seen].repeat_interleave(groups, dim=1)
    scores = torch.einsum("hk,lhk->hl", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores = scores - alibi[:, None] * (position - seen)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None].to(scores.dtype)), dim=1)
    weights = scores.softmax(-1)[:, : seen.shape[0]]
    return torch.einsum("hl,lhv->hv", weights, v)


def _row(state: WindowState, n: int) -> WindowState:
    return WindowState(*(tensor[n : n + 1] for tensor in state))


def _empty(k: Tensor, v: Tensor, window: int) -> WindowState:
    return new_window_state(
        1,
        window,
        kv_heads=k.shape[2],
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        dtype=k.dtype,
        device=k.device,
    )


def _make(device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int) -> dict[str, Tensor]:
    """Random inputs of the numerics table: two query heads for each key head where H is even."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = H // 2 if H % 2 == 0 else H

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return {
        "q": normal(2, T, H, D),
        "k": normal(2, T, kv_heads, D),
        "v": normal(2, T, kv_heads, D),
        "sinks": normal(H),
    }


NUMERICS_CASES: tuple[dict[str, Any], ...] = tuple(
    {"op": window_attention, "reference": window_attention_reference, "make": _make, "kwargs": kwargs}
    for kwargs in ({"window": 100}, {"window": None}, {"window": 100, "softcap": 5.0})
)
