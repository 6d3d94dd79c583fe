"""Device code of windowed softmax attention: forward with log-denominators, backward limited to the band.

Legend: B batch, Tq queries, Tk keys (query i stands at key index i + Tk − Tq), H query heads, HK key/value heads,
G = H / HK, K key width, V value width; tiles of BM queries and BN keys, widths padded to BK and BV.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
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
    x, b, h, first, count: tl.constexpr, T,
    heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows first … first + count − 1 of a [B, T, heads, width] tensor as [count, padded], zeros from row T on.

    TMA: x is a descriptor of the tensor with tiles of this size, else its address. Of an address only the origin is a
    64-bit offset: inside a tile 32 bits suffice.
    """
    if TMA:
        tile = x.load([b, first, h, 0]).reshape(count, padded)
    else:
        rows, columns = tl.arange(0, count), tl.arange(0, padded)
        origin = x + ((b.to(tl.int64) * T + first) * heads + h) * width
        place = origin + (rows[:, None] * (heads * width) + columns[None, :])
        inside = (first + rows < T)[:, None]
        if width != padded:
            inside = inside & (columns < width)[None, :]
        tile = tl.load(place, mask=inside, other=0.0)
    return tile


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
def _place_keys(Tk, BN: tl.constexpr):
    """As `_place`, over blocks of keys: the first ones first, which have most queries."""
    line, last_first = _place(Tk, BN)
    return line, (tl.cdiv(Tk, BN) - 1) * BN - last_first


