"""Windowed softmax attention with every score written out: the oracle. Works in float64, differentiable by autograd."""

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
        if end > begin:
            rows = _attend(q[row, part], keys, values, counts, window, **options)
            out = out.index_put((torch.tensor(row), torch.arange(begin, end)), rows)
        if past is not None and window is not None:
            tail = slice(-window, None)
            count = past.count + (end - begin)
            states.append(roll(keys[None, tail], values[None, tail], counts[None, tail], count))
    if not output_final_state:
        return out, None
    return out, WindowState(*(torch.cat(parts) for parts in zip(*states, strict=True)))


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    window: int | None,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    scale: float,
) -> Tensor:
    """The last T of L tokens as queries [T, H, K] over all keys [L, HK, K], every score written out: [T, H, V]."""
    groups = q.shape[1] // keys.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    positions = torch.arange(keys.shape[0], device=q.device)
    queries = positions[keys.shape[0] - q.shape[0] :]
    distance = queries[:, None] - positions
    seen = (distance >= 0) & counts & counts[queries, None]
    if window is not None:
        seen = seen & (distance < window)
    scores = torch.einsum("thk,lhk->htl", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores = scores - alibi[:, None, None] * distance
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks[:, None, None].to(scores.dtype).expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, column), dim=2)
    live = counts[queries, None, None]
    scores = torch.where(live.movedim(0, 1), scores, 0.0)
    weights = scores.softmax(-1)[:, :, : keys.shape[0]]
    return torch.einsum("htl,lhv->thv", weights, v) * live


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
    {"name": name, "op": window_attention, "reference": window_attention_reference, "make": _make, "kwargs": kwargs}
    for name, kwargs in (
        ("window_attention(window=100)", {"window": 100}),
        ("window_attention(window=None)", {"window": None, "output_final_state": False}),
        ("window_attention(window=100, softcap=5.0)", {"window": 100, "softcap": 5.0}),
    )
)
