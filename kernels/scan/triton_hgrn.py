"""Triton kernels of `hgrn`. One program walks a stretch of time for a block of channels, tile by tile.

A tile is BT steps × BD channels with all steps of a channel in one thread, so that the scan inside it is a plain loop
in registers, while the next tiles are on their way. A stretch is a whole sequence, or a segment of one: then
`hgrn_ends_kernel` first finds what every segment does to a state, and each program composes those before its own.
Padding rows load g = 0 and x = 0, which leave a state as it is.
"""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stretch(slot, table, bounds, T, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, number of its segment, first row, end row) of a slot; the sequence is −1 where nothing is to do."""
    if PACKED:
        sequence = tl.load(table + 3 * slot)
        local = tl.load(table + 3 * slot + 1)
        number = tl.load(table + 3 * slot + 2).to(tl.int64)
        safe = tl.maximum(sequence, 0)
        start = tl.maximum(tl.load(bounds + safe).to(tl.int64), number * SEGMENT)
        stop = tl.minimum(tl.load(bounds + safe + 1).to(tl.int64), (number + 1) * SEGMENT)
    else:
        sequence = slot // SEGMENTS
        local = slot % SEGMENTS
        start = sequence.to(tl.int64) * T + local * SEGMENT
        stop = tl.minimum(start + SEGMENT, (sequence.to(tl.int64) + 1) * T)
    return sequence, local, start, stop


@triton.jit
def _place(
    table, bounds, T, D: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, PACKED: tl.constexpr,
    BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(slot, what `_stretch` says of it, channels) of a program; VEC channels lie next to each other in a thread."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    channels = tl.max_contiguous(tl.program_id(0) % blocks * BD + tl.arange(0, BD), VEC)
    return slot, sequence, local, start, stop, channels


@triton.jit
def _load(pointer, offsets, mask, MASKED: tl.constexpr):
    """A tile in fp32, zero outside."""
    value = tl.load(pointer + offsets, mask, 0) if MASKED else tl.load(pointer + offsets)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, offsets, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, value, mask)
    else:
        tl.store(pointer + offsets, value)


@triton.jit
def _follow(decay_1, state_1, decay_2, state_2):
    """h ← decay · h + state, the first map and then the second."""
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _follow_back(between_1, grad_1, decay_1, between_2, grad_2, decay_2):
    """The same backwards in time: dx_t = dh_t + exp(g_{t+1}) dx_{t+1}.

    Of a run of steps, `grad` is dx of its earliest one without what comes from later runs, `decay` the decay of that
    step, `between` the product of the decays of the others.
    """
    passed = between_2 * decay_1
    return passed * between_1, passed * grad_1 + grad_2, decay_2


@triton.jit
def _last(tile, BT: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], tile, 0), 0)


@triton.jit
def _ends_tile(x, g, base, step, channels, end, mask, D, BT: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr):
    """(end after one more tile, log2 decay of the tile)."""
    tile = step[:, None] * D + channels[None, :]
    gate = _load(g + base, tile, mask, MASKED) * LOG2E
    value = _load(x + base, tile, mask, MASKED)
    decay = tl.exp2(gate)
    if REVERSE:
        value = decay * value
    value = tl.where((tl.arange(0, BT) == 0)[:, None], decay * end[None, :] + value, value)
    _, states = tl.associative_scan((decay, value), 0, _follow)
    return _last(states, BT), tl.sum(gate, 0)


@triton.jit(do_not_specialize=["T"])
def hgrn_ends_kernel(
    x,
    g,
    decays,
    ends,
    table,
    bounds,
    T,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What a segment does to a state: h ← decay · h + end. REVERSE: to the gradient that enters from later."""
    narrow: tl.constexpr = D % BD != 0
    slot, sequence, _local, start, stop, channels = _place(table, bounds, T, D, SEGMENT, SEGMENTS, PACKED, BD, VEC)
    if sequence >= 0:
        steps = tl.arange(0, BT)
        real = (channels < D)[None, :]
        length = (stop - start).to(tl.int32)
        whole = length // BT * BT
        step = (BT - 1 - steps) if REVERSE else steps
        total = tl.zeros((BD,), tl.float32)
        end = tl.zeros((BD,), tl.float32)
        for t in tl.range(0, whole, BT, num_stages=STAGES):
            base = (start + ((length - BT - t) if REVERSE else t)) * D
            end, gate = _ends_tile(x, g, base, step, channels, end, real, D, BT, REVERSE, narrow)
            total += gate
        if whole < length:
            origin = (length - BT - whole) if REVERSE else whole
            inside = ((origin + step >= 0) & (origin + step < length))[:, None] & real
            end, gate = _ends_tile(x, g, (start + origin) * D, step, channels, end, inside, D, BT, REVERSE, True)
            total += gate
        place = slot.to(tl.int64) * D + channels
        tl.store(decays + place, tl.exp2(total), channels < D)
        tl.store(ends + place, end, channels < D)


@triton.jit
def _forward_tile(x, g, out, base, channels, state, mask, D, BT: tl.constexpr, MASKED: tl.constexpr):
    """The state after one more tile, whose outputs are stored."""
    steps = tl.arange(0, BT)
    tile = steps[:, None] * D + channels[None, :]
    decay = tl.exp2(_load(g + base, tile, mask, MASKED) * LOG2E)
    value = _load(x + base, tile, mask, MASKED)
    value = tl.where((steps == 0)[:, None], decay * state[None, :] + value, value)
    _, states = tl.associative_scan((decay, value), 0, _follow)
    _store(out + base, tile, states, mask, MASKED)
    return _last(states, BT)


