"""Windowed softmax attention in PyTorch: query blocks against their band of keys, cost T · window.

Legend: B batch, Tq queries, Tk keys (Tk ≥ Tq; query i stands at key index i + Tk − Tq), H query heads, HK key/value
heads, G = H / HK, C queries in a block, L keys in its band, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_swap.kernels.window.state import WindowState


@dataclass(frozen=True, kw_only=True)
class Band:
    """What decides which key a query sees and how its score is shaped; shared by forward and backward.

    `offset` is Tk − Tq; `valid` bool [B, Tk]; `start` and `stop` int64 [Tk], where
    each token's packed sequence begins and ends.
    """

    window: int | None
    softcap: float | None
    scale: float
    offset: int = 0
    alibi: Tensor | None = None
    valid: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None


def sequence_bounds(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """int64 [T], [T]: where each token's packed sequence begins and ends.

    Rows after the last sequence get `total` for both, so they see nothing and nothing sees them.
    """
    sequences = cu_seqlens.shape[0] - 1
    positions = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.to(torch.int64)
    number = torch.searchsorted(bounds, positions, right=True)
    inside = number <= sequences
    stop = torch.where(inside, bounds[number.clamp(max=sequences)], total)
    return torch.where(inside, bounds[number - 1], total), stop


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, band: Band) -> tuple[Tensor, Tensor]:
    """o [B, Tq, H, V] in q's dtype, and the log of the softmax denominator [B, H, Tq] (+inf where no key counts)."""
    batch, queries, heads, _ = q.shape
    dtype = compute_dtype(q.dtype)
    q_heads, k_heads, v_heads = _grouped(q, k, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    out = q_heads.new_empty(*q_heads.shape[:-1], v.shape[-1])
    lse = q_heads.new_empty(q_heads.shape[:-1])
    sink = _per_group(sinks, k.shape[2], dtype)
    for rows, keys in _blocks(queries, band):
        scores, _ = _scores(q_heads[:, :, :, rows], k_heads[:, :, keys], rows, keys, band)
        weights, total, top = _exponentials(scores, sink)
        mixed = _matmul(weights, v_heads[:, :, keys])
        empty = total == 0
        out[:, :, :, rows] = mixed / total.masked_fill(empty, 1.0)
        lse[:, :, :, rows] = (top + total.log()).masked_fill(empty, torch.inf).squeeze(-1)
    o = out.reshape(batch, heads, queries, -1).transpose(1, 2).to(q.dtype).contiguous()
    return o, lse.reshape(batch, heads, queries)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    band: Band,
    lse_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, sinks [H] and alibi [H] (None where there are none).

    o · do is summed from the weights: o was rounded to its dtype, and the sinks' gradient is made of nothing else. What
    reaches the log-denominators, `lse_grad` [B, H, Tq], is taken off it.
    """
    batch, queries, heads, _ = q.shape
    dtype = compute_dtype(q.dtype)
    q_heads, k_heads, v_heads = _grouped(q, k, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    grad_heads = _grouped(grad, k, dtype)
    delta = torch.empty_like(lse)
    lse_heads, delta_heads = (x.view(batch, k.shape[2], -1, queries, 1) for x in (lse, delta))
    dq = torch.empty_like(q_heads)
    dk, dv = torch.zeros_like(k_heads), torch.zeros_like(v_heads)
    dalibi = None if band.alibi is None else q_heads.new_zeros(heads)
    for rows, keys in _blocks(queries, band):
        q_rows, grad_rows = q_heads[:, :, :, rows], grad_heads[:, :, :, rows]
        scores, squashed = _scores(q_rows, k_heads[:, :, keys], rows, keys, band)
        weights = scores.sub_(lse_heads[:, :, :, rows]).exp_()
        dv[:, :, keys] += _outer(weights, grad_rows)
        dscores = _matmul(grad_rows, v_heads[:, :, keys].mT).mul_(weights)
        row_delta = dscores.sum(-1, keepdim=True)
        if lse_grad is not None:
            row_delta = row_delta - lse_grad.view_as(lse_heads[..., 0])[:, :, :, rows].unsqueeze(-1)
        delta_heads[:, :, :, rows] = row_delta
        dscores = dscores.addcmul_(weights, row_delta, value=-1.0)
        if dalibi is not None:
            distance = _distance(rows, keys, band, dscores.device).to(dtype)
            dalibi -= (dscores * distance).sum((0, 3, 4)).flatten()
        if squashed is not None:
            dscores.mul_(1.0 - squashed.square())
        dq[:, :, :, rows] = _matmul(dscores, k_heads[:, :, keys]).mul_(band.scale)
        dk[:, :, keys] += _outer(dscores, q_rows).mul_(band.scale)
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    dq = dq.reshape(batch, heads, queries, -1)
    return _tokens_first(dq, q), _tokens_first(dk, k), _tokens_first(dv, v), dsinks, dalibi


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ p_sink · (o · do): a sink has a share of the denominator and no value. lse, delta [B, H, T].

    Summed in float64: the terms nearly cancel.
    """
    share = (sinks.double()[:, None] - lse.double()).exp()
    return -(share * delta.double()).sum((0, 2)).to(lse.dtype)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: WindowState, sinks: Tensor | None, valid: Tensor | None, band: Band
) -> Tensor:
    """Decode T tokens [N, T, ·, ·]: o [N, T, H, V]; the ring takes the last W of them in place.

    A single token is written first and then sees the whole ring. Several are put behind the ring's content for the
    attention, because writing them would drop keys that the first of them still sees.
    """
    window, steps = state.valid.shape[1], q.shape[1]
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    new_k, new_v = k.transpose(1, 2).to(state.k.dtype), v.transpose(1, 2).to(state.v.dtype)
    slots = torch.arange(window, device=q.device)
    if steps == 1:
        _write(state, new_k, new_v, valid)
        age = (state.count[:, None] - 1 - slots) % window
        allowed = (state.valid & valid)[:, None]
        return _attend(q, state.k, state.v, sinks, age[:, None], allowed, band)
    keys, values = torch.cat((state.k, new_k), 2), torch.cat((state.v, new_v), 2)
    new = torch.arange(steps, device=q.device)
    age = (state.count[:, None] - 1 - slots) % window
    behind = torch.cat((-1 - age, new.expand(q.shape[0], steps)), 1)
    distance = new[:, None] - behind[:, None]
    counted = torch.cat((state.valid, valid), 1)
    allowed = counted[:, None] & valid[:, :, None] & (distance >= 0) & (distance < window)
    out = _attend(q, keys, values, sinks, distance, allowed, band)
    _write(state, new_k, new_v, valid)
    return out


