"""Device code: gradients of one side, its rows and its gates, chunk by chunk from the states around the chunk.

    dz_i = scale · Σ_{j≤i} (a_i · b_j) y_j exp(Y_i − Y_j) + scale · exp(Y_i) ⊙ Sᵀ a_i
    dy_j = scale · Σ_{i≥j} (a_i · b_j) z_i exp(Y_i − Y_j) + exp(Y_end − Y_j) ⊙ dSᵀ b_j
    dY_t = Σ_x S ⊙ dS through the whole chunk + Σ_{i≥t} z_i ⊙ read_i + Σ_{s<t} (y_s ⊙ dy_s − z_s ⊙ rest_s)

read is what dz reads of S, rest its other part. The last line leaves out the terms j = i (BEFORE: also j = i − 1),
which no gate touches, so that nothing large cancels. `writers` is y and `readers` is z with the decay inside the chunk
(`triton_prepare`); with gates on the contracted side, a and b carry theirs.
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
    _locate,
    _rows,
    _state_at,
    _store_rows,
    _sums,
)
from fla_swap.kernels.decay.triton_prepare import _any_slow, _some_slow


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "COUNT"])
def side_kernel(
    a, b, y, z, gy, readers, writers, shifts, slow, x_shifts, x_slow, slow_pairs, u, starts, ends, z_grad, y_grad,
    gate_grad, u_grad, places, T, CHUNKS, H, COUNT, scale,
    X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, X_BLOCKS: tl.constexpr,
    Y_BLOCKS: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr, BEFORE: tl.constexpr,
    FLIPPED: tl.constexpr, SLOW: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """z_grad (or None), y_grad, gate_grad of one chunk, one head and BY columns. Grid: COUNT = slots · H · Y_BLOCKS.

    Only of chunks that are slow (grid: COUNT / GROUP), or (not SLOW) only of the others. starts, ends [slots,H,·,·]:
    the state as the chunk reads it, and the gradient of the state after it as its writers read it, divided by `scale`
    (with gates on both sides: without these decays). In memory as [X,Y], FLIPPED: [Y,X]. BEFORE: u [H,Y], and u_grad
    [slots,H,Y]. Without gates, `gy`, `shifts`, `slow` and `gate_grad` are None.
    """
    program = tl.program_id(0).to(tl.int64)
    if SLOW:
        begin = program * GROUP
        stop = tl.minimum(begin + GROUP, COUNT)
        if _some_slow(slow, begin, stop, GROUP):
            for i in range(0, GROUP):
                one = begin + i
                if tl.load(slow + one, mask=one < COUNT, other=0) > 0:
                    _side_of_chunk(
                        one, a, b, y, z, gy, readers, writers, shifts, x_shifts, x_slow, slow_pairs, u, starts, ends,
                        z_grad, y_grad, gate_grad, u_grad, places, T, CHUNKS, H, scale, X, Y, BX, BY, X_BLOCKS,
                        Y_BLOCKS, C, LEVELS, BEFORE, FLIPPED, SLOW, DOT, PRECISION, GATE,
                    )  # fmt: skip
    else:
        if slow is not None:  # noqa: SIM102 (None is known to the compiler, the other is not)
            if tl.load(slow + program) > 0:
                return
        if BEFORE or x_shifts is not None:
            _side_of_chunk(
                program, a, b, y, z, gy, readers, writers, shifts, x_shifts, x_slow, slow_pairs, u, starts, ends,
                z_grad, y_grad, gate_grad, u_grad, places, T, CHUNKS, H, scale, X, Y, BX, BY, X_BLOCKS, Y_BLOCKS, C,
                LEVELS, BEFORE, FLIPPED, SLOW, DOT, PRECISION, GATE,
            )  # fmt: skip
        else:
            _side_of_plain_chunk(
                program, a, b, gy, readers, writers, shifts, starts, ends, z_grad, y_grad, gate_grad, places, T, CHUNKS,
                H, scale, X, Y, BX, BY, Y_BLOCKS, C, FLIPPED, DOT, PRECISION, GATE,
            )  # fmt: skip


@triton.jit
def _side_of_plain_chunk(
    program, a, b, gy, readers, writers, shifts, starts, ends, z_grad, y_grad, gate_grad, places, T, CHUNKS, H, scale,
    X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, Y_BLOCKS: tl.constexpr, C: tl.constexpr,
    FLIPPED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The usual case: gates on this side only (or none), a chunk that is not slow, readers that see their own step.

    The terms i = j stay among the pairs: they cancel in y_s ⊙ dy_s − z_s ⊙ rest_s, in fp32. The order of the loads is
    what keeps everything in registers.
    """
    block, place = (program % Y_BLOCKS).to(tl.int32), program // Y_BLOCKS
    head, slot = place % H, place // H
    start, count = _locate(places, slot, T, CHUNKS, C)
    rows = tl.arange(0, C)
    xs = tl.arange(0, BX)
    ys = block * BY + tl.arange(0, BY)
    tile, inside = _state_at(ys, xs, Y, X, not FLIPPED)
    inside = inside & (count > 0)
    at = _rows(a, start, count, head, H, rows, xs, X)
    bt = _rows(b, start, count, head, H, rows, xs, X)
    pairs = _dot(at, tl.trans(bt), DOT, PRECISION)
    late = rows + tl.minimum(count, 0)  # no constant, which would be worked out early and occupy registers
    distance = late[:, None] - rows[None, :]
    pairs = (tl.where(distance >= 0, pairs, 0.0) * scale).to(DOT)
    state = tl.load(starts + place * X * Y + tile, mask=inside, other=0.0)
    read = _dot(at, tl.trans(state), DOT, PRECISION) * scale
    zt = _rows(readers, start, count, head, H, rows, ys, Y)
    yt = _rows(writers, start, count, head, H, rows, ys, Y)
    through = tl.sum(zt.to(tl.float32) * read, 0)
    read += _dot(pairs, yt, DOT, PRECISION)
    end = tl.load(ends + place * X * Y + tile, mask=inside, other=0.0)
    back = _dot(bt, tl.trans(end), DOT, PRECISION) * scale
    back += _dot(tl.trans(pairs), zt, DOT, PRECISION)
    if gy is not None:
        crossed = _dot(state, tl.trans(end), DOT, PRECISION)
        columns = tl.arange(0, BY)
        through += tl.sum(tl.where(columns[:, None] == columns[None, :], crossed, 0.0), 0) * scale
        flow = (yt.to(tl.float32) * back - zt.to(tl.float32) * read).to(DOT)
        flow = _sums(rows[None, :] < rows[:, None], flow, DOT, GATE)
        _store_rows(gate_grad, flow + through[None, :], start, count, head, H, rows, ys, Y)
        gates = _clip(_rows(gy, start, count, head, H, rows, ys, Y))
        entering = tl.load(shifts + place * 3 * Y + ys, mask=ys < Y, other=0.0)
        shift = _sums(rows[None, :] <= rows[:, None], gates, DOT, GATE) - entering[None, :]
        read *= _exp(shift)
        back *= _exp(-shift)
    if z_grad is not None:
        _store_rows(z_grad, read, start, count, head, H, rows, ys, Y)
    _store_rows(y_grad, back, start, count, head, H, rows, ys, Y)