@triton.jit(do_not_specialize=["T"])
def hgrn_forward_kernel(
    x,
    g,
    initial,
    out,
    final,
    decays,
    ends,
    table,
    bounds,
    T,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h_t = exp(g_t) h_{t−1} + x_t."""
    narrow: tl.constexpr = D % BD != 0
    slot, sequence, local, start, stop, channels = _place(table, bounds, T, D, SEGMENT, SEGMENTS, PACKED, BD, VEC)
    if sequence >= 0:
        real = (channels < D)[None, :]
        length = (stop - start).to(tl.int32)
        whole = length // BT * BT
        state = tl.zeros((BD,), tl.float32)
        if initial is not None:
            state = tl.load(initial + sequence.to(tl.int64) * D + channels, channels < D, 0).to(tl.float32)
        if ends is not None:
            for before in range(slot - local, slot):
                place = before * D + channels
                state = tl.load(decays + place, channels < D, 0) * state + tl.load(ends + place, channels < D, 0)
        for t in tl.range(0, whole, BT, num_stages=STAGES):
            state = _forward_tile(x, g, out, (start + t) * D, channels, state, real, D, BT, narrow)
        if whole < length:
            inside = (whole + tl.arange(0, BT) < length)[:, None] & real
            state = _forward_tile(x, g, out, (start + whole) * D, channels, state, inside, D, BT, True)
        if stop == (tl.load(bounds + sequence + 1) if PACKED else (sequence.to(tl.int64) + 1) * T):
            tl.store(final + sequence.to(tl.int64) * D + channels, state, channels < D)


@triton.jit
def _backward_tile(
    g,
    h,
    out_grad,
    x_grad,
    g_grad,
    base,
    channels,
    entering,
    before,
    mask,
    first,
    D,
    BT: tl.constexpr,
    MASKED: tl.constexpr,
    AT_START: tl.constexpr,
):
    """What enters the tile before. AT_START: `first` [BT, 1] marks the row before which the state is `before`."""
    steps = tl.arange(0, BT)
    tile = (BT - 1 - steps)[:, None] * D + channels[None, :]
    decay = tl.exp2(_load(g + base, tile, mask, MASKED) * LOG2E)
    value = _load(out_grad + base, tile, mask, MASKED)
    if AT_START:
        past = _load(h + base - D, tile, mask & ~first, True)
        past = tl.where(first, before[None, :], past)
    else:
        past = _load(h + base - D, tile, mask, MASKED)
    value = tl.where((steps == 0)[:, None], value + entering[None, :], value)
    between = tl.full(value.shape, 1.0, tl.float32)
    _, grads, _ = tl.associative_scan((between, value, decay), 0, _follow_back)
    passed = grads * decay
    _store(x_grad + base, tile, grads, mask, MASKED)
    _store(g_grad + base, tile, passed * past, mask, MASKED)
    return _last(passed, BT)


@triton.jit(do_not_specialize=["T"])
def hgrn_backward_kernel(
    g,
    h,
    initial,
    out_grad,
    final_grad,
    x_grad,
    g_grad,
    initial_grad,
    decays,
    ends,
    table,
    bounds,
    T,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx_t = dh_t + exp(g_{t+1}) dx_{t+1} and dg_t = dx_t exp(g_t) h_{t−1}, from the last step to the first."""
    narrow: tl.constexpr = D % BD != 0
    slot, sequence, local, start, stop, channels = _place(table, bounds, T, D, SEGMENT, SEGMENTS, PACKED, BD, VEC)
    if sequence >= 0:
        real = (channels < D)[None, :]
        length = (stop - start).to(tl.int32)
        own = sequence.to(tl.int64) * D + channels
        entering = tl.zeros((BD,), tl.float32)
        if final_grad is not None:
            entering = tl.load(final_grad + own, channels < D, 0).to(tl.float32)
        if ends is not None:
            if PACKED:
                last = (tl.load(bounds + sequence + 1) - 1) // SEGMENT
                after = (last - start // SEGMENT).to(tl.int32)
            else:
                after = SEGMENTS - 1 - local
            for n in range(0, after):
                place = (slot + after - n) * D + channels
                entering = tl.load(decays + place, channels < D, 0) * entering + tl.load(ends + place, channels < D, 0)
        before = tl.zeros((BD,), tl.float32)
        if initial is not None:
            before = tl.load(initial + own, channels < D, 0).to(tl.float32)
        whole = (length - 1) // BT * BT
        for t in tl.range(0, whole, BT, num_stages=STAGES):
            base = (start + length - BT - t) * D
            entering = _backward_tile(
                g, h, out_grad, x_grad, g_grad, base, channels, entering, before, real, real, D, BT, narrow, False
            )
        row = length - whole - 1 - tl.arange(0, BT)
        inside = (row >= 0)[:, None] & real
        first = (row + local == 0)[:, None]
        base = (start + length - whole - BT) * D
        entering = _backward_tile(
            g, h, out_grad, x_grad, g_grad, base, channels, entering, before, inside, first, D, BT, True, True
        )
        if (local == 0) & (initial_grad is not None):
            tl.store(initial_grad + own, entering, channels < D)


@triton.jit(do_not_specialize=["T"])
def hgrn_step_kernel(x, g, state, out, T, D: tl.constexpr, BD: tl.constexpr):
    """T steps of the recurrence, in place on the state."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channels = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    mask = channels < D
    own = tl.load(state + batch * D + channels, mask, 0).to(tl.float32)
    for t in range(0, T):
        place = (batch * T + t) * D + channels
        decay = tl.exp2(tl.load(g + place, mask, 0).to(tl.float32) * LOG2E)
        own = decay * own + tl.load(x + place, mask, 0).to(tl.float32)
        tl.store(out + place, own, mask)
    tl.store(state + batch * D + channels, own, mask)
