"""Device code that the kernels of the gated decay recurrence share: rows, sums of gates, binary levels, states.

Gates are natural logs; those under FLOOR act as FLOOR: both decay to exactly zero in fp32.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

FLOOR: tl.constexpr = tl.constexpr(-110.0)
BLOCK: tl.constexpr = tl.constexpr(64)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp as an exp2, which flushes what is too small: half the instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _rows(base, first, count, head, H, rows, columns, D: tl.constexpr):
    """Rows of a [tokens, H, D] tensor, zero outside the chunk or beyond D. Only the origin is a 64-bit offset."""
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < D)[None, :]
    origin = base + (first * H + head) * D
    return tl.load(origin + (rows[:, None] * (H * D) + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_rows(base, value, first, count, head, H, rows, columns, D: tl.constexpr):
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = base + (first * H + head) * D + (rows[:, None] * (H * D) + columns[None, :])
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sums(which, gates, DOT: tl.constexpr, GATE: tl.constexpr):
    """which @ gates with `which` of −1, 0, 1, to full precision: fp32 gates next to bf16 operands go as two halves."""
    which = which.to(tl.float32)
    if tl.bfloat16 == DOT:
        high = gates.to(tl.bfloat16)
        total = tl.dot(which.to(tl.bfloat16), high)
        if gates.dtype == tl.float32:
            low = (gates - high.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(which.to(tl.bfloat16), low, total)
    else:
        total = tl.dot(which, gates.to(tl.float32), input_precision=GATE)
    return total


@triton.jit
def _clip(gates):
    return tl.maximum(gates.to(tl.float32), FLOOR).to(gates.dtype)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _halves(gates, C: tl.constexpr):
    """Sums of the gates over the first and over the second half of a chunk."""
    first = (tl.arange(0, C) < C // 2)[:, None]
    wide = gates.to(tl.float32)
    return tl.reduce((tl.where(first, wide, 0.0), tl.where(first, 0.0, wide)), 0, _add_both)


@triton.jit
def _decay(gates, shift, READS: tl.constexpr, BEFORE: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
           GATE: tl.constexpr):  # fmt: skip
    """exp of the gates' sum since the chunk's start (READS; BEFORE: without the row's own) or until its end − shift."""
    rows = tl.arange(0, C)
    if READS:
        which = rows[None, :] <= rows[:, None] - (1 if BEFORE else 0)
    else:
        which = rows[None, :] > rows[:, None]
    return _exp(_sums(which, gates, DOT, GATE) - shift[None, :])


@triton.jit
def _level(gates, level, C: tl.constexpr, REVERSE: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr,
           GATE: tl.constexpr):  # fmt: skip
    """(decay to or from the middle of each row's block of 2^(level+1), rows that read, pairs of one block)."""
    rows = tl.arange(0, C)
    second = ((rows >> level) & 1) == 1
    m = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    shift = 0
    if BEFORE:
        shift = second.to(tl.int32)[:, None]
    last = rows[:, None] - shift
    column = rows[None, :]
    after = (column <= last) & (column > m[:, None])
    until = (column > last) & (column <= m[:, None])
    factor = _exp(_sums(tl.where(second[:, None], after, until), gates, DOT, GATE))
    same = (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]
    if REVERSE:
        second = second == 0
    return factor, second[:, None], same


@triton.jit
def _pairs_by_level(
    a, b, gx, start, count, head, H, X: tl.constexpr, BX: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Σ_d a_i b_j exp(X_i − X_j) for j < i (REVERSE: j > i), and for j = i unless BEFORE; zero elsewhere."""
    rows = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    for turn in range(0, LEVELS * (BX // BLOCK)):
        level = turn % LEVELS
        xs = turn // LEVELS * BLOCK + tl.arange(0, BLOCK)
        gates = _clip(_rows(gx, start, count, head, H, rows, xs, X))
        factor, reads, same = _level(gates, level, C, REVERSE, BEFORE, DOT, GATE)
        at = _rows(a, start, count, head, H, rows, xs, X).to(tl.float32)
        bt = _rows(b, start, count, head, H, rows, xs, X).to(tl.float32)
        part = _dot(tl.where(reads, at * factor, 0.0), tl.trans(tl.where(reads, 0.0, bt * factor)), DOT, PRECISION)
        total += tl.where(same, part, 0.0)
        if not BEFORE:
            own = tl.where(level == 0, tl.sum(at * bt, 1), 0.0)
            total += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
    return total


@triton.jit
def _apply_by_level(
    pairs, y, gy, start, count, head, H, ys, Y: tl.constexpr, BY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    REVERSE: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Σ_j pairs_ij y_j exp(Y_i − Y_j) over j < i (REVERSE: j > i)."""
    rows = tl.arange(0, C)
    total = tl.zeros([C, BY], tl.float32)
    for level in range(0, LEVELS):
        gates = _clip(_rows(gy, start, count, head, H, rows, ys, Y))
        factor, reads, same = _level(gates, level, C, REVERSE, BEFORE, DOT, GATE)
        yt = _rows(y, start, count, head, H, rows, ys, Y).to(tl.float32)
        part = _dot(tl.where(same, pairs, 0.0), tl.where(reads, 0.0, yt * factor), DOT, PRECISION)
        total += tl.where(reads, part * factor, 0.0)
    return total


@triton.jit
def _unit(units, unit, T, SEGMENTS, SEGMENT, STRIDE, C: tl.constexpr):
    """(first token, tokens, slot of the first stored state) of a stretch of time."""
    if units is not None:
        first = tl.load(units + unit * 3)
        length = tl.load(units + unit * 3 + 1)
        slot = tl.load(units + unit * 3 + 2)
    else:
        sequence = unit // SEGMENTS
        start = unit % SEGMENTS * SEGMENT * C
        first = sequence * T + start
        length = tl.minimum(SEGMENT * C, T - start)
        slot = sequence * STRIDE + unit % SEGMENTS * SEGMENT
    return first, length, slot


@triton.jit
def _locate(places, slot, T, CHUNKS, C: tl.constexpr):
    """(first token, tokens) of a chunk slot; `places` [slots,2] for packed sequences, else None."""
    if places is not None:
        first = tl.load(places + slot * 2)
        count = tl.load(places + slot * 2 + 1).to(tl.int32)
    else:
        first = slot // CHUNKS * T + slot % CHUNKS * C
        count = tl.minimum(T - slot % CHUNKS * C, C).to(tl.int32)
    return first, count


@triton.jit
def _state_at(xs, ys, X: tl.constexpr, Y: tl.constexpr, FLIPPED: tl.constexpr):
    """Offsets and mask of a tile [xs,ys] of a state that lies in memory as [X,Y], FLIPPED: [Y,X]."""
    inside = (xs < X)[:, None] & (ys < Y)[None, :]
    return (ys[None, :] * X + xs[:, None] if FLIPPED else xs[:, None] * Y + ys[None, :]), inside
