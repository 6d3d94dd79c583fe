"""Triton kernels of `selective_scan`. One program walks a stretch of time for BD channels and all N states.

A tile is [BT, N, BD]: steps × states × channels. The lanes of a warp lie along the channels (and warps along the states
when there are more), so that scans over time and sums over states stay in a thread's registers. Tiles start at
multiples of BT rows of the whole line; rows outside the stretch have δ = 0, which leaves a state as it is. B and C come
in fp32: every thread needs all of them, and converting costs more than reading.

NP: N rounded up to a power of two. Legend of names: `rates` A·log2 e, `delta` δ, `u` δ·x, `kept` exp(δ A) h_{t−1}.
"""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.scan.triton_hgrn import _follow, _stretch

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    """log(1 + exp x) without overflow: max(x, 0) + log1p(e) with e = exp(−|x|), as e times a polynomial (3e-7)."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = e * -0.00837115255 + 0.0434938998
    p = e * p - 0.106850029
    p = e * p + 0.176874767
    p = e * p - 0.244747742
    p = e * p + 0.332719284
    p = e * p - 0.499971745
    p = e * p + 0.999999781
    return tl.maximum(x, 0) + e * p


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2E))


@triton.jit
def _get(pointer, offsets, mask, EVEN: tl.constexpr):
    """A tile in fp32, zero outside."""
    value = tl.load(pointer + offsets) if EVEN else tl.load(pointer + offsets, mask, 0)
    return value.to(tl.float32)


@triton.jit
def _put(pointer, offsets, value, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer + offsets, value)
    else:
        tl.store(pointer + offsets, value, mask)


@triton.jit
def _pick(tile, SIZE: tl.constexpr, WHICH: tl.constexpr):
    """tile[WHICH], [1, ·, ·] of [SIZE, ·, ·]. Adding zeros to integers costs nothing: the compiler drops it."""
    line = tl.arange(0, SIZE)[:, None, None]
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(line == WHICH, bits, 0), 0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _steps(dt, offsets, inside, bias, SOFTPLUS: tl.constexpr, EVEN: tl.constexpr):
    """(dt + bias, δ) of a tile [BT, 1, BD]; δ is zero outside."""
    raw = _get(dt, offsets, inside, EVEN) + bias
    delta = _softplus(raw) if SOFTPLUS else raw
    if not EVEN:
        delta = tl.where(inside, delta, 0)
    return raw, delta


@triton.jit
def _follow_both(decay_1, kept_1, added_1, decay_2, kept_2, added_2):
    """Two stretches of time; the state after each is what its last step `kept` of the one before, and `added`."""
    return decay_1 * decay_2, decay_2 * (kept_1 + added_1) + kept_2, added_2


@triton.jit(do_not_specialize=["T"])
def selective_forward_kernel(
    x,
    dt,
    A,
    B,
    C,
    skip,
    z,
    bias,
    initial,
    out,
    final,
    saved,
    coarse,
    totals,
    ends,
    table,
    bounds,
    T,
    D: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SUMMARY: tl.constexpr,
    EVERY: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Outputs, final state and the states before every EVERY-th row (`saved`), whichever are asked for.

    SUMMARY: only what a segment does to a state. `coarse`: segments start from these states, one before each segment of
    the line, so that they run side by side.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        batch = 0 if PACKED else sequence
        line = 0 if PACKED else sequence.to(tl.int64) * T
        step = tl.arange(0, BT)[:, None, None]
        n = tl.arange(0, NP)[None, :, None]
        d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, None, :]
        pair = (n < N) & (d < D)
        rates = tl.load(A + d * N + n, pair, 0).to(tl.float32) * LOG2E
        shift = tl.zeros((1, 1, BD), tl.float32)
        if bias is not None:
            shift = tl.load(bias + d, d < D, 0).to(tl.float32)
        own = (sequence.to(tl.int64) * D + d) * N + n
        state = tl.zeros((1, NP, BD), tl.float32)
        if not SUMMARY:
            if initial is not None:
                state = tl.load(initial + own, pair, 0).to(tl.float32)
            if ends is not None:
                for before in range(slot - local, slot):
                    total = tl.load(totals + before * D + d, d < D, 0)
                    state = tl.exp2(total * rates) * state + tl.load(ends + (before * D + d) * N + n, pair, 0)
        total = tl.zeros((1, 1, BD), tl.float32)
        origin = (start - line).to(tl.int32)
        end = (stop - line).to(tl.int32)
        if coarse is not None:
            chunk = batch * ((T + SEGMENT - 1) // SEGMENT) + origin // SEGMENT
            found = tl.load(coarse + (chunk.to(tl.int64) * N + n) * D + d, pair & (local > 0), 0)
            state = tl.where(local > 0, found.to(tl.float32), state)
        for t in tl.range(origin // BT * BT, end, BT, num_stages=STAGES):
            live = (t + step >= origin) & (t + step < end)
            inside = live & (d < D)
            mixed = live & (n < N)
            base = (line + t) * D
            tile = step * D + d
            low = (line + t) * N
            small = step * N + n
            if saved is not None:
                chunk = batch * ((T + EVERY - 1) // EVERY) + t // EVERY
                wanted = pair & (t >= origin) & (t % EVERY == 0)
                tl.store(saved + (chunk.to(tl.int64) * N + n) * D + d, state, wanted)
            _raw, delta = _steps(dt + base, tile, inside, shift, SOFTPLUS, EVEN)
            value = _get(x + base, tile, inside, EVEN)
            decay = tl.exp2(delta * rates)
            states = (delta * value) * _get(B + low, small, mixed, EVEN)
            states = tl.where(step == 0, decay * state + states, states)
            _, states = tl.associative_scan((decay, states), 0, _follow)
            if SUMMARY:
                total += tl.sum(delta, 0, keep_dims=True)
            if out is not None:
                y = tl.sum(states * _get(C + low, small, mixed, EVEN), 1, keep_dims=True)
                if skip is not None:
                    y += tl.load(skip + d, d < D, 0).to(tl.float32) * value
                if z is not None:
                    gate = _get(z + base, tile, inside, EVEN)
                    y *= gate * _sigmoid(gate)
                _put(out + base, tile, y, inside, EVEN)
            if saved is not None:
                for m in tl.static_range(1, BT // EVERY):
                    past = _pick(states, BT, m * EVERY - 1)
                    row = t + m * EVERY
                    place = ((chunk + m).to(tl.int64) * N + n) * D + d
                    tl.store(saved + place, past, pair & (row >= origin) & (row < end))
            state = _pick(states, BT, BT - 1)
        if SUMMARY:
            tl.store(totals + slot * D + d, total, d < D)
            tl.store(ends + (slot * D + d) * N + n, state, pair)
        if final is not None:
            last = stop == (tl.load(bounds + sequence + 1) if PACKED else line + T)
            tl.store(final + own, state, pair & last)


@triton.jit(do_not_specialize=["T"])
def selective_ends_back_kernel(
    dt,
    A,
    C,
    z,
    bias,
    out_grad,
    totals,
    ends,
    table,
    bounds,
    T,
    D: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What a segment does to the gradient of a state, from later steps to earlier ones: G ← exp(Σδ · A) G + end."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    slot = tl.program_id(0) // blocks
    sequence, _local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        line = 0 if PACKED else sequence.to(tl.int64) * T
        step = BT - 1 - tl.arange(0, BT)[:, None, None]
        n = tl.arange(0, NP)[None, :, None]
        d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, None, :]
        pair = (n < N) & (d < D)
        rates = tl.load(A + d * N + n, pair, 0).to(tl.float32) * LOG2E
        shift = tl.zeros((1, 1, BD), tl.float32)
        if bias is not None:
            shift = tl.load(bias + d, d < D, 0).to(tl.float32)
        entering = tl.zeros((1, NP, BD), tl.float32)
        total = tl.zeros((1, 1, BD), tl.float32)
        origin = (start - line).to(tl.int32)
        end = (stop - line).to(tl.int32)
        tiles = (end + BT - 1) // BT - origin // BT
        for i in tl.range(0, tiles, num_stages=STAGES):
            t = (origin // BT + tiles - 1 - i) * BT
            live = (t + step >= origin) & (t + step < end)
            inside = live & (d < D)
            base = (line + t) * D
            tile = step * D + d
            _raw, delta = _steps(dt + base, tile, inside, shift, SOFTPLUS, EVEN)
            grad = _get(out_grad + base, tile, inside, EVEN)
            if z is not None:
                gate = _get(z + base, tile, inside, EVEN)
                grad *= gate * _sigmoid(gate)
            decay = tl.exp2(delta * rates)
            grads = grad * _get(C + (line + t) * N, step * N + n, live & (n < N), EVEN) * decay
            grads = tl.where(step == BT - 1, decay * entering + grads, grads)
            _, grads = tl.associative_scan((decay, grads), 0, _follow)
            entering = _pick(grads, BT, BT - 1)
            total += tl.sum(delta, 0, keep_dims=True)
        tl.store(totals + slot * D + d, total, d < D)
        tl.store(ends + (slot * D + d) * N + n, entering, pair)


@triton.jit
def _over_channels(products, ones, BT: tl.constexpr, NH: tl.constexpr, BD: tl.constexpr, NARROW: tl.constexpr):
    """Σ over the program's channels, [BT·NH]. NARROW: as a matrix product, in bf16 summed in fp32."""
    rows = tl.reshape(products, (BT * NH, BD))
    if NARROW:
        return tl.sum(tl.dot(rows.to(tl.bfloat16), ones), 1)
    else:
        return tl.sum(rows, 1)


