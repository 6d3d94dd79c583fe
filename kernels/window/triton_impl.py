"""Windowed softmax attention in Triton: forward with log-denominators, backward kernels limited to the band, decode.

Legend: B batch, Tq queries, Tk keys (query i stands at key index i + Tk − Tq), H query heads, HK key/value heads,
G = H / HK, K key width, V value width; tiles of BM queries and BN keys, widths padded to BK and BV.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import triton_interpreted
from fla_swap.kernels.window.state import WindowState
from fla_swap.kernels.window.torch_impl import Band, sink_gradient

_MAX_WIDTH = 256


@triton.jit
def _tanh(x):
    """tanh without libdevice: a series near 0, where (1 − e) / (1 + e) would cancel."""
    square = x * x
    near = x * (
        1.0
        + square
        * (
            -1.0 / 3.0
            + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))))
        )
    )
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.35, near, tl.where(x < 0, -far, far))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """a @ b with an fp32 result. WIDE: Triton's interpreter cannot multiply bf16, so there it is widened first."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _tile(pointer, b, h, rows, total, T, heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """Rows of a [B, T, heads, width] tensor as [rows, padded], zeros outside."""
    columns = tl.arange(0, padded)
    offsets = ((b.to(tl.int64) * T + rows)[:, None] * heads + h) * width + columns[None, :]
    return tl.load(pointer + offsets, mask=(rows < total)[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _store_tile(pointer, values, b, h, rows, T, heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """The inverse of `_tile`."""
    columns = tl.arange(0, padded)
    offsets = ((b.to(tl.int64) * T + rows)[:, None] * heads + h) * width + columns[None, :]
    mask = (rows < T)[:, None] & (columns < width)[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _visible(
    valid, start, b, rows, keys, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: the pairs that count."""
    position = rows + (Tk - Tq)
    distance = position[:, None] - keys[None, :]
    seen = (rows < Tq)[:, None] & (keys < Tk)[None, :] & (distance >= 0)
    if HAS_WINDOW:
        seen = seen & (distance < window)
    if HAS_VALID:
        base = valid + b.to(tl.int64) * Tk
        row_counts = tl.load(base + position, mask=rows < Tq, other=0) != 0
        key_counts = tl.load(base + keys, mask=keys < Tk, other=0) != 0
        seen = seen & row_counts[:, None] & key_counts[None, :]
    if HAS_START:
        first = tl.load(start + rows, mask=rows < Tq, other=Tk)
        seen = seen & (keys[None, :] >= first[:, None])
    return seen


@triton.jit
def _score(
    q, k, rows, keys, Tq, Tk, scale, softcap, slope,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] before the mask, and the derivative of the softcap (1 without one)."""
    score = _dot(q, tl.trans(k), PRECISION, WIDE) * scale
    derivative = score * 0.0 + 1.0
    if HAS_SOFTCAP:
        squashed = _tanh(score / softcap)
        derivative = 1.0 - squashed * squashed
        score = squashed * softcap
    if HAS_ALIBI:
        score -= slope * ((rows + (Tk - Tq))[:, None] - keys[None, :]).to(tl.float32)
    return score, derivative


@triton.jit
def _key_range(
    start, first_row, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_START: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys [low, high) that the queries first_row … first_row + BM − 1 can see; low is a multiple of BN."""
    offset = Tk - Tq
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(low, first_row + offset - window + 1)
    if HAS_START:
        low = tl.maximum(low, tl.load(start + first_row))
    return low // BN * BN, tl.minimum(first_row + BM, Tq) + offset


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def forward_kernel(
    q, k, v, sinks, alibi, valid, start, o, lse, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. Online softmax over their band of keys."""
    blocks = tl.cdiv(Tq, BM)
    b, h = tl.program_id(0) // blocks // H, tl.program_id(0) // blocks % H
    first_row = tl.program_id(0) % blocks * BM
    rows = first_row + tl.arange(0, BM)
    query = _tile(q, b, h, rows, Tq, Tq, H, K, BK)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    top = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if HAS_SINKS:
        top = tl.zeros((BM,), tl.float32) + tl.load(sinks + h).to(tl.float32)
        total += 1.0
    mixed = tl.zeros((BM, BV), tl.float32)
    low, high = _key_range(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM, BN)
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, h // (H // HK), keys, Tk, Tk, HK, K, BK)
        value = _tile(v, b, h // (H // HK), keys, Tk, Tk, HK, V, BV)
        score, _ = _score(
            query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
        )
        seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + _dot(weight.to(value.dtype), value, PRECISION, WIDE)
        top = new_top
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    _store_tile(o, mixed / safe[:, None], b, h, rows, Tq, H, V, BV)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    tl.store(lse + offsets, tl.where(empty, float("inf"), top + tl.log(safe)), mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def backward_query_kernel(
    q, k, v, grad, lse, delta, alibi, valid, start, dq, exact, dalibi, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of one head, and each row's share of its slope's gradient.

    `delta` is o · do with o as rounded; `exact` receives the same sum from the weights, for the sinks and the keys.
    """
    blocks = tl.cdiv(Tq, BM)
    b, h = tl.program_id(0) // blocks // H, tl.program_id(0) // blocks % H
    first_row = tl.program_id(0) % blocks * BM
    rows = first_row + tl.arange(0, BM)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    query = _tile(q, b, h, rows, Tq, Tq, H, K, BK)
    dout = _tile(grad, b, h, rows, Tq, Tq, H, V, BV)
    row_lse = tl.load(lse + offsets, mask=rows < Tq, other=float("inf"))
    row_delta = tl.load(delta + offsets, mask=rows < Tq, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    dquery = tl.zeros((BM, BK), tl.float32)
    dslope = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    low, high = _key_range(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM, BN)
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, h // (H // HK), keys, Tk, Tk, HK, K, BK)
        value = _tile(v, b, h // (H // HK), keys, Tk, Tk, HK, V, BV)
        score, derivative = _score(
            query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
        )
        seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
        weight = tl.exp(tl.where(seen, score, float("-inf")) - row_lse[:, None])
        dweight = _dot(dout, tl.trans(value), PRECISION, WIDE)
        sums += tl.sum(weight * dweight, 1)
        dscore = weight * (dweight - row_delta[:, None])
        if HAS_ALIBI:
            distance = ((rows + (Tk - Tq))[:, None] - keys[None, :]).to(tl.float32)
            dslope -= tl.sum(dscore * distance, 1)
        dscore = dscore * derivative
        dquery += _dot(dscore.to(key.dtype), key, PRECISION, WIDE)
    _store_tile(dq, dquery * scale, b, h, rows, Tq, H, K, BK)
    tl.store(exact + offsets, sums, mask=rows < Tq)
    if HAS_ALIBI:
        tl.store(dalibi + offsets, dslope, mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def backward_key_kernel(
    q, k, v, grad, lse, delta, alibi, valid, start, stop, dk, dv, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BN keys and values of one key/value head, over its G query heads and their band."""
    blocks = tl.cdiv(Tk, BN)
    b, kv_head = tl.program_id(0) // blocks // HK, tl.program_id(0) // blocks % HK
    first_key = tl.program_id(0) % blocks * BN
    keys = first_key + tl.arange(0, BN)
    key = _tile(k, b, kv_head, keys, Tk, Tk, HK, K, BK)
    value = _tile(v, b, kv_head, keys, Tk, Tk, HK, V, BV)
    dkey = tl.zeros((BN, BK), tl.float32)
    dvalue = tl.zeros((BN, BV), tl.float32)
    low = tl.maximum(0, first_key - (Tk - Tq)) // BM * BM
    high = Tq
    if HAS_WINDOW:
        high = tl.minimum(high, first_key + BN - 1 - (Tk - Tq) + window)
    if HAS_START:
        high = tl.minimum(high, tl.load(stop + tl.minimum(first_key + BN, Tk) - 1))
    for group in range(H // HK):
        h = kv_head * (H // HK) + group
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi + h).to(tl.float32)
        for begin in range(low, high, BM):
            rows = begin + tl.arange(0, BM)
            offsets = (b.to(tl.int64) * H + h) * Tq + rows
            query = _tile(q, b, h, rows, Tq, Tq, H, K, BK)
            dout = _tile(grad, b, h, rows, Tq, Tq, H, V, BV)
            row_lse = tl.load(lse + offsets, mask=rows < Tq, other=float("inf"))
            row_delta = tl.load(delta + offsets, mask=rows < Tq, other=0.0)
            score, derivative = _score(
                query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
            )
            seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
            weight = tl.exp(tl.where(seen, score, float("-inf")) - row_lse[:, None])
            dvalue += _dot(tl.trans(weight.to(dout.dtype)), dout, PRECISION, WIDE)
            dweight = _dot(dout, tl.trans(value), PRECISION, WIDE)
            dscore = weight * (dweight - row_delta[:, None]) * derivative
            dkey += _dot(tl.trans(dscore.to(query.dtype)), query, PRECISION, WIDE)
    _store_tile(dk, dkey * scale, b, kv_head, keys, Tk, HK, K, BK)
    _store_tile(dv, dvalue, b, kv_head, keys, Tk, HK, V, BV)


@triton.jit(do_not_specialize=["T", "step"])
def decode_kernel(
    q, k, v, sinks, alibi, valid, ring_k, ring_v, ring_valid, count, o, T, step, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program: token `step` of one sequence and head against the ring; the first head of a group writes the slot.

    The slot of the new token is never read from the ring, so heads of a group need not wait for each other.
    `ring_valid` and `count` are updated by `advance_kernel` afterwards.
    """
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    kv_head = h // (H // HK)
    across_k, across_v = tl.arange(0, BK), tl.arange(0, BV)
    token = n * T + step
    query = tl.load(q + (token * H + h) * K + across_k, mask=across_k < K, other=0.0).to(tl.float32)
    new_k = tl.load(k + (token * HK + kv_head) * K + across_k, mask=across_k < K, other=0.0)
    new_v = tl.load(v + (token * HK + kv_head) * V + across_v, mask=across_v < V, other=0.0)
    seen_tokens = tl.load(count + n)
    slot = (seen_tokens % W).to(tl.int32)
    counts = True
    if HAS_VALID:
        counts = tl.load(valid + token) != 0
    top = -1.0e30
    total = 0.0
    if HAS_SINKS:
        top = tl.load(sinks + h).to(tl.float32)
        total = 1.0
    mixed = tl.zeros((BV,), tl.float32)
    row = n * HK + kv_head
    for begin in range(0, W, BN):
        slots = begin + tl.arange(0, BN)
        is_new = slots == slot
        old = (slots < W) & (slots != slot)
        offsets_k = (row * W + slots)[:, None] * K + across_k[None, :]
        key = tl.load(ring_k + offsets_k, mask=old[:, None] & (across_k < K)[None, :], other=0.0)
        key = tl.where(is_new[:, None], new_k[None, :].to(key.dtype), key).to(tl.float32)
        score = tl.sum(query[None, :] * key, 1) * scale
        if HAS_SOFTCAP:
            score = _tanh(score / softcap) * softcap
        if HAS_ALIBI:
            age = (slot - slots + W) % W
            score -= tl.load(alibi + h).to(tl.float32) * age.to(tl.float32)
        live = tl.load(ring_valid + n * W + slots, mask=old, other=0) != 0
        score = tl.where((live | is_new) & counts, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        shrink = tl.exp(top - new_top)
        offsets_v = (row * W + slots)[:, None] * V + across_v[None, :]
        value = tl.load(ring_v + offsets_v, mask=old[:, None] & (across_v < V)[None, :], other=0.0)
        value = tl.where(is_new[:, None], new_v[None, :].to(value.dtype), value).to(tl.float32)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = new_top
    out = mixed / tl.where(total == 0.0, 1.0, total)
    tl.store(o + (token * H + h) * V + across_v, out.to(o.dtype.element_ty), mask=across_v < V)
    if h % (H // HK) == 0:
        target = row * W + slot
        tl.store(ring_k + target * K + across_k, new_k.to(ring_k.dtype.element_ty), mask=across_k < K)
        tl.store(ring_v + target * V + across_v, new_v.to(ring_v.dtype.element_ty), mask=across_v < V)


@triton.jit(do_not_specialize=["T", "step"])
def advance_kernel(valid, ring_valid, count, T, step, W: tl.constexpr, HAS_VALID: tl.constexpr):
    """One program: one sequence has seen token `step`."""
    n = tl.program_id(0).to(tl.int64)
    seen_tokens = tl.load(count + n)
    counts = tl.full((), 1, tl.int8)
    if HAS_VALID:
        counts = tl.load(valid + n * T + step).to(tl.int8)
    tl.store(ring_valid + n * W + seen_tokens % W, counts.to(ring_valid.dtype.element_ty))
    tl.store(count + n, seen_tokens + 1)


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, band: Band) -> tuple[Tensor, Tensor]:
    """As `torch_impl.forward`; inputs contiguous."""
    batch, queries, heads, _ = q.shape
    o = q.new_empty(batch, queries, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    static = _static(q, k, v)
    _run(
        forward_kernel, _blocks(queries, static["BM"]) * batch * heads,
        q, k, v, *_pointers(q, sinks, band.alibi, band.valid, band.start), o, lse,
        queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0,
        **static, **_flags(band), HAS_SINKS=sinks is not None, **_launch(q.dtype, static),
    )  # fmt: skip
    return o, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, band: Band
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `torch_impl.backward`; inputs contiguous."""
    batch, queries, heads, _ = q.shape
    delta = (grad.float() * o.float()).sum(-1).transpose(1, 2).contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    exact = torch.empty_like(delta)
    dalibi = None if band.alibi is None else torch.empty_like(delta)
    if o.numel() == 0:
        dsinks, dslopes = (None if x is None else x.new_zeros(heads) for x in (sinks, dalibi))
        return dq, dk.zero_(), dv.zero_(), dsinks, dslopes
    static = _static(q, k, v)
    alibi, valid, start, stop = _pointers(q, band.alibi, band.valid, band.start, band.stop)
    numbers = (queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0)
    options = {**static, **_flags(band), **_launch(q.dtype, static)}
    _run(
        backward_query_kernel, _blocks(queries, static["BM"]) * batch * heads,
        q, k, v, grad, lse, delta, alibi, valid, start,
        dq, exact, exact if dalibi is None else dalibi, *numbers, **options
    )  # fmt: skip
    _run(
        backward_key_kernel, _blocks(k.shape[1], static["BN"]) * batch * k.shape[2],
        q, k, v, grad, lse, exact, alibi, valid, start, stop, dk, dv, *numbers, **options
    )  # fmt: skip
    dsinks = None if sinks is None else sink_gradient(sinks, lse, exact)
    return dq, dk, dv, dsinks, None if dalibi is None else dalibi.sum((0, 2))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: WindowState, sinks: Tensor | None, valid: Tensor | None, band: Band
) -> Tensor:
    """As `torch_impl.step`; the tokens are taken one after another."""
    sequences, steps, heads, _ = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    for name, tensor in zip(WindowState._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise KernelError(f"state.{name} must be contiguous")
    o = q.new_empty(sequences, steps, heads, v.shape[-1])
    if o.numel() == 0:
        return o
    static = _static(q, k, v)
    static = {name: static[name] for name in ("H", "HK", "K", "V", "BK", "BV")} | {"W": state.valid.shape[1]}
    sinks_, alibi, valid_ = _pointers(q, sinks, band.alibi, valid)
    ring_valid = state.valid.view(torch.uint8)
    flags = {"HAS_SINKS": sinks is not None, "HAS_ALIBI": band.alibi is not None, "HAS_VALID": valid is not None}
    for number in range(steps):
        _run(
            decode_kernel, sequences * heads,
            q, k, v, sinks_, alibi, valid_, state.k, state.v, ring_valid, state.count, o,
            steps, number, band.scale, band.softcap or 1.0,
            **static, **flags, HAS_SOFTCAP=band.softcap is not None, BN=64, num_warps=4,
        )  # fmt: skip
        _run(
            advance_kernel, sequences,
            valid_, ring_valid, state.count, steps, number,
            W=static["W"], HAS_VALID=valid is not None, num_warps=1,
        )  # fmt: skip
    return o


def _blocks(total: int, size: int) -> int:
    return (total + size - 1) // size


def _run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **options)


def tiles(dtype: torch.dtype, width: int) -> tuple[int, int, int]:
    """(BM, BN, warps) for a padded head width: every kernel stays under 99 KiB of shared memory on every chip.

    fp32 products run without tensor cores, whose code grows with the tile; small ones keep compilation in seconds.
    """
    if dtype == torch.float32:
        return (16, 16, 4) if width > 128 else (32, 32, 4)
    return (32, 32, 4) if width > 128 else (64, 64, 4)


def _static(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(
            f"Triton window attention takes fp32, bf16 or fp16, got {q.dtype}; use implementation='torch'"
        )
    if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
        raise KernelError(f"head widths above {_MAX_WIDTH} are not supported, got K={q.shape[-1]}, V={v.shape[-1]}")
    return _shapes(q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _shapes(dtype: torch.dtype, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Compile-time sizes. Widths are padded to at least 64, so that no product has a narrow operand."""
    padded_k, padded_v = (max(64, 1 << (width - 1).bit_length()) for width in (key_dim, value_dim))
    rows, keys, _ = tiles(dtype, max(padded_k, padded_v))
    return {
        **{"H": heads, "HK": kv_heads, "K": key_dim, "V": value_dim},
        **{"BM": rows, "BN": keys, "BK": padded_k, "BV": padded_v},
    }


def _flags(band: Band) -> dict[str, bool]:
    return {
        "HAS_ALIBI": band.alibi is not None,
        "HAS_VALID": band.valid is not None,
        "HAS_START": band.start is not None,
        "HAS_WINDOW": band.window is not None,
        "HAS_SOFTCAP": band.softcap is not None,
    }


def _launch(dtype: torch.dtype, static: dict[str, Any]) -> dict[str, Any]:
    _, _, warps = tiles(dtype, max(static["BK"], static["BV"]))
    wide = dtype == torch.bfloat16 and triton_interpreted()
    return {"PRECISION": precision(dtype), "WIDE": wide, "num_warps": warps, "num_stages": 1}


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied in full precision; 16-bit operands ignore this."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous tensors for the kernels (bool as bytes); an absent one is replaced by one that is never read."""
    ready = [stand_in if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t.dtype == torch.bool else t for t in ready]


_POINTERS = {"start": "*i64", "stop": "*i64", "valid": "*u8", "ring_valid": "*u8", "count": "*i64"}
_FP32_POINTERS = ("lse", "delta", "exact", "dalibi", "sinks", "alibi")
_INTEGERS = ("Tq", "Tk", "T", "window", "step")


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Every shipped configuration: name, kernel, signature, constants, warps, stages."""
    for dtype, code in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for width in (64, 128, 256):
            shapes = _shapes(dtype, 8, 4, width, width)
            _, _, warps = tiles(dtype, width)
            for kernel in (forward_kernel, backward_query_kernel, backward_key_kernel):
                for plain in (True, False):
                    constants = {name: shapes[name] for name in shapes}
                    constants |= {name: not plain for name in kernel.arg_names if name.startswith("HAS_")}
                    constants |= {"HAS_WINDOW": True, "PRECISION": precision(dtype), "WIDE": False}
                    kind = "plain" if plain else "everything"
                    name = f"{kernel.__name__}-{code}-{width}-{kind}"
                    yield name, kernel, _signature(kernel, code, constants), constants, warps, 1
            constants = {name: shapes[name] for name in shapes if name != "BM"} | {"W": 1000, "BN": 64}
            constants |= {name: True for name in decode_kernel.arg_names if name.startswith("HAS_")}
            signature = _signature(decode_kernel, code, constants)
            yield f"decode_kernel-{code}-{width}", decode_kernel, signature, constants, 4, 1
    constants = {"W": 1000, "HAS_VALID": True}
    yield "advance_kernel", advance_kernel, _signature(advance_kernel, "bf16", constants), constants, 1, 1


def _signature(kernel: Any, code: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in _INTEGERS:
            types[name] = "i32"
        elif name in ("scale", "softcap"):
            types[name] = "fp32"
        else:
            types[name] = _POINTERS.get(name, "*fp32" if name in _FP32_POINTERS else f"*{code}")
    return types
