"""Device code for one decay per head; `simple_triton` launches it and explains how the passes combine.

A program keeps one [X, BZ] tile of a head's state in registers and streams the chunks of one span of tokens past it.
Gates are in log2 inside. Legend: HV value heads, H query and key heads, C tokens in a chunk, GATE 0 none, 1 constant
(g [HV]), 2 per step (g [HV, slots, C, 4], see `cumulate_kernel`). Every exponent is ≤ 0.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(slot, table, bounds, T, PIECES, LENGTH):
    """(sequence, first token, tokens) of a span: one of PIECES of LENGTH tokens that a sequence of T is cut into.

    Packed: a whole sequence, or what `table` says, which has entries without tokens.
    """
    if table is not None:
        sequence = tl.load(table + slot * 2).to(tl.int64)
        local = tl.load(table + slot * 2 + 1).to(tl.int64)
        used = sequence >= 0
        sequence = tl.maximum(sequence, 0)
        first = tl.load(bounds + sequence).to(tl.int64) + local * LENGTH
        stop = tl.load(bounds + sequence + 1).to(tl.int64)
        count = tl.where(used, tl.minimum(stop - first, LENGTH), 0)
    elif bounds is not None:
        sequence = slot
        first = tl.load(bounds + slot).to(tl.int64)
        count = tl.load(bounds + slot + 1).to(tl.int64) - first
    else:
        sequence = slot // PIECES
        local = slot % PIECES
        first = sequence * T + local * LENGTH
        count = tl.minimum(T - local * LENGTH, LENGTH)
    return sequence, first, count


@triton.jit
def _load(base, first, count, head, heads, i, d, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a [tokens, heads, D] tensor, zero from `count` on and beyond D. Only the origin is a 64-bit offset."""
    at = base + (first * heads + head) * D + (i[:, None] * (heads * D) + d[None, :])
    if D == BD:
        return tl.load(at, mask=(i < count)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(i < count)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(base, value, first, count, head, heads, i, d, D: tl.constexpr, BD: tl.constexpr):
    at = base + (first * heads + head) * D + (i[:, None] * (heads * D) + d[None, :])
    if D == BD:
        tl.store(at, value.to(base.dtype.element_ty), mask=(i < count)[:, None])
    else:
        tl.store(at, value.to(base.dtype.element_ty), mask=(i < count)[:, None] & (d < D)[None, :])


@triton.jit
def _constant(g, head, GATE: tl.constexpr):
    """The gate of every step (log2), if it is constant."""
    if GATE == 1:
        return tl.load(g + head).to(tl.float32) * LOG2E
    else:
        return 0.0


@triton.jit
def _gates(g, constant, first, sequence, count, head, slots, i, C: tl.constexpr, GATE: tl.constexpr):
    """Sums of log2 gates from a chunk's start to each token (itself included), and to its last."""
    if GATE == 2:
        row = g + (head * slots + first // C + sequence) * (4 * C)
        return tl.load(row + i * 4), tl.load(row + (C - 1) * 4)
    else:
        return tl.minimum(i + 1, count).to(tl.float32) * constant, count.to(tl.float32) * constant


@triton.jit
def _weights(sums, constant, i, n, GATE: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr):
    """exp2 of the gates between reader and writer; zero where the reader is first. Rows read, or write if REVERSE.

    Constant weights stay in registers for all chunks. Others are made anew, their mask too, which the compiler
    would keep in registers if it did not depend on the loop.
    """
    if GATE == 1:
        rows = i
    else:
        rows = i + tl.minimum(n, 0)
    if REVERSE:
        later = rows[:, None] < i[None, :] + (0 if STRICT else 1)
    else:
        later = rows[:, None] + (0 if STRICT else 1) > i[None, :]
    if GATE == 0:
        return tl.where(later, 1.0, 0.0)
    elif GATE == 1:
        return tl.where(later, tl.exp2(tl.abs(i[:, None] - i[None, :]).to(tl.float32) * constant), 0.0)
    else:
        return tl.where(later, tl.exp2(-tl.abs((sums[:, None] - sums[None, :]).to(tl.float32))), 0.0)


@triton.jit
def _meet(base, state, xs, zs, X: tl.constexpr, Z: tl.constexpr):
    """Σ_z of a stored [X, Z] times a state: one number for each row."""
    inside = (xs < X)[:, None] & (zs < Z)[None, :]
    stored = tl.load(base + xs[:, None] * Z + zs[None, :], mask=inside, other=0.0)
    return tl.sum(stored.to(tl.float32) * state, 1)


@triton.jit(do_not_specialize=["T", "PIECES", "LENGTH", "tokens", "slots", "H", "HV"])
def stream_kernel(
    x, y, z, g, partner, initial, final, out, flow, states, boundary, table, bounds,
    T, PIECES, LENGTH, tokens, slots, H, HV, scale, start_scale, end_scale,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, RESET: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, EARLY: tl.constexpr, DEFER: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = scale · (Σ_{j≤i} (x_i·y_j) exp(G_i − G_j) z_j + exp(G_i) x_i S), S ← decay · S + Σ y_j z_jᵀ decayed.

    REVERSE runs from the last token to the first, reading later ones. Grid: spans · HV · BLOCKS.
    Forward (q, k, v) gives o, TRANSPOSED (do, v, k) dq; REVERSE (k, q, do) dv, REVERSE TRANSPOSED (v, do, q) dk.
    TRANSPOSED: states lie in memory as [Z, X]; x and y have HV heads and z H, otherwise the other way round.
    `initial` and `final` (or None): [spans, HV, ...], times start_scale and end_scale.
    For gate gradients, else None: `partner` [tokens, heads of z, Z], whose product with out, without what a token
    read from itself, goes to `flow` [BLOCKS, HV, tokens]. `states` [.., HV, X, Z]: written every RESET chunks when
    running back, read when running forward, and Σ_z of their product with the state goes to `boundary`
    [.., HV, BLOCKS, BX].
    EARLY: add the chunk to the state before its outputs are done. DEFER: store outputs while the next chunk loads.
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, slot = row % HV, row // HV
    sequence, first, count = _span(slot, table, bounds, T, PIECES, LENGTH)
    group = HV // H
    if TRANSPOSED:
        x_head, x_heads, z_head, z_heads = head, HV, head // group, H
    else:
        x_head, x_heads, z_head, z_heads = head // group, H, head, HV
    constant = _constant(g, head, GATE)
    i = tl.arange(0, C)
    xs = tl.arange(0, BX)
    zs = block * BZ + tl.arange(0, BZ)
    inside = (xs < X)[:, None] & (zs < Z)[None, :]
    if TRANSPOSED:
        tile = zs[None, :] * X + xs[:, None]
    else:
        tile = xs[:, None] * Z + zs[None, :]
    state = tl.zeros([BX, BZ], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * X * Z + tile, mask=inside, other=0.0).to(tl.float32) * start_scale
    chunks = ((count + C - 1) // C).to(tl.int32)
    pending = tl.zeros([C, BZ], out.dtype.element_ty)
    if states is not None and not REVERSE:  # noqa: SIM102 (the first part is known to the compiler)
        if chunks > 0:
            place = (first // (C * RESET) + sequence) * HV + head
            product = _meet(states + place * X * Z, state, xs, zs, X, Z)
            tl.store(boundary + (place * BLOCKS + block) * BX + xs, product * scale)
    for step in tl.range(0, chunks, num_stages=STAGES):
        local = step
        if REVERSE:
            local = chunks - 1 - step
        here = first + local * C
        n = tl.minimum(count - local * C, C).to(tl.int32)
        if DEFER:
            before = here + (C if REVERSE else -C)
            n_before = tl.where(step > 0, tl.minimum(first + count - before, C), 0).to(tl.int32)
            _store(out, pending, before, n_before, head, HV, i, zs, Z, BZ * BLOCKS)
        narrow = state.to(DOT)
        x_tile = _load(x, here, n, x_head, x_heads, i, xs, X, BX).to(DOT)
        y_tile = _load(y, here, n, x_head, x_heads, i, xs, X, BX).to(DOT)
        z_tile = _load(z, here, n, z_head, z_heads, i, zs, Z, BZ * BLOCKS).to(DOT)
        if GATE > 0:
            sums, total = _gates(g, constant, here, sequence, n, head, slots, i, C, GATE)
            to_start = tl.exp2(sums.to(tl.float32))
            to_end = tl.exp2((total - sums).to(tl.float32))
            values = (z_tile.to(tl.float32) * (to_start if REVERSE else to_end)[:, None]).to(DOT)
        else:
            sums = 0.0
            values = z_tile
        result = tl.dot(x_tile, narrow, input_precision=PRECISION)
        pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        if EARLY:
            if GATE > 0:
                state *= tl.exp2(total.to(tl.float32))
            state = tl.dot(tl.trans(y_tile), values, state, input_precision=PRECISION)
        if GATE > 0:
            result *= (to_end if REVERSE else to_start)[:, None]
        if partner is not None:
            own = tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), pairs, 0.0).to(DOT)
        pairs *= _weights(sums, constant, i, n, GATE, REVERSE, partner is not None)
        result = tl.dot(pairs.to(DOT), z_tile, result, input_precision=PRECISION)
        if partner is not None:
            mate = _load(partner, here, n, z_head, z_heads, i, zs, Z, BZ * BLOCKS).to(tl.float32)
            change = tl.sum(mate * result, 1) * scale
            tl.store(flow + (block * HV + head) * tokens + here + i, change, mask=i < n)
            result = tl.dot(own, z_tile, result, input_precision=PRECISION)
        if DEFER:
            pending = (result * scale).to(out.dtype.element_ty)
        else:
            _store(out, result * scale, here, n, head, HV, i, zs, Z, BZ * BLOCKS)
        if not EARLY:
            if GATE > 0:
                state *= tl.exp2(total.to(tl.float32))
            state = tl.dot(tl.trans(y_tile), values, state, input_precision=PRECISION)
        if states is not None:
            rows, columns = xs + tl.minimum(n, 0), zs + tl.minimum(n, 0)  # kept from leaving the loop: registers
            if REVERSE:
                if local % RESET == 0:
                    place = (here // (C * RESET) + sequence) * HV + head
                    at = states + place * X * Z + rows[:, None] * Z + columns[None, :]
                    tl.store(at, state.to(states.dtype.element_ty), mask=(rows < X)[:, None] & (columns < Z)[None, :])
            else:
                if ((local + 1) % RESET == 0) & (local + 1 < chunks):
                    place = ((here + C) // (C * RESET) + sequence) * HV + head
                    product = _meet(states + place * X * Z, state, rows, columns, X, Z)
                    tl.store(boundary + (place * BLOCKS + block) * BX + xs, product * scale)
    if DEFER:
        before = first if REVERSE else first + (chunks - 1) * C
        n_before = tl.where(chunks > 0, tl.minimum(first + count - before, C), 0).to(tl.int32)
        _store(out, pending, before, n_before, head, HV, i, zs, Z, BZ * BLOCKS)
    if final is not None:
        tl.store(final + row * X * Z + tile, state * end_scale, mask=inside)


@triton.jit(do_not_specialize=["T", "slots", "PIECES"])
def cumulate_kernel(
    g, sums, table, bounds, T, slots, PIECES, HV, C: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """sums [HV, slots, C, 4], for every token of a chunk: log2 gates summed from the chunk's start, their exp2, exp2 of
    those after the token, exp2 of all. g [tokens, HV]. Grid: chunks · ⌈HV/BH⌉."""
    program = tl.program_id(0).to(tl.int64)
    parts = (HV + BH - 1) // BH
    h = program % parts * BH + tl.arange(0, BH)
    sequence, first, count = _span(program // parts, table, bounds, T, PIECES, C)
    i = tl.arange(0, C)
    inside = (i < count)[:, None] & (h < HV)[None, :]
    gates = tl.load(g + (first + i)[:, None] * HV + h[None, :], mask=inside, other=0.0).to(tl.float32)
    gates = gates.to(sums.dtype.element_ty) * LOG2E
    total = tl.sum(gates, 0)[None, :]
    gates = tl.cumsum(gates, 0)
    start = tl.join(gates, tl.exp2(gates))
    end = tl.join(tl.exp2(total - gates), tl.exp2(total) + gates * 0)
    columns = tl.reshape(tl.permute(tl.join(start, end), (0, 1, 3, 2)), (C, BH, 4))
    at = ((h[None, :, None] * slots + first // C + sequence) * C + i[:, None, None]) * 4 + tl.arange(0, 4)[
        None, None, :
    ]
    tl.store(sums + at, columns, mask=(h < HV)[None, :, None] & (count > 0))


@triton.jit(do_not_specialize=["T", "PIECES", "LENGTH", "tokens", "slots", "H", "HV"])
def segment_kernel(
    y, z, g, own, decay, table, bounds, T, PIECES, LENGTH, tokens, slots, H, HV,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, X_BLOCKS: tl.constexpr,
    Z_BLOCKS: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state [segments, HV, X, Z], and its total gate [segments, HV] (log2).

    y has H heads, z HV. At the segment's end, or REVERSE its start. Grid: segments · HV · X_BLOCKS · Z_BLOCKS.
    """
    program = tl.program_id(0).to(tl.int64)
    z_block, x_block = (program % Z_BLOCKS).to(tl.int32), (program // Z_BLOCKS % X_BLOCKS).to(tl.int32)
    row = program // Z_BLOCKS // X_BLOCKS
    head, slot = row % HV, row // HV
    sequence, first, count = _span(slot, table, bounds, T, PIECES, LENGTH)
    key_head = head // (HV // H)
    constant = _constant(g, head, GATE)
    i = tl.arange(0, C)
    xs = x_block * BX + tl.arange(0, BX)
    zs = z_block * BZ + tl.arange(0, BZ)
    state = tl.zeros([BX, BZ], tl.float32)
    whole = 0.0
    chunks = ((count + C - 1) // C).to(tl.int32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        local = step
        if REVERSE:
            local = chunks - 1 - step
        here = first + local * C
        n = tl.minimum(count - local * C, C).to(tl.int32)
        y_tile = _load(y, here, n, key_head, H, i, xs, X, BX * X_BLOCKS).to(DOT)
        z_tile = _load(z, here, n, head, HV, i, zs, Z, BZ * Z_BLOCKS).to(DOT)
        if GATE > 0:
            sums, total = _gates(g, constant, here, sequence, n, head, slots, i, C, GATE)
            whole += total.to(tl.float32)
            state *= tl.exp2(total.to(tl.float32))
            factor = tl.exp2((sums if REVERSE else total - sums).to(tl.float32))
            z_tile = (z_tile.to(tl.float32) * factor[:, None]).to(DOT)
        state = tl.dot(tl.trans(y_tile), z_tile, state, input_precision=PRECISION)
    inside = (xs < X)[:, None] & (zs < Z)[None, :]
    tl.store(own + row * X * Z + (xs[:, None] * Z + zs[None, :]), state, mask=inside)
    if GATE > 0:  # noqa: SIM102
        if program % (Z_BLOCKS * X_BLOCKS) == 0:
            tl.store(decay + row, whole)


@triton.jit(do_not_specialize=["PIECES"])
def carry_kernel(
    own, decay, initial, final, first_slots, PIECES, HV, SIZE, start_scale, end_scale,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace what each segment adds by the state before it (REVERSE: after it). Grid: N · HV · BLOCKS.

    own [segments, HV, SIZE]; first_slots [N+1], or None: PIECES for each sequence; initial and final
    [N, HV, SIZE], each or None.
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = program % BLOCKS, program // BLOCKS
    head, sequence = row % HV, row // HV
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * SIZE + at, mask=inside, other=0.0).to(tl.float32) * start_scale
    if first_slots is not None:
        begin = tl.load(first_slots + sequence).to(tl.int64)
        segments = (tl.load(first_slots + sequence + 1).to(tl.int64) - begin).to(tl.int32)
    else:
        begin = sequence * PIECES
        segments = PIECES
    for step in range(0, segments):
        local = step
        if REVERSE:
            local = segments - 1 - step
        place = (begin + local) * HV + head
        added = tl.load(own + place * SIZE + at, mask=inside, other=0.0)
        tl.store(own + place * SIZE + at, state, mask=inside)
        if GATED:
            state *= tl.exp2(tl.load(decay + place))
        state += added
    if final is not None:
        tl.store(final + row * SIZE + at, state * end_scale, mask=inside)


@triton.jit(do_not_specialize=["T", "tokens", "PIECES"])
def gate_grad_kernel(
    gained, lost, boundary, grad, table, bounds, T, tokens, PIECES, HV,
    GAINED: tl.constexpr, LOST: tl.constexpr, BX: tl.constexpr, C: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dg_t = boundary + Σ_{s<t} (gained_s − lost_s) over the C tokens between two resets. Grid: resets · ⌈HV/BH⌉.

    gained [GAINED, HV, tokens], lost [LOST, HV, tokens], boundary [.., HV, LOST, BX]: to be summed over blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    parts = (HV + BH - 1) // BH
    h = (program % parts * BH + tl.arange(0, BH)).to(tl.int32)
    slot = program // parts
    sequence, first, count = _span(slot, table, bounds, T, PIECES, C)
    n = count.to(tl.int32)
    i = tl.arange(0, C)
    at = h[None, :] * tokens.to(tl.int64) + (first + i)[:, None]
    inside = (i < n)[:, None] & (h < HV)[None, :]
    before = ((i > 0) & (i < n))[:, None] & (h < HV)[None, :]
    change = tl.zeros([C, BH], tl.float32)
    total = tl.zeros([BH], tl.float32)
    size = tokens.to(tl.int64) * HV
    for block in tl.static_range(0, GAINED):
        change += tl.load(gained + block * size + at - 1, mask=before, other=0.0)
    for block in tl.static_range(0, LOST):
        change -= tl.load(lost + block * size + at - 1, mask=before, other=0.0)
        place = boundary + (((first // C + sequence) * HV + h) * LOST + block)[:, None] * BX
        known = ((h < HV) & (n > 0))[:, None]
        total += tl.sum(tl.load(place + tl.arange(0, BX)[None, :], mask=known, other=0.0), 1)
    value = tl.cumsum(change, 0) + total[None, :]
    tl.store(grad + (first + i)[:, None] * HV + h[None, :], value.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def tail_kernel(a, b, c, d, bounds, N, T, SIZE_A, SIZE_B, SIZE_C, SIZE_D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows of up to four [T, SIZE] tensors that belong to no sequence. Grid: ⌈T / ROWS⌉."""
    stop = tl.load(bounds + N).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    if first + ROWS > stop:
        for row in range(tl.maximum(first, stop), tl.minimum(first + ROWS, T)):
            _zero(a, row, SIZE_A, BLOCK)
            if b is not None:
                _zero(b, row, SIZE_B, BLOCK)
            if c is not None:
                _zero(c, row, SIZE_C, BLOCK)
            if d is not None:
                _zero(d, row, SIZE_D, BLOCK)


@triton.jit
def _zero(base, row, SIZE, BLOCK: tl.constexpr):
    for begin in range(0, SIZE, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(base + row * SIZE + at, tl.zeros([BLOCK], base.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    q, k, v, g, state, out, T, H, HV, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """T decoding steps on one K×BV tile of the state, in place. Grid: B · HV · V_BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % V_BLOCKS).to(tl.int32), program // V_BLOCKS
    head, batch = row % HV, row // HV
    key_head = head // (HV // H)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    tile = state + row * K * V + (keys[:, None] * V + values[None, :])
    inside = (keys < K)[:, None] & (values < V)[None, :]
    current = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    for t in range(0, T):
        token = batch * T + t
        if GATE == 2:
            current *= tl.exp(tl.load(g + token * HV + head).to(tl.float32))
        elif GATE == 1:
            current *= tl.exp(tl.load(g + head).to(tl.float32))
        key = tl.load(k + (token * H + key_head) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(v + (token * HV + head) * V + values, mask=values < V, other=0.0).to(tl.float32)
        query = tl.load(q + (token * H + key_head) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        current += key[:, None] * value[None, :]
        result = tl.sum(current * query[:, None], 0) * scale
        tl.store(out + (token * HV + head) * V + values, result.to(out.dtype.element_ty), mask=values < V)
    tl.store(tile, current, mask=inside)