@triton.jit(do_not_specialize=["T"])
def selective_backward_kernel(
    x,
    dt,
    A,
    B,
    C,
    skip,
    z,
    bias,
    initial,
    saved,
    out_grad,
    final_grad,
    x_grad,
    dt_grad,
    z_grad,
    A_part,
    B_part,
    C_part,
    skip_part,
    bias_part,
    initial_grad,
    totals,
    ends,
    table,
    bounds,
    T,
    ROWS,
    D: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    NG: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    NARROW: tl.constexpr,
):
    """All gradients of a stretch, from its last tile to its first; those of A, D and the bias as one part per slot,
    those of B and C as one part per block of channels. The states come in NG groups, so that registers suffice."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    NH: tl.constexpr = NP // NG
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    sequence, local, start, stop = _stretch(slot, table, bounds, T, SEGMENT, SEGMENTS, PACKED)
    if sequence >= 0:
        batch = 0 if PACKED else sequence
        line = 0 if PACKED else sequence.to(tl.int64) * T
        step = tl.arange(0, BT)[:, None, None]
        group = tl.arange(0, NG)[:, None, None]
        n = group * NH + tl.arange(0, NH)[None, :, None]
        d = block * BD + tl.arange(0, BD)[None, None, :]
        pair = (n < N) & (d < D)
        rates = tl.load(A + d * N + n, pair, 0).to(tl.float32) * LOG2E
        shift = tl.zeros((1, 1, BD), tl.float32)
        if bias is not None:
            shift = tl.load(bias + d, d < D, 0).to(tl.float32)
        own = (sequence.to(tl.int64) * D + d) * N + n
        origin = (start - line).to(tl.int32)
        end = (stop - line).to(tl.int32)
        entering = tl.zeros((NG, NH, BD), tl.float32)
        if final_grad is not None:
            entering = tl.load(final_grad + own, pair, 0).to(tl.float32)
        if ends is not None:
            if PACKED:
                last = (tl.load(bounds + sequence + 1) - 1) // SEGMENT
                after = (last - start // SEGMENT).to(tl.int32)
            else:
                after = SEGMENTS - 1 - local
            for m in range(0, after):
                place = (slot + after - m) * D + d
                total = tl.load(totals + place, d < D, 0)
                entering = tl.exp2(total * rates) * entering + tl.load(ends + place * N + n, pair, 0)
        ones = (tl.arange(0, 16)[None, :] + tl.zeros((BD, 1), tl.int32) == 0).to(tl.bfloat16)
        number = tl.arange(0, BT * NH)
        row, column = number // NH, number % NH
        rate_sum = tl.zeros((NG, NH, BD), tl.float32)
        skip_sum = tl.zeros((1, 1, BD), tl.float32)
        bias_sum = tl.zeros((1, 1, BD), tl.float32)
        tiles = (end + BT - 1) // BT - origin // BT
        for i in tl.range(0, tiles, num_stages=STAGES):
            t = (origin // BT + tiles - 1 - i) * BT
            live = (t + step >= origin) & (t + step < end)
            rows_live = (t + row >= origin) & (t + row < end)
            inside = live & (d < D)
            base = (line + t) * D
            tile = step * D + d
            low = (line + t) * N
            raw, delta = _steps(dt + base, tile, inside, shift, SOFTPLUS, EVEN)
            value = _get(x + base, tile, inside, EVEN)
            grad = _get(out_grad + base, tile, inside, EVEN)
            y = tl.zeros((BT, 1, BD), tl.float32)
            gate = tl.zeros((BT, 1, BD), tl.float32)
            opened = tl.zeros((BT, 1, BD), tl.float32)
            y_grad = grad
            if z is not None:
                gate = _get(z + base, tile, inside, EVEN)
                opened = _sigmoid(gate)
                y_grad = grad * gate * opened
            u = delta * value
            u_grad = tl.zeros((BT, 1, BD), tl.float32)
            delta_grad = tl.zeros((BT, 1, BD), tl.float32)
            chunk = (batch * ((T + BT - 1) // BT) + t // BT).to(tl.int64) * N
            for g in tl.static_range(NG):
                states_here = g * NH + tl.arange(0, NH)[None, :, None]
                mixed = live & (states_here < N)
                write = _get(B + low, step * N + states_here, mixed, EVEN)
                read = _get(C + low, step * N + states_here, mixed, EVEN)
                there = (states_here < N) & (d < D)
                state = tl.load(saved + (chunk + states_here) * D + d, there, 0).to(tl.float32)
                if PACKED:  # a sequence may begin inside a tile, whose saved state is of the one before
                    begins = (t <= origin) & (local == 0)
                    own_start = tl.zeros((1, NH, BD), tl.float32)
                    if initial is not None:
                        place = (sequence.to(tl.int64) * D + d) * N + states_here
                        own_start = tl.load(initial + place, there & begins, 0).to(tl.float32)
                    state = tl.where(begins, own_start, state)
                rate = _pick(rates, NG, g)
                decay = tl.exp2(delta * rate)
                states = u * write
                kept = tl.where(step == 0, decay * state, tl.zeros((BT, NH, BD), tl.float32))
                _, kept, states = tl.associative_scan((decay, kept, states), 0, _follow_both)
                states += kept
                if z is not None:
                    y += tl.sum(states * read, 1, keep_dims=True)
                part = (block * ROWS + line + t) * N + row * N + g * NH + column
                wanted = rows_live & (g * NH + column < N)
                tl.store(C_part + part, _over_channels(states * y_grad, ones, BT, NH, BD, NARROW), wanted)
                grads = y_grad * read
                back = _pick(entering, NG, g)
                for j in tl.static_range(BT):
                    now = _pick(grads, BT, BT - 1 - j) + back
                    grads = tl.where(step == BT - 1 - j, now, grads)
                    back = _pick(decay, BT, BT - 1 - j) * now
                entering = tl.where(group == g, back, entering)
                tl.store(B_part + part, _over_channels(grads * u, ones, BT, NH, BD, NARROW), wanted)
                u_grad += tl.sum(grads * write, 1, keep_dims=True)
                kept *= grads
                delta_grad += tl.sum(kept * rate, 1, keep_dims=True)
                rate_sum += tl.where(group == g, tl.sum(kept * delta, 0, keep_dims=True), 0)
            delta_grad = delta_grad * (1 / LOG2E) + u_grad * value
            value_grad = u_grad * delta
            if skip is not None:
                weight = tl.load(skip + d, d < D, 0).to(tl.float32)
                value_grad += weight * y_grad
                skip_sum += tl.sum(y_grad * value, 0, keep_dims=True)
                y += weight * value
            if z is not None:
                _put(z_grad + base, tile, grad * y * opened * (1 + gate * (1 - opened)), inside, EVEN)
            if SOFTPLUS:
                delta_grad *= _sigmoid(raw)
            if not EVEN:
                delta_grad = tl.where(inside, delta_grad, 0)
            bias_sum += tl.sum(delta_grad, 0, keep_dims=True)
            _put(x_grad + base, tile, value_grad, inside, EVEN)
            _put(dt_grad + base, tile, delta_grad, inside, EVEN)
        place = slot * D + d
        tl.store(A_part + place * N + n, rate_sum, pair)
        if skip is not None:
            tl.store(skip_part + place, skip_sum, d < D)
        if bias is not None:
            tl.store(bias_part + place, bias_sum, d < D)
        if (local == 0) & (initial_grad is not None):
            tl.store(initial_grad + own, entering, pair)


@triton.jit(do_not_specialize=["T"])
def selective_step_kernel(
    x,
    dt,
    A,
    B,
    C,
    skip,
    z,
    bias,
    state,
    out,
    T,
    D: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BD: tl.constexpr,
):
    """T steps of the recurrence, in place on the state; [BD, N] tiles, as the state lies in memory."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    real = d < D
    pair = real[:, None] & (n < N)[None, :]
    own = d[:, None] * N + n[None, :]
    rates = tl.load(A + own, pair, 0).to(tl.float32) * LOG2E
    states = tl.load(state + batch * D * N + own, pair, 0).to(tl.float32)
    for t in range(0, T):
        place = (batch * T + t) * D + d
        raw = tl.load(dt + place, real, 0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + d, real, 0).to(tl.float32)
        delta = _softplus(raw) if SOFTPLUS else raw
        value = tl.load(x + place, real, 0).to(tl.float32)
        write = tl.load(B + (batch * T + t) * N + n, n < N, 0).to(tl.float32)
        read = tl.load(C + (batch * T + t) * N + n, n < N, 0).to(tl.float32)
        states = tl.exp2(delta[:, None] * rates) * states + (delta * value)[:, None] * write[None, :]
        y = tl.sum(states * read[None, :], 1)
        if skip is not None:
            y += tl.load(skip + d, real, 0).to(tl.float32) * value
        if z is not None:
            gate = tl.load(z + place, real, 0).to(tl.float32)
            y *= gate * _sigmoid(gate)
        tl.store(out + place, y, real)
    tl.store(state + batch * D * N + own, states, pair)