def _write(state: WindowState, k: Tensor, v: Tensor, valid: Tensor) -> None:
    """Put the last W of the new tokens (k, v heads first) into their slots, and count them all."""
    steps, window = valid.shape[1], state.valid.shape[1]
    kept = min(steps, window)
    slots = (state.count[:, None] + torch.arange(steps - kept, steps, device=valid.device)) % window
    for ring, new in ((state.k, k), (state.v, v)):
        index = slots[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])
        ring.scatter_(2, index, new[:, :, steps - kept :])
    state.valid.scatter_(1, slots, valid[:, steps - kept :])
    state.count.add_(steps)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, distance: Tensor, allowed: Tensor, band: Band
) -> Tensor:
    """A few queries over all keys: distance and allowed [N, T, L] (or [N, 1, L]), k and v heads first [N, HK, L, ·]."""
    dtype = compute_dtype(q.dtype)
    q_heads = _grouped(q, k.transpose(1, 2), dtype)
    scores = _matmul(q_heads, k.to(dtype).mT).mul_(band.scale)
    if band.softcap is not None:
        scores = scores.div_(band.softcap).tanh_().mul_(band.softcap)
    if band.alibi is not None:
        slopes = band.alibi.to(dtype).view(k.shape[1], -1, 1, 1)
        scores = scores - slopes * distance[:, None, None].to(dtype)
    scores = scores.masked_fill_(~allowed[:, None, None], -torch.inf)
    weights, total, _ = _exponentials(scores, _per_group(sinks, k.shape[1], dtype))
    out = _matmul(weights, v.to(dtype)) / total.masked_fill(total == 0, 1.0)
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous()


