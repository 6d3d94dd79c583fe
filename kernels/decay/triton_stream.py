"""Device code: one pass over a stretch of time that keeps the state in registers, gates on the contracted side.

The pass serves several quantities; `README.md` says which roles q, k, v, do play. Out rows read, source rows write:

    out_i = scale · Σ_{j≤i} (a_i · b_j exp(X_i − X_j)) y_j + scale · Sᵀ (a_i exp X_i)

with X the running sums of the gates, inside a and b already (`triton_prepare`). REVERSE runs from the last step to the
first and sums over j ≥ i; the state is then a gradient, and kept divided by `scale`.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.triton_parts import _dot, _exp, _rows, _state_at, _store_rows, _unit
from fla_swap.kernels.decay.triton_prepare import _any_slow


@triton.jit(do_not_specialize=["T", "H", "SEGMENTS", "SEGMENT", "STRIDE"])
def stream_kernel(
    a, b, y, shifts, slow, slow_pairs, own, initial, out, stored, final, units, T, H, SEGMENTS, SEGMENT, STRIDE, scale,
    X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, X_BLOCKS: tl.constexpr,
    Y_BLOCKS: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, FLIPPED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`out` rows (or None) of one stretch of time, one head and BY output columns. Grid: units · H · Y_BLOCKS.

    shifts, slow and slow_pairs from `triton_prepare`, or None without gates. own [tokens,H]: the weights of the pairs
    i = j, else None. initial, final: [units,H,·,·] fp32 or None. stored [slots,H,·,·] or None: the state as every chunk
    reads it (REVERSE: divided by `scale`). States lie in memory as [X,Y]; FLIPPED: [Y,X].
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % Y_BLOCKS).to(tl.int32), program // Y_BLOCKS
    head, unit = row % H, row // H
    first, length, slot = _unit(units, unit, T, SEGMENTS, SEGMENT, STRIDE, C)
    rows = tl.arange(0, C)
    xs = tl.arange(0, BX)
    ys = block * BY + tl.arange(0, BY)
    tile, inside = _state_at(xs, ys, X, Y, FLIPPED)
    chunks = (length + C - 1) // C
    ENTER: tl.constexpr = 1 if REVERSE else 0
    factor = 1.0
    if REVERSE:
        factor = scale
    state = tl.zeros([BX, BY], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * X * Y + tile, mask=inside, other=0.0).to(tl.float32) / factor
    if shifts is not None:
        chunk = chunks - 1 if REVERSE else chunks * 0
        begin = shifts + ((slot + chunk) * H + head) * 3 * X
        state *= _exp(tl.load(begin + ENTER * X + xs, mask=(xs < X) & (chunks > 0), other=0.0))[:, None]
    for step in range(0, chunks):
        chunk = step
        following = step + 1
        if REVERSE:
            chunk = chunks - 1 - step
            following = chunk - 1
        start = first + chunk * C
        count = tl.minimum(length - chunk * C, C).to(tl.int32)
        place = (slot + chunk) * H + head
        bt = _rows(b, start, count, head, H, rows, xs, X)
        yt = _rows(y, start, count, head, H, rows, ys, Y)
        if shifts is not None:
            link = tl.load(shifts + place * 3 * X + (1 - ENTER) * X + xs, mask=xs < X, other=0.0)
            after = shifts + ((slot + following) * H + head) * 3 * X + ENTER * X + xs
            link += tl.load(after, mask=(xs < X) & (step + 1 < chunks), other=0.0)
            forgets = _any_slow(slow, place, X_BLOCKS)
        if stored is not None:
            at_state = stored + place * X * Y + tile
            tl.store(at_state, state.to(stored.dtype.element_ty), mask=inside)
        if out is not None:
            at = _rows(a, start, count, head, H, rows, xs, X)
            pairs = _dot(at, tl.trans(bt), DOT, PRECISION)
            if shifts is not None:  # no branch: Triton 3.6 cannot load ahead across one
                if REVERSE:
                    at_pairs = rows[None, :] * C + rows[:, None]
                else:
                    at_pairs = rows[:, None] * C + rows[None, :]
                exact = tl.load(slow_pairs + place * C * C + at_pairs, mask=(at_pairs >= 0) & forgets, other=0.0)
                pairs = tl.where(forgets, exact.to(tl.float32), pairs)
            late = rows + tl.minimum(count, 0)  # not a constant of the loop: that would occupy registers
            distance = late[:, None] - rows[None, :]
            if REVERSE:
                distance = -distance
            if own is not None:
                weights = tl.load(own + (start + rows) * H + head, mask=rows < count, other=0.0)
                pairs = tl.where(distance > 0, pairs, tl.where(distance == 0, weights[:, None], 0.0))
            else:
                pairs = tl.where(distance >= 0, pairs, 0.0)
            result = _dot(pairs, yt, DOT, PRECISION) + _dot(at, state, DOT, PRECISION)
            _store_rows(out, result * scale, start, count, head, H, rows, ys, Y)
        if shifts is not None:
            middle = tl.load(shifts + place * 3 * X + 2 * X + xs, mask=(xs < X) & forgets, other=0.0)
            state *= _exp(middle)[:, None]
        state += _dot(tl.trans(bt), yt, DOT, PRECISION)
        if shifts is not None:
            state *= _exp(link)[:, None]
    if final is not None:
        tl.store(final + row * X * Y + tile, state * factor, mask=inside)
