"""Device code: one pass over a stretch of time that keeps the state in registers, gates on its output side.

    out_i = scale · Σ_{j≤i} (a_i · b_j) y_j exp(Y_i − Y_j) + scale · exp(Y_i) ⊙ Sᵀ a_i

`writers` is y with the decay inside the chunk (`triton_prepare`); with gates on the contracted side too, a and b carry
theirs.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.triton_parts import (
    _apply_by_level,
    _clip,
    _decay,
    _dot,
    _exp,
    _rows,
    _state_at,
    _store_rows,
    _unit,
)
from fla_swap.kernels.decay.triton_prepare import _any_slow


@triton.jit(do_not_specialize=["T", "H", "SEGMENTS", "SEGMENT", "STRIDE"])
def value_kernel(
    a, b, y, gy, writers, shifts, slow, x_shifts, x_slow, slow_pairs, initial, out, final, units, T, H, SEGMENTS,
    SEGMENT, STRIDE, scale, X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """`out` of one stretch of time, one head and BY output columns. Grid: units · H · Y_BLOCKS. States are [X,Y]."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % Y_BLOCKS).to(tl.int32), program // Y_BLOCKS
    head, unit = row % H, row // H
    first, length, slot = _unit(units, unit, T, SEGMENTS, SEGMENT, STRIDE, C)
    rows = tl.arange(0, C)
    xs = tl.arange(0, BX)
    ys = block * BY + tl.arange(0, BY)
    tile, inside = _state_at(xs, ys, X, Y, False)
    state = tl.zeros([BX, BY], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * X * Y + tile, mask=inside, other=0.0).to(tl.float32)
    chunks = (length + C - 1) // C
    for chunk in range(0, chunks):
        start = first + chunk * C
        count = tl.minimum(length - chunk * C, C).to(tl.int32)
        place = (slot + chunk) * H + head
        at = _rows(a, start, count, head, H, rows, xs, X)
        bt = _rows(b, start, count, head, H, rows, xs, X)
        yt = _rows(writers, start, count, head, H, rows, ys, Y)
        shift = shifts + place * 3 * Y + ys
        entering = tl.load(shift, mask=ys < Y, other=0.0)
        state *= _exp(entering)[None, :]
        if x_shifts is not None:
            x_shift = x_shifts + place * 3 * X + xs
            state *= _exp(tl.load(x_shift, mask=xs < X, other=0.0))[:, None]
        inter = _dot(at, state, DOT, PRECISION)
        pairs = _dot(at, tl.trans(bt), DOT, PRECISION)
        if x_shifts is not None:
            if _any_slow(x_slow, place, X_BLOCKS):
                pairs = tl.load(slow_pairs + place * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
            state *= _exp(tl.load(x_shift + 2 * X, mask=xs < X, other=0.0))[:, None]
        late = rows + tl.minimum(count, 0)  # not a constant of the loop: that would occupy registers
        distance = late[:, None] - rows[None, :]
        pairs = tl.where(distance >= 0, pairs, 0.0)
        gates = _clip(_rows(gy, start, count, head, H, rows, ys, Y))
        decay = _decay(gates, entering, True, False, C, DOT, GATE)
        if tl.load(slow + place * Y_BLOCKS + block) > 0:
            own = tl.sum(tl.where(distance == 0, pairs, 0.0), 1)[:, None]
            result = inter * decay + own * _rows(y, start, count, head, H, rows, ys, Y).to(tl.float32)
            result += _apply_by_level(
                pairs, y, gy, start, count, head, H, ys, Y, BY, C, LEVELS, False, False, DOT, PRECISION, GATE
            )
        else:
            result = (inter + _dot(pairs, yt, DOT, PRECISION)) * decay
        _store_rows(out, result * scale, start, count, head, H, rows, ys, Y)
        state *= _exp(tl.load(shift + 2 * Y, mask=ys < Y, other=0.0))[None, :]
        state += _dot(tl.trans(bt), yt, DOT, PRECISION)
        state *= _exp(tl.load(shift + Y, mask=ys < Y, other=0.0))[None, :]
        if x_shifts is not None:
            state *= _exp(tl.load(x_shift + X, mask=xs < X, other=0.0))[:, None]
    if final is not None:
        tl.store(final + row * X * Y + tile, state, mask=inside)
