"""Device code: states alone, carried over the chunks of a sequence; and the decode step."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.triton_parts import BLOCK, _clip, _decay, _dot, _exp, _halves, _rows, _state_at, _unit


@triton.jit(do_not_specialize=["T", "H", "STRIDE", "EVERY"])
def carry_kernel(
    b, y, gx, gy, initial, stored, final, units, T, H, STRIDE, EVERY, scale, stored_scale,
    X: tl.constexpr, Y: tl.constexpr, X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr, BY: tl.constexpr,
    C: tl.constexpr, REVERSE: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """S ← exp(X_end) S exp(Y_end) + Σ_t b_t y_tᵀ with their decay to the chunk's end.

    REVERSE: from the last chunk to the first, times `scale`, with the decay from the chunk's start. Stores the state
    before every EVERY-th chunk (REVERSE: before the last of every EVERY chunks), these times `stored_scale` instead,
    and after the last one, as [X,Y].
    Grid: N · H · X_BLOCKS · Y_BLOCKS.
    """
    program = tl.program_id(0).to(tl.int64)
    y_block, x_block = (program % Y_BLOCKS).to(tl.int32), (program // Y_BLOCKS % X_BLOCKS).to(tl.int32)
    row = program // Y_BLOCKS // X_BLOCKS
    head, sequence = row % H, row // H
    first, length, slot = _unit(units, sequence, T, 1, (T + C - 1) // C, STRIDE, C)
    rows = tl.arange(0, C)
    xs = x_block * BLOCK + tl.arange(0, BLOCK)
    ys = y_block * BY + tl.arange(0, BY)
    tile, inside = _state_at(xs, ys, X, Y, False)
    factor = 1.0
    if REVERSE:
        factor = scale
    state = tl.zeros([BLOCK, BY], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * X * Y + tile, mask=inside, other=0.0).to(tl.float32) / factor
    chunks = (length + C - 1) // C
    for step in range(0, chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        start = first + chunk * C
        count = tl.minimum(length - chunk * C, C).to(tl.int32)
        marked = chunk % EVERY == 0
        if REVERSE:
            marked = ((chunk + 1) % EVERY == 0) | (chunk == chunks - 1)
        if marked:
            place = stored + ((slot + chunk // EVERY) * H + head) * X * Y + tile
            tl.store(place, (state * stored_scale).to(stored.dtype.element_ty), mask=inside)
        bt = _rows(b, start, count, head, H, rows, xs, X)
        yt = _rows(y, start, count, head, H, rows, ys, Y)
        if gx is not None:
            gates = _clip(_rows(gx, start, count, head, H, rows, xs, X))
            early, late = _halves(gates, C)
            state *= _exp(early + late)[:, None]
            bt = bt.to(tl.float32) * _decay(gates, early * 0.0, REVERSE, BEFORE and REVERSE, C, DOT, GATE)
        if gy is not None:
            gates_y = _clip(_rows(gy, start, count, head, H, rows, ys, Y))
            early_y, late_y = _halves(gates_y, C)
            state *= _exp(early_y + late_y)[None, :]
            yt = yt.to(tl.float32) * _decay(gates_y, early_y * 0.0, REVERSE, False, C, DOT, GATE)
        state += _dot(tl.trans(bt), yt, DOT, PRECISION)
    tl.store(final + row * X * Y + tile, state * factor, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def step_kernel(
    q, k, v, g, gv, u, state, out, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr,
):  # fmt: skip
    """T decoding steps on one K×BV tile of the state, in place. Grid: B · H · V_BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % V_BLOCKS).to(tl.int32), program // V_BLOCKS
    head, batch = row % H, row // H
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    tile = state + row * K * V + (keys[:, None] * V + values[None, :])
    inside = (keys < K)[:, None] & (values < V)[None, :]
    current = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    for t in range(0, T):
        token = (batch * T + t) * H + head
        key = tl.load(k + token * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(v + token * V + values, mask=values < V, other=0.0).to(tl.float32)
        query = tl.load(q + token * K + keys, mask=keys < K, other=0.0).to(tl.float32) * scale
        result = tl.zeros([BV], tl.float32)
        if u is not None:
            bonus = tl.load(u + head * K + keys, mask=keys < K, other=0.0).to(tl.float32)
            result = tl.sum(current * query[:, None], 0) + tl.sum(query * key * bonus, 0) * value
        if g is not None:
            current *= _exp(tl.load(g + token * K + keys, mask=keys < K, other=0.0).to(tl.float32))[:, None]
        if gv is not None:
            current *= _exp(tl.load(gv + token * V + values, mask=values < V, other=0.0).to(tl.float32))[None, :]
        current += key[:, None] * value[None, :]
        if u is None:
            result = tl.sum(current * query[:, None], 0)
        tl.store(out + token * V + values, result.to(out.dtype.element_ty), mask=values < V)
    tl.store(tile, current.to(state.dtype.element_ty), mask=inside)