def _exponentials(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores − top) (in place), their sum with the sink's share, and top, all along the last dimension."""
    top = scores.amax(-1, keepdim=True)
    top = top.clamp_min(torch.finfo(scores.dtype).min) if sink is None else torch.maximum(top, sink)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    return weights, total, top


def _blocks(queries: int, band: Band) -> list[tuple[slice, slice]]:
    """Query blocks with the band of keys that any of their queries can see."""
    block = 64 if band.window is not None and band.window <= 256 else 128
    reach = queries + band.offset if band.window is None else band.window - 1
    pairs = []
    for begin in range(0, queries, block):
        end = min(begin + block, queries)
        pairs.append((slice(begin, end), slice(max(0, begin + band.offset - reach), end + band.offset)))
    return pairs


def _scores(q_rows: Tensor, k_band: Tensor, rows: slice, keys: slice, band: Band) -> tuple[Tensor, Tensor | None]:
    """Masked scores [B, HK, G, C, L], and tanh(score / softcap) when there is a softcap."""
    scores = _matmul(q_rows, k_band.mT).mul_(band.scale)
    squashed = None
    if band.softcap is not None:
        squashed = scores.div_(band.softcap).tanh_()
        scores = squashed * band.softcap
    distance = _distance(rows, keys, band, scores.device)
    if band.alibi is not None:
        slopes = band.alibi.to(scores.dtype).view(k_band.shape[1], -1, 1, 1)
        scores.sub_(slopes * distance.to(scores.dtype))
    return scores.masked_fill_(_hidden(distance, rows, keys, band), -torch.inf), squashed


def _distance(rows: slice, keys: slice, band: Band, device: torch.device) -> Tensor:
    """int64 [C, L]: how many tokens each key lies before each query."""
    query = torch.arange(rows.start + band.offset, rows.stop + band.offset, device=device)
    return query[:, None] - torch.arange(keys.start, keys.stop, device=device)


def _hidden(distance: Tensor, rows: slice, keys: slice, band: Band) -> Tensor:
    """bool, broadcastable to [B, HK, G, C, L]: the pairs that do not count."""
    hidden = distance < 0
    if band.window is not None:
        hidden = hidden | (distance >= band.window)
    query = slice(rows.start + band.offset, rows.stop + band.offset)
    if band.start is not None:
        index = torch.arange(keys.start, keys.stop, device=distance.device)
        hidden = hidden | (index < band.start[query, None])
    if band.valid is not None:
        both = band.valid[:, query, None] & band.valid[:, None, keys]
        hidden = hidden | ~both[:, None, None]
    return hidden


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, HK, D] → [B, HK, T, D], contiguous."""
    return x.transpose(1, 2).to(dtype).contiguous()


def _grouped(x: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] → [B, HK, G, T, D], contiguous."""
    batch, steps, heads, width = x.shape
    kv_heads = k.shape[2]
    return _heads_first(x, dtype).view(batch, kv_heads, heads // kv_heads, steps, width)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """[B, H, T, D] → [B, T, H, D], contiguous, in the dtype of `like`."""
    return x.transpose(1, 2).to(like.dtype).contiguous()


def _per_group(sinks: Tensor | None, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
    """[H] → [HK, G, 1, 1]."""
    return None if sinks is None else sinks.to(dtype).view(kv_heads, -1, 1, 1)


def _matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """[B, HK, G, C, D] @ [B, HK, D, E]: the heads of a group share one matrix, so they are rows of one product."""
    batch, kv_heads, groups, count, width = rows.shape
    product = rows.reshape(batch, kv_heads, groups * count, width) @ shared
    return product.view(batch, kv_heads, groups, count, -1)


def _outer(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ over the group and its queries: [B, HK, G, C, L], [B, HK, G, C, D] → [B, HK, L, D]."""
    return weights.flatten(2, 3).mT @ rows.flatten(2, 3)