@triton.jit
def _side_of_chunk(
    program, a, b, y, z, gy, readers, writers, shifts, x_shifts, x_slow, slow_pairs, u, starts, ends, z_grad, y_grad,
    gate_grad, u_grad, places, T, CHUNKS, H, scale,
    X: tl.constexpr, Y: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, X_BLOCKS: tl.constexpr,
    Y_BLOCKS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BEFORE: tl.constexpr, FLIPPED: tl.constexpr,
    SLOW: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    block, place = (program % Y_BLOCKS).to(tl.int32), program // Y_BLOCKS
    head, slot = place % H, place // H
    start, count = _locate(places, slot, T, CHUNKS, C)
    rows = tl.arange(0, C)
    xs = tl.arange(0, BX)
    ys = block * BY + tl.arange(0, BY)
    tile, inside = _state_at(ys, xs, Y, X, not FLIPPED)
    inside = inside & (count > 0)
    state = tl.load(starts + place * X * Y + tile, mask=inside, other=0.0)
    end = tl.load(ends + place * X * Y + tile, mask=inside, other=0.0)
    at = _rows(a, start, count, head, H, rows, xs, X)
    bt = _rows(b, start, count, head, H, rows, xs, X)
    if gy is not None:
        shift = shifts + place * 3 * Y + ys
        entering = tl.load(shift, mask=ys < Y, other=0.0)
        leaving = tl.load(shift + Y, mask=ys < Y, other=0.0)
        middle = _exp(tl.load(shift + 2 * Y, mask=ys < Y, other=0.0))
        if x_shifts is not None:
            x_shift = x_shifts + place * 3 * X + xs
            x_entering = _exp(tl.load(x_shift, mask=xs < X, other=0.0))[None, :]
            x_leaving = _exp(tl.load(x_shift + X, mask=xs < X, other=0.0))[None, :]
            x_middle = _exp(tl.load(x_shift + 2 * X, mask=xs < X, other=0.0))[None, :]
            state = state.to(tl.float32) * _exp(entering)[:, None] * x_entering
            end = end.to(tl.float32) * _exp(leaving)[:, None] * x_leaving
            through = _dot(state * x_middle, tl.trans(end), DOT, PRECISION)
        else:
            through = _dot(state, tl.trans(end), DOT, PRECISION)
        columns = tl.arange(0, BY)
        through = tl.sum(tl.where(columns[:, None] == columns[None, :], through, 0.0), 0) * (middle * scale)
        gates = _clip(_rows(gy, start, count, head, H, rows, ys, Y))
    pairs = _dot(at, tl.trans(bt), DOT, PRECISION)
    if x_slow is not None:  # noqa: SIM102
        if _any_slow(x_slow, place, X_BLOCKS):
            pairs = tl.load(slow_pairs + place * C * C + rows[:, None] * C + rows[None, :]).to(tl.float32)
    late = rows + tl.minimum(count, 0)  # no constant, which would be worked out early and occupy registers
    distance = late[:, None] - rows[None, :]
    pairs = tl.where(distance >= 0, pairs, 0.0) * scale
    if BEFORE or SLOW:  # else the terms i = j stay among the pairs: they cancel in the gates' gradients
        own = tl.sum(tl.where(distance == 0, pairs, 0.0), 1)[:, None]
    if BEFORE:
        next_own = tl.sum(tl.where(distance == 1, pairs, 0.0), 1)[:, None]
        own_next = tl.sum(tl.where(distance == 1, pairs, 0.0), 0)[:, None]
        bonus = tl.load(u + head * Y + ys, mask=ys < Y, other=0.0).to(tl.float32)[None, :]
        pairs = tl.where(distance > 1, pairs, 0.0)
    elif SLOW:
        pairs = tl.where(distance > 0, pairs, 0.0)
    pairs = pairs.to(DOT)

    zt = _rows(readers, start, count, head, H, rows, ys, Y)
    yt = _rows(writers, start, count, head, H, rows, ys, Y)
    read = _dot(at, tl.trans(state), DOT, PRECISION) * scale
    if gy is not None:
        lost = zt.to(tl.float32) * read
        if BEFORE:
            lost = tl.where((rows > 0)[:, None], lost, 0.0)
        through += tl.sum(lost, 0)
        if SLOW:
            rest = _apply_by_level(
                pairs, y, gy, start, count, head, H, ys, Y, BY, C, LEVELS, False, BEFORE, DOT, PRECISION, GATE
            )
            lost += _rows(z, start, count, head, H, rows, ys, Y).to(tl.float32) * rest
        else:
            read += _dot(pairs, yt, DOT, PRECISION)
            lost = zt.to(tl.float32) * read
            if BEFORE:  # the first row has no other part
                lost = tl.where((rows > 0)[:, None], lost, 0.0)
        if BEFORE or SLOW:
            lost = lost.to(DOT)
        if SLOW:
            read = read * _decay(gates, entering, True, BEFORE, C, DOT, GATE) + rest
        else:
            shift = _sums(rows[None, :] <= rows[:, None], gates, DOT, GATE) - entering[None, :]
            read *= _exp(shift - gates.to(tl.float32) if BEFORE else shift)
    else:
        read += _dot(pairs, yt, DOT, PRECISION)
    if z_grad is not None:
        if BEFORE or SLOW:
            raw = own * _rows(y, start, count, head, H, rows, ys, Y).to(tl.float32)
            if BEFORE:
                raw = raw * bonus + next_own * _rows(y, start, count, head, H, rows - 1, ys, Y).to(tl.float32)
            read += raw
        _store_rows(z_grad, read, start, count, head, H, rows, ys, Y)

    back = _dot(bt, tl.trans(end), DOT, PRECISION) * scale
    if gy is not None:
        if SLOW:
            gained = yt.to(tl.float32) * back
            rest = _apply_by_level(
                tl.trans(pairs), z, gy, start, count, head, H, ys, Y, BY, C, LEVELS, True, BEFORE, DOT, PRECISION, GATE
            )
            gained += _rows(y, start, count, head, H, rows, ys, Y).to(tl.float32) * rest
        else:
            back += _dot(tl.trans(pairs), zt, DOT, PRECISION)
            gained = yt.to(tl.float32) * back
        if BEFORE:
            flow = _sums(rows[None, :] < rows[:, None], gained.to(DOT), DOT, GATE)
            flow -= _sums(rows[None, :] <= rows[:, None], lost, DOT, GATE)
        else:
            flow = _sums(rows[None, :] < rows[:, None], (gained - lost.to(tl.float32)).to(DOT), DOT, GATE)
        _store_rows(gate_grad, flow + through[None, :], start, count, head, H, rows, ys, Y)
        if SLOW:
            back = back * _decay(gates, leaving, False, False, C, DOT, GATE) + rest
        else:
            back *= _exp(-shift)
    else:
        back += _dot(tl.trans(pairs), zt, DOT, PRECISION)
    if BEFORE or SLOW:
        raw = own * _rows(z, start, count, head, H, rows, ys, Y).to(tl.float32)
        if BEFORE:
            raw_y = _rows(y, start, count, head, H, rows, ys, Y).to(tl.float32)
            tl.store(u_grad + place * Y + ys, tl.sum(raw * raw_y, 0), mask=ys < Y)
            raw = raw * bonus + own_next * _rows(z, start, count, head, H, rows + 1, ys, Y).to(tl.float32)
        back += raw
    _store_rows(y_grad, back, start, count, head, H, rows, ys, Y)
