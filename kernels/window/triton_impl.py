"""Windowed softmax attention in Triton: forward with log-denominators, backward kernels limited to the band, decode.

Legend: B batch, Tq queries, Tk keys (query i stands at key index i + Tk − Tq), H query heads, HK key/value heads,
G = H / HK, K key width, V value width; tiles of BM queries and BN keys, widths padded to BK and BV.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import triton_interpreted
from fla_swap.kernels.window.torch_impl import Band, sink_gradient

_MAX_WIDTH = 256
# (BM, BN, warps, stages) by kernel and head width: the fastest on an H100 (bf16, 2k to 16k tokens) of those that fit
# every large chip and spill little.
LARGE = {
    **{("forward", 64): (64, 64, 4, 2), ("forward", 128): (128, 128, 8, 2), ("forward", 256): (128, 64, 8, 2)},
    **{("backward", 64): (64, 64, 4, 3), ("backward", 128): (64, 64, 4, 1), ("backward", 256): (64, 64, 8, 1)},
}
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
ONE_LOOP: tl.constexpr = tl.constexpr(True)
LINES: tl.constexpr = tl.constexpr(8)
"""Heads that are worked on together."""


@triton.jit
def tanh(x):
    """tanh without libdevice, within 1e-7 of the true value everywhere: scores need no better near 0."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """a @ b with an fp32 result. WIDE: Triton's interpreter cannot multiply bf16, so there it is widened first."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _tile(
    pointer, b, h, first, count: tl.constexpr, total, T,
    heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Rows first … first + count − 1 of a [B, T, heads, width] tensor as [count, padded], zeros from row `total` on.

    Only the origin is a 64-bit offset: inside a tile 32 bits suffice. INSIDE: all the rows exist, which saves a mask.
    """
    rows, columns = tl.arange(0, count), tl.arange(0, padded)
    origin = pointer + ((b.to(tl.int64) * T + first) * heads + h) * width
    place = origin + (rows[:, None] * (heads * width) + columns[None, :])
    if width != padded:
        return tl.load(place, mask=(first + rows < total)[:, None] & (columns < width)[None, :], other=0.0)
    if INSIDE:
        return tl.load(place)
    return tl.load(place, mask=(first + rows < total)[:, None], other=0.0)


@triton.jit
def _store_tile(
    pointer, values, b, h, first, count: tl.constexpr, T,
    heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """The inverse of `_tile`."""
    rows, columns = tl.arange(0, count), tl.arange(0, padded)
    origin = pointer + ((b.to(tl.int64) * T + first) * heads + h) * width
    mask = (first + rows < T)[:, None] & (columns < width)[None, :]
    tl.store(origin + (rows[:, None] * (heads * width) + columns[None, :]), values.to(pointer.dtype.element_ty), mask)


@triton.jit
def _place(Tq, BM: tl.constexpr):
    """(batch and head, first row) of a program over query blocks.

    A few heads at a time, so that their keys stay in the L2 cache; of these the last rows first, which have most keys.
    """
    blocks = tl.cdiv(Tq, BM)
    lines = tl.num_programs(0) // blocks
    first_line = tl.program_id(0) // (blocks * LINES) * LINES
    size = tl.minimum(lines - first_line, LINES)
    inside = tl.program_id(0) - first_line * blocks
    return first_line + inside % size, (blocks - 1 - inside // size) * BM


@triton.jit
def _visible(
    valid, start, b, rows, keys, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: the pairs that count. Of rows past the last query nothing is kept, whatever they see."""
    position = rows + (Tk - Tq)
    distance = position[:, None] - keys[None, :]
    if HAS_WINDOW:
        seen = distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32)
    else:
        seen = distance >= 0
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
    """Scores [BM, BN] before the mask in units of log 2, and tanh of the softcap (the score without one)."""
    score = _dot(q, tl.trans(k), PRECISION, WIDE)
    squashed = score
    if HAS_SOFTCAP:
        squashed = tanh(score * (scale / softcap))
        score = squashed * (softcap * LOG2E)
    else:
        score = score * (scale * LOG2E)
    if HAS_ALIBI:
        score -= (slope * LOG2E) * ((rows + (Tk - Tq))[:, None] - keys[None, :]).to(tl.float32)
    return score, squashed


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