@triton.jit
def _visible(
    valid, start, b, rows, keys, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The pairs that count, shaped as `rows` and `keys` broadcast: [BM, 1] with [1, BN], or [1, BM] with [BN, 1].

    Of rows past the last query nothing is kept, whatever they see.
    """
    position = rows + (Tk - Tq)
    distance = position - keys
    if HAS_WINDOW:
        seen = distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32)
    else:
        seen = distance >= 0
    if HAS_VALID:
        base = valid + b.to(tl.int64) * Tk
        row_counts = tl.load(base + position, mask=rows < Tq, other=0) != 0
        key_counts = tl.load(base + keys, mask=keys < Tk, other=0) != 0
        seen = seen & row_counts & key_counts
    if HAS_START:
        first = tl.load(start + rows, mask=rows < Tq, other=Tk)
        seen = seen & (keys >= first)
    return seen


@triton.jit
def _hide(
    score, inside, valid, start, b, rows, keys, Tq, Tk, window,
    HAS_WINDOW: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """−inf for the pairs that do not count. `inside`: all of a tile's pairs do, if there is no `valid`."""
    if HAS_VALID:
        seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, True, HAS_START)
        score = tl.where(seen, score, float("-inf"))
    else:
        if not inside:
            seen = _visible(valid, start, b, rows, keys, Tq, Tk, window, HAS_WINDOW, False, HAS_START)
            score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def _score(product, rows, keys, Tq, Tk, scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Scores before the mask in units of log 2 from products of queries and keys, and the softcap's tanh (or these).

    `rows` and `keys` as in `_visible`.
    """
    squashed = product
    if HAS_SOFTCAP:
        squashed = tanh(product * (scale / softcap))
        score = squashed * (softcap * LOG2E)
    else:
        score = product * (scale * LOG2E)
    if HAS_ALIBI:
        score -= (slope * LOG2E) * (rows + (Tk - Tq) - keys).to(tl.float32)
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
        low = tl.maximum(low, tl.load(start + first_row).to(tl.int32))
    return low // BN * BN, tl.minimum(first_row + BM, Tq) + offset


@triton.jit
def _free_keys(
    start, first_row, Tq, Tk, window, HAS_WINDOW: tl.constexpr, HAS_START: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The keys [first, last) that all of these queries see, so that nothing is masked there; there may be none."""
    first = 0
    if HAS_WINDOW:
        first = first_row + BM + Tk - Tq - window
    if HAS_START:
        first = tl.maximum(first, tl.load(start + tl.minimum(first_row + BM, Tq) - 1).to(tl.int32))
    return first, first_row + Tk - Tq + 1


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def forward_kernel(
    q, k, v, sinks, alibi, valid, start, o, lse, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: online softmax of BM queries of one head, the last ones first (they have most keys).

    TMA: k and v are descriptors of tiles of BN tokens.
    """
    line, first_row = _place(Tq, BM)
    b, h = line // H, line % H
    kv_head = h // (H // HK)
    rows = first_row + tl.arange(0, BM)
    query = _tile(q, b, h, first_row, BM, Tq, H, K, BK, False)
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
    first, last = _free_keys(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM)
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, kv_head, begin, BN, Tk, HK, K, BK, TMA)
        score = _dot(query, tl.trans(key), PRECISION, WIDE)
        factor = scale * LOG2E
        if HAS_SOFTCAP or HAS_ALIBI:
            factor = 1.0
            score, _ = _score(
                score, rows[:, None], keys[None, :], Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
            )
        score = _hide(
            score, (begin >= first) & (begin + BN <= last), valid, start, b, rows[:, None], keys[None, :],
            Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        value = _tile(v, b, kv_head, begin, BN, Tk, HK, V, BV, TMA)
        mixed = mixed * shrink[:, None] + _dot(weight.to(query.dtype), value, PRECISION, WIDE)
        top = new_top
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    _store_tile(o, mixed / safe[:, None], b, h, first_row, BM, Tq, H, V, BV)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    tl.store(lse + offsets, tl.where(empty, float("inf"), top * LN2 + tl.log(safe)), mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def backward_query_kernel(
    q, k, v, o, grad, lse, lse_grad, alibi, valid, start, dq, exact, dalibi, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of one head, and each row's share of its slope's gradient.

    The scores' gradients take o · do with o as rounded; `exact` receives the same sum from the weights, for the sinks
    and the keys. TMA: k and v are descriptors of tiles of BN tokens.
    """
    line, first_row = _place(Tq, BM)
    b, h = line // H, line % H
    kv_head = h // (H // HK)
    rows = first_row + tl.arange(0, BM)
    offsets = (b.to(tl.int64) * H + h) * Tq + rows
    query = _tile(q, b, h, first_row, BM, Tq, H, K, BK, False)
    dout = _tile(grad, b, h, first_row, BM, Tq, H, V, BV, False)
    row_lse = tl.load(lse + offsets, mask=rows < Tq, other=float("inf")) * LOG2E
    mixed = _tile(o, b, h, first_row, BM, Tq, H, V, BV, False)
    row_delta = tl.sum(dout.to(tl.float32) * mixed.to(tl.float32), 1)
    if lse_grad is not None:
        row_delta -= tl.load(lse_grad + offsets, mask=rows < Tq, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    dquery = tl.zeros((BM, BK), tl.float32)
    dslope = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    low, high = _key_range(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM, BN)
    first, last = _free_keys(start, first_row, Tq, Tk, window, HAS_WINDOW, HAS_START, BM)
    for begin in range(low, high, BN):
        keys = begin + tl.arange(0, BN)
        key = _tile(k, b, kv_head, begin, BN, Tk, HK, K, BK, TMA)
        value = _tile(v, b, kv_head, begin, BN, Tk, HK, V, BV, TMA)
        product = _dot(query, tl.trans(key), PRECISION, WIDE)
        score, squashed = _score(
            product, rows[:, None], keys[None, :], Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
        )
        score = _hide(
            score, (begin >= first) & (begin + BN <= last), valid, start, b, rows[:, None], keys[None, :],
            Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START,
        )  # fmt: skip
        weight = tl.exp2(score - row_lse[:, None])
        dweight = _dot(dout, tl.trans(value), PRECISION, WIDE)
        sums += tl.sum(weight * dweight, 1)
        dscore = weight * (dweight - row_delta[:, None])
        if HAS_ALIBI:
            distance = ((rows + (Tk - Tq))[:, None] - keys[None, :]).to(tl.float32)
            dslope -= tl.sum(dscore * distance, 1)
        if HAS_SOFTCAP:
            dscore = dscore * (1.0 - squashed * squashed)
        dquery += _dot(dscore.to(query.dtype), key, PRECISION, WIDE)
    _store_tile(dq, dquery * scale, b, h, first_row, BM, Tq, H, K, BK)
    tl.store(exact + offsets, sums, mask=rows < Tq)
    if HAS_ALIBI:
        tl.store(dalibi + offsets, dslope, mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk", "window"])
def backward_key_kernel(
    q, k, v, grad, lse, delta, alibi, valid, start, stop, dk, dv, Tq, Tk, window, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_START: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BN keys and values of one key/value head, over its G query heads and their band.

    Scores are [BN, BM] here: as they come out of the first product they go into the next, without a transposition.
    TMA: q and grad are descriptors of tiles of BM tokens.
    """
    line, first_key = _place_keys(Tk, BN)
    b, kv_head = line // HK, line % HK
    keys = first_key + tl.arange(0, BN)
    key = _tile(k, b, kv_head, first_key, BN, Tk, HK, K, BK, False)
    value = _tile(v, b, kv_head, first_key, BN, Tk, HK, V, BV, False)
    dkey = tl.zeros((BN, BK), tl.float32)
    dvalue = tl.zeros((BN, BV), tl.float32)
    low = tl.maximum(0, first_key - (Tk - Tq)) // BM * BM
    high, last = Tq, Tq + BM
    if HAS_WINDOW:
        high = tl.minimum(high, first_key + BN - 1 - (Tk - Tq) + window)
        last = first_key - (Tk - Tq) + window
    if HAS_START:
        high = tl.minimum(high, tl.load(stop + tl.minimum(first_key + BN, Tk) - 1).to(tl.int32))
        last = tl.minimum(last, tl.load(stop + first_key).to(tl.int32))
    first = first_key + BN - 1 - (Tk - Tq)
    for group in range(H // HK):
        h = kv_head * (H // HK) + group
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi + h).to(tl.float32)
        head = (b.to(tl.int64) * H + h) * Tq
        for begin in range(low, high, BM):
            rows = begin + tl.arange(0, BM)
            query = _tile(q, b, h, begin, BM, Tq, H, K, BK, TMA)
            dout = _tile(grad, b, h, begin, BM, Tq, H, V, BV, TMA)
            row_lse = tl.load(lse + head + rows, mask=rows < Tq, other=float("inf")) * LOG2E
            row_delta = tl.load(delta + head + rows, mask=rows < Tq, other=0.0)
            product = _dot(key, tl.trans(query), PRECISION, WIDE)
            score, squashed = _score(
                product, rows[None, :], keys[:, None], Tq, Tk, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
            )
            score = _hide(
                score, (begin >= first) & (begin + BM <= last), valid, start, b, rows[None, :], keys[:, None],
                Tq, Tk, window, HAS_WINDOW, HAS_VALID, HAS_START,
            )  # fmt: skip
            weight = tl.exp2(score - row_lse[None, :])
            dvalue += _dot(weight.to(key.dtype), dout, PRECISION, WIDE)
            dweight = _dot(value, tl.trans(dout), PRECISION, WIDE)
            dscore = weight * (dweight - row_delta[None, :])
            if HAS_SOFTCAP:
                dscore = dscore * (1.0 - squashed * squashed)
            dkey += _dot(dscore.to(key.dtype), query, PRECISION, WIDE)
    _store_tile(dk, dkey * scale, b, kv_head, first_key, BN, Tk, HK, K, BK)
    _store_tile(dv, dvalue, b, kv_head, first_key, BN, Tk, HK, V, BV)
