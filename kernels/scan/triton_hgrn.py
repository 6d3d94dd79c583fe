"""Triton kernels of `hgrn`. One program walks a stretch of time for a block of channels, tile by tile.

A tile is BT steps × BD channels with all steps of a channel in one thread, so that the scan inside it is a plain loop
in registers, while the next tiles are on their way. A stretch is a whole sequence, or a segment of one: then
`hgrn_ends_kernel` first finds what every segment does to a state, and each program composes those before its own.
Padding rows load g = 0 and x = 0, which leave a state as it is.
"""

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
def _load(base, offsets, mask, EVEN: tl.constexpr):
    """A tile in fp32, zero outside."""
    value = tl.load(base + offsets) if EVEN else tl.load(base + offsets, mask, 0)
    return value.to(tl.float32)


@triton.jit
def _store(base, offsets, value, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(base + offsets, value)
    else:
        tl.store(base + offsets, value, mask)


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
    EVEN: tl.constexpr,
):
    """What a segment does to a state: h ← decay · h + end. REVERSE: to the gradient that enters from later."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, _local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        steps = tl.arange(0, BT)
        channels = tl.max_contiguous(tl.program_id(0) % blocks * BD + tl.arange(0, BD), VEC)
        length = (stop - start).to(tl.int32)
        total = tl.zeros((BD,), tl.float32)
        end = tl.zeros((BD,), tl.float32)
        for t in tl.range(0, length, BT, num_stages=STAGES):
            step = (BT - 1 - steps) if REVERSE else steps
            origin = (length - BT - t) if REVERSE else t
            mask = ((origin + step >= 0) & (origin + step < length))[:, None] & (channels < D)[None, :]
            base = (start + origin) * D
            tile = step[:, None] * D + channels[None, :]
            gate = _load(g + base, tile, mask, EVEN) * LOG2E
            decay = tl.exp2(gate)
            value = _load(x + base, tile, mask, EVEN)
            if REVERSE:
                value = decay * value
            first = (steps == 0)[:, None]
            value = tl.where(first, decay * end[None, :] + value, value)
            _, states = tl.associative_scan((decay, value), 0, _follow)
            end = tl.sum(tl.where((steps == BT - 1)[:, None], states, 0), 0)
            total += tl.sum(gate, 0)
        place = slot.to(tl.int64) * D + channels
        tl.store(decays + place, tl.exp2(total), channels < D)
        tl.store(ends + place, end, channels < D)


@triton.jit
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
    EVEN: tl.constexpr,
):
    """h_t = exp(g_t) h_{t−1} + x_t."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        steps = tl.arange(0, BT)
        channels = tl.max_contiguous(tl.program_id(0) % blocks * BD + tl.arange(0, BD), VEC)
        length = (stop - start).to(tl.int32)
        state = tl.zeros((BD,), tl.float32)
        if initial is not None:
            state = tl.load(initial + sequence.to(tl.int64) * D + channels, channels < D, 0).to(tl.float32)
        if ends is not None:
            for before in range(slot - local, slot):
                place = before * D + channels
                state = tl.load(decays + place, channels < D, 0) * state + tl.load(ends + place, channels < D, 0)
        for t in tl.range(0, length, BT, num_stages=STAGES):
            mask = (t + steps < length)[:, None] & (channels < D)[None, :]
            base = (start + t) * D
            tile = steps[:, None] * D + channels[None, :]
            decay = tl.exp2(_load(g + base, tile, mask, EVEN) * LOG2E)
            value = _load(x + base, tile, mask, EVEN)
            value = tl.where((steps == 0)[:, None], decay * state[None, :] + value, value)
            _, states = tl.associative_scan((decay, value), 0, _follow)
            _store(out + base, tile, states, mask, EVEN)
            state = tl.sum(tl.where((steps == BT - 1)[:, None], states, 0), 0)
        if stop == (tl.load(bounds + sequence + 1) if PACKED else (sequence.to(tl.int64) + 1) * T):
            tl.store(final + sequence.to(tl.int64) * D + channels, state, channels < D)


@triton.jit
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
    EVEN: tl.constexpr,
):
    """dx_t = dh_t + exp(g_{t+1}) dx_{t+1} and dg_t = dx_t exp(g_t) h_{t−1}, from the last step to the first."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        steps = tl.arange(0, BT)
        channels = tl.max_contiguous(tl.program_id(0) % blocks * BD + tl.arange(0, BD), VEC)
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
        for t in tl.range(0, length, BT, num_stages=STAGES):
            origin = length - BT - t
            step = BT - 1 - steps
            mask = (origin + step >= 0)[:, None] & (channels < D)[None, :]
            base = (start + origin) * D
            tile = step[:, None] * D + channels[None, :]
            decay = tl.exp2(_load(g + base, tile, mask, EVEN) * LOG2E)
            value = _load(out_grad + base, tile, mask, EVEN)
            earlier = (origin + step + local > 0)[:, None] & (channels < D)[None, :]
            past = tl.load(h + base - D + tile, earlier & mask, 0).to(tl.float32)
            if initial is not None:
                past = tl.where((origin + step + local == 0)[:, None], before[None, :], past)
            value = tl.where((steps == 0)[:, None], value + entering[None, :], value)
            _, grads, _ = tl.associative_scan((tl.full((BT, BD), 1.0, tl.float32), value, decay), 0, _follow_back)
            passed = grads * decay
            _store(x_grad + base, tile, grads, mask, EVEN)
            _store(g_grad + base, tile, passed * past, mask, EVEN)
            entering = tl.sum(tl.where((steps == BT - 1)[:, None], passed, 0), 0)
        if (local == 0) & (initial_grad is not None):
            tl.store(initial_grad + own, entering, channels < D)


@triton.jit
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