@triton.jit
def _free_keys(
    low, high, first_row, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, PLAIN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[first, last) in steps of BN: the keys that all of these queries see, so that nothing is masked there.

    Not PLAIN (padding, documents): none. Always low ≤ first ≤ last, and last ≤ high up to a step.
    """
    first, last = low, low
    if PLAIN:
        last = tl.maximum(low, (first_row + Tk - Tq + 1) // BN * BN)
        if HAS_WINDOW:
            first = tl.maximum(low, tl.cdiv(first_row + BM + Tk - Tq - window, BN) * BN)
            first = tl.minimum(first, last)
    return first, last


@triton.jit
def _mix(
    query, k, v, valid, start, top, total, mixed, b, kv_head, rows, low, high, Tq, Tk, window, scale, softcap, slope,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [low, high)."""
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, kv_head, begin, BN, Tk, Tk, HK, K, BK, not MASKED)
        value = _tile(v, b, kv_head, begin, BN, Tk, Tk, HK, V, BV, not MASKED)
        factor = 1.0
        if HAS_SOFTCAP or HAS_ALIBI:
            score, _ = _score(
                query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
            )
        else:
            score = _dot(query, tl.trans(key), PRECISION, WIDE)
            factor = scale * LOG2E
        if MASKED:
            seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
            score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + _dot(weight.to(value.dtype), value, PRECISION, WIDE)
        top = new_top
    return top, total, mixed


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def forward_kernel(
    q, k, v, sinks, alibi, valid, start, o, lse, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, the last ones first (they have most keys); the band's edges are masked."""
    line, first_row = _place(Tq, BM)
    b, h = line // H, line % H
    kv_head = h // (H // HK)
    rows = first_row + tl.arange(0, BM)
    query = _tile(q, b, h, first_row, BM, Tq, Tq, H, K, BK, False)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    top = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if HAS_SINKS:
        top = tl.zeros((BM,), tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2E
        total += 1.0
    mixed = tl.zeros((BM, BV), tl.float32)
    low, high = _key_range(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM, BN)
    PLAIN: tl.constexpr = not (HAS_VALID or HAS_START)
    SINGLE: tl.constexpr = HAS_WINDOW and ONE_LOOP
    first, last = _free_keys(low, high, first_row, Tq, Tk, window, HAS_WINDOW, PLAIN, BM, BN)
    if SINGLE:
        last = low
    if HAS_WINDOW and PLAIN and not SINGLE:
        top, total, mixed = _mix(
            query, k, v, valid, start, top, total, mixed, b, kv_head, rows, low, first,
            Tq, Tk, window, scale, softcap, slope, HK, K, V, BN, BK, BV,
            HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
        )  # fmt: skip
    if PLAIN and not SINGLE:
        top, total, mixed = _mix(
            query, k, v, valid, start, top, total, mixed, b, kv_head, rows, first, last,
            Tq, Tk, window, scale, softcap, slope, HK, K, V, BN, BK, BV,
            HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, False, PRECISION, WIDE,
        )  # fmt: skip
    top, total, mixed = _mix(
        query, k, v, valid, start, top, total, mixed, b, kv_head, rows, last, high, Tq, Tk, window, scale, softcap,
        slope, HK, K, V, BN, BK, BV, HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
    )  # fmt: skip
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    _store_tile(o, mixed / safe[:, None], b, h, first_row, BM, Tq, H, V, BV)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    tl.store(lse + offsets, tl.where(empty, float("inf"), top * LN2 + tl.log(safe)), mask=rows < Tq)


@triton.jit
def _query_gradient(
    query, k, v, dout, row_lse, row_delta, valid, start, dquery, dslope, sums,
    b, kv_head, rows, low, high, Tq, Tk, window, scale, softcap, slope,
    HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the keys [low, high) add to the gradients of these queries."""
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, kv_head, begin, BN, Tk, Tk, HK, K, BK, not MASKED)
        value = _tile(v, b, kv_head, begin, BN, Tk, Tk, HK, V, BV, not MASKED)
        score, squashed = _score(
            query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
        )
        if MASKED:
            seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
            score = tl.where(seen, score, float("-inf"))
        weight = tl.exp2(score - row_lse[:, None])
        dweight = _dot(dout, tl.trans(value), PRECISION, WIDE)
        sums += tl.sum(weight * dweight, 1)
        dscore = weight * (dweight - row_delta[:, None])
        if HAS_ALIBI:
            distance = ((rows + (Tk - Tq))[:, None] - keys[None, :]).to(tl.float32)
            dslope -= tl.sum(dscore * distance, 1)
        if HAS_SOFTCAP:
            dscore = dscore * (1.0 - squashed * squashed)
        dquery += _dot(dscore.to(key.dtype), key, PRECISION, WIDE)
    return dquery, dslope, sums


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
    line, first_row = _place(Tq, BM)
    b, h = line // H, line % H
    kv_head = h // (H // HK)
    rows = first_row + tl.arange(0, BM)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    query = _tile(q, b, h, first_row, BM, Tq, Tq, H, K, BK, False)
    dout = _tile(grad, b, h, first_row, BM, Tq, Tq, H, V, BV, False)
    row_lse = tl.load(lse + offsets, mask=rows < Tq, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + offsets, mask=rows < Tq, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    dquery = tl.zeros((BM, BK), tl.float32)
    dslope = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    low, high = _key_range(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM, BN)
    PLAIN: tl.constexpr = not (HAS_VALID or HAS_START)
    SINGLE: tl.constexpr = HAS_WINDOW and ONE_LOOP
    first, last = _free_keys(low, high, first_row, Tq, Tk, window, HAS_WINDOW, PLAIN, BM, BN)
    if SINGLE:
        last = low
    if HAS_WINDOW and PLAIN and not SINGLE:
        dquery, dslope, sums = _query_gradient(
            query, k, v, dout, row_lse, row_delta, valid, start, dquery, dslope, sums, b, kv_head, rows, low, first,
            Tq, Tk, window, scale, softcap, slope, HK, K, V, BN, BK, BV,
            HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
        )  # fmt: skip
    if PLAIN and not SINGLE:
        dquery, dslope, sums = _query_gradient(
            query, k, v, dout, row_lse, row_delta, valid, start, dquery, dslope, sums, b, kv_head, rows, first, last,
            Tq, Tk, window, scale, softcap, slope, HK, K, V, BN, BK, BV,
            HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, False, PRECISION, WIDE,
        )  # fmt: skip
    dquery, dslope, sums = _query_gradient(
        query, k, v, dout, row_lse, row_delta, valid, start, dquery, dslope, sums, b, kv_head, rows, last, high,
        Tq, Tk, window, scale, softcap, slope, HK, K, V, BN, BK, BV,
        HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
    )  # fmt: skip
    _store_tile(dq, dquery * scale, b, h, first_row, BM, Tq, H, K, BK)
    tl.store(exact + offsets, sums, mask=rows < Tq)
    if HAS_ALIBI:
        tl.store(dalibi + offsets, dslope, mask=rows < Tq)


@triton.jit
def _key_gradient(
    q, key, value, grad, lse, delta, valid, start, dkey, dvalue,
    b, h, keys, low, high, Tq, Tk, window, scale, softcap, slope,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the queries [low, high) of head h add to the gradients of these keys and values."""
    for begin in range(low, high, BM):
        rows = begin + tl.arange(0, BM)
        offsets = (b.to(tl.int64) * H + h) * Tq + rows
        query = _tile(q, b, h, begin, BM, Tq, Tq, H, K, BK, False)
        dout = _tile(grad, b, h, begin, BM, Tq, Tq, H, V, BV, False)
        row_lse = tl.load(lse + offsets, mask=rows < Tq, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + offsets, mask=rows < Tq, other=0.0)
        score, squashed = _score(
            query, key, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION, WIDE
        )
        if MASKED:
            seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START)
            score = tl.where(seen, score, float("-inf"))
        weight = tl.exp2(score - row_lse[:, None])
        dvalue += _dot(tl.trans(weight.to(dout.dtype)), dout, PRECISION, WIDE)
        dweight = _dot(dout, tl.trans(value), PRECISION, WIDE)
        dscore = weight * (dweight - row_delta[:, None])
        if HAS_SOFTCAP:
            dscore = dscore * (1.0 - squashed * squashed)
        dkey += _dot(tl.trans(dscore.to(query.dtype)), query, PRECISION, WIDE)
    return dkey, dvalue


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
    key = _tile(k, b, kv_head, first_key, BN, Tk, Tk, HK, K, BK, False)
    value = _tile(v, b, kv_head, first_key, BN, Tk, Tk, HK, V, BV, False)
    dkey = tl.zeros((BN, BK), tl.float32)
    dvalue = tl.zeros((BN, BV), tl.float32)
    low = tl.maximum(0, first_key - (Tk - Tq)) // BM * BM
    high = Tq
    if HAS_WINDOW:
        high = tl.minimum(high, first_key + BN - 1 - (Tk - Tq) + window)
    if HAS_START:
        high = tl.minimum(high, tl.load(stop + tl.minimum(first_key + BN, Tk) - 1))
    # The queries [first, last) see all of these keys.
    PLAIN: tl.constexpr = not (HAS_VALID or HAS_START)
    SINGLE: tl.constexpr = HAS_WINDOW and ONE_LOOP
    first, last = high, high
    if PLAIN:
        first = tl.minimum(high, tl.cdiv(tl.maximum(0, first_key + BN - 1 - (Tk - Tq)), BM) * BM)
        if HAS_WINDOW:
            free = first_key + window - (Tk - Tq)
            last = tl.maximum(first, tl.minimum(high, tl.maximum(0, free) // BM * BM))
    if SINGLE:
        first, last = high, high
    for group in range(H // HK):
        h = kv_head * (H // HK) + group
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi + h).to(tl.float32)
        dkey, dvalue = _key_gradient(
            q, key, value, grad, lse, delta, valid, start, dkey, dvalue, b, h, keys, low, first,
            Tq, Tk, window, scale, softcap, slope, H, K, V, BM, BK, BV,
            HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
        )  # fmt: skip
        if PLAIN and not SINGLE:
            dkey, dvalue = _key_gradient(
                q, key, value, grad, lse, delta, valid, start, dkey, dvalue, b, h, keys, first, last,
                Tq, Tk, window, scale, softcap, slope, H, K, V, BM, BK, BV,
                HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, False, PRECISION, WIDE,
            )  # fmt: skip
        if HAS_WINDOW and PLAIN and not SINGLE:
            dkey, dvalue = _key_gradient(
                q, key, value, grad, lse, delta, valid, start, dkey, dvalue, b, h, keys, last, high,
                Tq, Tk, window, scale, softcap, slope, H, K, V, BM, BK, BV,
                HAS_ALIBI, HAS_VALID, HAS_START, HAS_WINDOW, HAS_SOFTCAP, True, PRECISION, WIDE,
            )  # fmt: skip
    _store_tile(dk, dkey * scale, b, kv_head, first_key, BN, Tk, HK, K, BK)
    _store_tile(dv, dvalue, b, kv_head, first_key, BN, Tk, HK, V, BV)


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, band: Band) -> tuple[Tensor, Tensor]:
    """As `torch_impl.forward`; inputs contiguous."""
    batch, queries, heads, _ = q.shape
    o = q.new_empty(batch, queries, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    options = {**_launch(q, static_sizes(q, k, v), "forward"), **_flags(band)}
    run(
        forward_kernel, _blocks(queries, options["BM"]) * batch * heads,
        q, k, v, *pointers(q, sinks, band.alibi, band.valid, band.start), o, lse,
        queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0,
        HAS_SINKS=sinks is not None, **options,
    )  # fmt: skip
    return o, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    band: Band,
    lse_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `torch_impl.backward`; inputs contiguous."""
    batch, queries, heads, _ = q.shape
    delta = (grad.float() * o.float()).sum(-1).transpose(1, 2).contiguous()
    delta = delta if lse_grad is None else delta - lse_grad
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    exact = torch.empty_like(delta)
    dalibi = None if band.alibi is None else torch.empty_like(delta)
    if o.numel() == 0:
        dsinks, dslopes = (None if x is None else x.new_zeros(heads) for x in (sinks, dalibi))
        return dq, dk.zero_(), dv.zero_(), dsinks, dslopes
    options = {**_launch(q, static_sizes(q, k, v), "backward"), **_flags(band)}
    alibi, valid, start, stop = pointers(q, band.alibi, band.valid, band.start, band.stop)
    numbers = (queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0)
    run(
        backward_query_kernel, _blocks(queries, options["BM"]) * batch * heads,
        q, k, v, grad, lse, delta, alibi, valid, start,
        dq, exact, exact if dalibi is None else dalibi, *numbers, **options
    )  # fmt: skip
    exact = exact if lse_grad is None else exact - lse_grad
    run(
        backward_key_kernel, _blocks(k.shape[1], options["BN"]) * batch * k.shape[2],
        q, k, v, grad, lse, exact, alibi, valid, start, stop, dk, dv, *numbers, **options
    )  # fmt: skip
    dsinks = None if sinks is None else sink_gradient(sinks, lse, exact)
    return dq, dk, dv, dsinks, None if dalibi is None else dalibi.sum((0, 2))


def _blocks(total: int, size: int) -> int:
    return (total + size - 1) // size


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **options)


def tiles(dtype: torch.dtype, width: int, kind: str, large: bool) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages) of a "forward" or "backward" kernel for a padded head width.

    `large`: the chip gives a block 200 KiB of shared memory or more (tuned on one of these); otherwise every kernel
    stays under 99 KiB. fp32 products run without tensor cores, whose code grows with the tile; small ones
    keep compilation in seconds.
    """
    if dtype == torch.float32:
        return (16, 16, 4, 1) if width > 128 else (32, 32, 4, 1)
    if large:
        return LARGE[kind, width]
    return (32, 32, 4, 1) if width > 128 else (64, 64, 4, 1)


@functools.cache
def has_large_memory(device: torch.device) -> bool:
    """Whether a block of this GPU may use 200 KiB of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 200 << 10


def static_sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Compile-time sizes of a call. Raises KernelError for a dtype or a width that these kernels do not take."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(
            f"Triton window attention takes fp32, bf16 or fp16, got {q.dtype}; use implementation='torch'"
        )
    if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
        raise KernelError(f"head widths above {_MAX_WIDTH} are not supported, got K={q.shape[-1]}, V={v.shape[-1]}")
    return _sizes(q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _sizes(heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Widths are padded to at least 64, so that no product has a narrow operand."""
    padded_k, padded_v = (max(64, 1 << (width - 1).bit_length()) for width in (key_dim, value_dim))
    return {"H": heads, "HK": kv_heads, "K": key_dim, "V": value_dim, "BK": padded_k, "BV": padded_v}


def _flags(band: Band) -> dict[str, bool]:
    return {
        "HAS_ALIBI": band.alibi is not None,
        "HAS_VALID": band.valid is not None,
        "HAS_START": band.start is not None,
        "HAS_WINDOW": band.window is not None,
        "HAS_SOFTCAP": band.softcap is not None,
    }


def _launch(q: Tensor, static: dict[str, int], kind: str) -> dict[str, Any]:
    """Tile sizes, warps, stages and the products' precision."""
    width = max(static["BK"], static["BV"])
    rows, keys, warps, stages = tiles(q.dtype, width, kind, has_large_memory(q.device))
    wide = q.dtype == torch.bfloat16 and triton_interpreted()
    sizes = {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages}
    return {**static, **sizes, "PRECISION": precision(q.dtype), "WIDE": wide}


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied in full precision; 16-bit operands ignore this."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous tensors for the kernels (bool as bytes); an absent one is replaced by one that is never read."""
    ready = [stand_in if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t.dtype == torch.bool else t for t in ready]


_POINTERS = {"start": "*i64", "stop": "*i64", "valid": "*u8", "ring_valid": "*u8", "count": "*i64"}
_FP32_POINTERS = ("lse", "delta", "exact", "dalibi", "sinks", "alibi")
_INTEGERS = ("Tq", "Tk", "T", "window", "step")


def configurations(large: bool = False) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Every shipped configuration: name, kernel, signature, constants, warps, stages. `large`: see `tiles`."""
    from fla_swap.kernels.window.triton_step import advance_kernel, decode_kernel

    for dtype, code in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for width in (64, 128, 256):
            sizes = _sizes(8, 4, width, width)
            for kernel in (forward_kernel, backward_query_kernel, backward_key_kernel):
                kind = "forward" if kernel is forward_kernel else "backward"
                rows, keys, warps, stages = tiles(dtype, width, kind, large)
                for plain in (True, False):
                    constants: dict[str, Any] = {**sizes, "BM": rows, "BN": keys}
                    constants |= {name: not plain for name in kernel.arg_names if name.startswith("HAS_")}
                    constants |= {"HAS_WINDOW": True, "PRECISION": precision(dtype), "WIDE": False}
                    name = f"{kernel.__name__}-{code}-{width}-{'plain' if plain else 'everything'}"
                    yield name, kernel, _signature(kernel, code, constants), constants, warps, stages
            constants = {**sizes, "W": 1000, "BN": 64}
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
