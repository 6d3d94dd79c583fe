"""Device code for the gated decay recurrence; `triton_impl` launches it and explains how the pieces combine.

Inside a chunk the pairs j < i are split by binary levels as in `torch_impl`: the pairs of level s meet at the last row
m of the first half of a block of 2s rows, and exp(G_i − G_j) = exp(−|G_i − G_m|) · exp(−|G_m − G_j|), both ≤ 1. Every
matrix product is C×C or C×BLOCK with C = BLOCK = 64; other widths are padded with zeros. `place` arguments of a chunk
kernel: table [slots,2] and bounds [N+1] for packed input (else None), T, CHUNKS per sequence, H.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(slot, table, bounds, T, CHUNKS, C: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, chunk number inside it, first token, tokens) of a chunk slot; no tokens in an unused slot."""
    if PACKED:
        sequence = tl.load(table + slot * 2).to(tl.int64)
        local = tl.load(table + slot * 2 + 1).to(tl.int64)
        used = sequence >= 0
        sequence = tl.maximum(sequence, 0)
        first = tl.load(bounds + sequence).to(tl.int64) + local * C
        stop = tl.load(bounds + sequence + 1).to(tl.int64)
        count = tl.where(used, tl.minimum(stop - first, C), 0)
    else:
        sequence = slot // CHUNKS
        local = slot % CHUNKS
        first = sequence * T + local * C
        count = tl.minimum(T - local * C, C).to(tl.int64)
    return sequence, local, first, count


@triton.jit
def _rows(base, first, count, head, H, rows, columns, D: tl.constexpr):
    """Load rows of a [tokens, H, D] tensor, zero outside the chunk or beyond D: [len(rows), len(columns)].

    Only the chunk's origin is a 64-bit offset; inside a chunk 32 bits suffice and save registers.
    """
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < D)[None, :]
    origin = base + (first * H + head) * D
    return tl.load(origin + (rows[:, None] * (H * D) + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_rows(base, value, first, count, head, H, rows, columns, D: tl.constexpr):
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = base + (first * H + head) * D + (rows[:, None] * (H * D) + columns[None, :])
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def cumulate_kernel(
    g, sums, table, bounds, T, CHUNKS, H,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """sums_t = g_first + … + g_t inside each chunk. Grid: slots · H · BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, slot = row % H, row // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    gates = _rows(g, first, count, head, H, rows, columns, D).to(sums.dtype.element_ty)
    _store_rows(sums, tl.cumsum(gates, 0), first, count, head, H, rows, columns, D)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def carry_kernel(
    x, y, gx, gy, initial, states, final, bounds, first_slots, T, CHUNKS, H, scale,
    K: tl.constexpr, V: tl.constexpr, K_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry one K×V tile over the chunks of a sequence, storing it before each. Grid: N · H · K_BLOCKS · V_BLOCKS.

    Forward (x = k, y = v): S ← decay · S + Σ_t to_end(k_t) to_end(v_t)ᵀ. REVERSE (x = q, y = do): the same from the
    last chunk to the first, with the decay from the chunk's start. `gx`, `gy` are running sums, or None.
    """
    program = tl.program_id(0).to(tl.int64)
    y_block, x_block = (program % V_BLOCKS).to(tl.int32), (program // V_BLOCKS % K_BLOCKS).to(tl.int32)
    row = program // V_BLOCKS // K_BLOCKS
    head, sequence = row % H, row // H
    rows = tl.arange(0, C)
    x_columns = x_block * BLOCK + tl.arange(0, BLOCK)
    y_columns = y_block * BLOCK + tl.arange(0, BLOCK)
    tile = x_columns[:, None] * V + y_columns[None, :]
    tile_inside = (x_columns < K)[:, None] & (y_columns < V)[None, :]
    if PACKED:
        start = tl.load(bounds + sequence).to(tl.int64)
        length = tl.load(bounds + sequence + 1).to(tl.int64) - start
        slot = tl.load(first_slots + sequence).to(tl.int64)
    else:
        start = sequence * T
        length = T.to(tl.int64)
        slot = sequence * CHUNKS
    chunks = (length + C - 1) // C
    state = tl.zeros([BLOCK, BLOCK], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * K * V + tile, mask=tile_inside, other=0.0).to(tl.float32)
    for step in range(0, chunks):
        local = step
        if REVERSE:
            local = chunks - 1 - step
        first = start + local * C
        count = tl.minimum(length - local * C, C)
        tl.store(states + ((slot + local) * H + head) * K * V + tile, state, mask=tile_inside)
        xs = _rows(x, first, count, head, H, rows, x_columns, K).to(tl.float32)
        ys = _rows(y, first, count, head, H, rows, y_columns, V).to(tl.float32)
        if gx is not None:
            sums = _rows(gx, first, count, head, H, rows, x_columns, K)
            last = tl.load(gx + ((first + count - 1) * H + head) * K + x_columns, mask=x_columns < K, other=0.0)
            state *= tl.exp(last.to(tl.float32))[:, None]
            xs *= tl.exp((sums if REVERSE else last[None, :] - sums).to(tl.float32))
        if gy is not None:
            sums = _rows(gy, first, count, head, H, rows, y_columns, V)
            last = tl.load(gy + ((first + count - 1) * H + head) * V + y_columns, mask=y_columns < V, other=0.0)
            state *= tl.exp(last.to(tl.float32))[None, :]
            ys *= tl.exp((sums if REVERSE else last[None, :] - sums).to(tl.float32))
        state += _dot(tl.trans(xs), ys, DOT, PRECISION) * scale
    tl.store(final + row * K * V + tile, state, mask=tile_inside)


@triton.jit
def _middle(rows, level):
    """Last row of the first half of each row's block of 2^(level+1) rows."""
    return ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def pair_kernel(
    x, y, g, weights, table, bounds, T, CHUNKS, H, scale,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights[i,j] = scale · Σ_d x_i y_j exp(G_i − G_j) for j ≤ i, else 0. Grid: slots · H."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % H, program // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for block in range(0, BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        xs = _rows(x, first, count, head, H, rows, columns, D).to(tl.float32)
        ys = _rows(y, first, count, head, H, rows, columns, D).to(tl.float32)
        diagonal += tl.sum(xs * ys, 1)
        if g is None:
            total += _dot(xs, tl.trans(ys), DOT, PRECISION)
        else:
            sums = _rows(g, first, count, head, H, rows, columns, D)
            for level in range(0, LEVELS):
                middle = _rows(g, first, count, head, H, _middle(rows, level), columns, D)
                factor = tl.exp(-tl.abs(sums - middle).to(tl.float32))
                second = ((rows >> level) & 1)[:, None] == 1
                part = _dot(
                    tl.where(second, xs * factor, 0.0), tl.trans(tl.where(second, 0.0, ys * factor)), DOT, PRECISION
                )
                same = (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]
                total += tl.where(same, part, 0.0)
    total = tl.where(rows[:, None] > rows[None, :], total, 0.0)
    total = tl.where(rows[:, None] == rows[None, :], diagonal[:, None], total) * scale
    place = weights + program * C * C + (rows[:, None] * C + rows[None, :])
    tl.store(place, total.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def combine_kernel(
    weights, x, y, gx, gy, states, partner, out, flow, table, bounds, T, CHUNKS, H, scale,
    X: tl.constexpr, Y: tl.constexpr, X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of o, dq, dk or dv. Grid: slots · H · Y_BLOCKS.

    out_i = Σ_{j≤i} weights[i,j] y_j exp(Gy_i − Gy_j) + scale · exp(Gy_i) ⊙ Sᵀ (x_i exp(Gx_i)), S [X,Y] at the start
    of the chunk. REVERSE: out_j = Σ_{i≥j} weights[i,j] y_i exp(Gy_i − Gy_j) + …, S the gradient at the chunk's end,
    with decays to it. TRANSPOSED: `states` are stored [Y,X]. `flow` (or None) gets the gate's share: partner ⊙ (out
    without the term j = i).
    """
    program = tl.program_id(0).to(tl.int64)
    y_block, row = (program % Y_BLOCKS).to(tl.int32), program // Y_BLOCKS
    head, slot = row % H, row // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    y_columns = y_block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([C, BLOCK], tl.float32)
    for block in range(0, X_BLOCKS):
        x_columns = block * BLOCK + tl.arange(0, BLOCK)
        xs = _rows(x, first, count, head, H, rows, x_columns, X).to(tl.float32)
        if gx is not None:
            sums = _rows(gx, first, count, head, H, rows, x_columns, X)
            if REVERSE:
                sums = _rows(gx, first, count, head, H, rows * 0 + (count - 1).to(tl.int32), x_columns, X) - sums
            xs *= tl.exp(sums.to(tl.float32))
        base = states + row * X * Y
        if TRANSPOSED:
            inside = (y_columns < Y)[:, None] & (x_columns < X)[None, :] & (count > 0)
            state = tl.trans(tl.load(base + (y_columns[:, None] * X + x_columns[None, :]), mask=inside, other=0.0))
        else:
            inside = (x_columns < X)[:, None] & (y_columns < Y)[None, :] & (count > 0)
            state = tl.load(base + (x_columns[:, None] * Y + y_columns[None, :]), mask=inside, other=0.0)
        total += _dot(xs, state, DOT, PRECISION)
    total *= scale
    place = weights + row * C * C + (rows[:, None] * C + rows[None, :])
    pairs = tl.load(place, mask=rows[:, None] > rows[None, :], other=0.0)
    if REVERSE:
        pairs = tl.trans(pairs)
    if gy is None:
        total += _dot(pairs, _rows(y, first, count, head, H, rows, y_columns, Y), DOT, PRECISION)
    else:
        sums = _rows(gy, first, count, head, H, rows, y_columns, Y)
        if REVERSE:
            last = _rows(gy, first, count, head, H, rows * 0 + (count - 1).to(tl.int32), y_columns, Y)
            total *= tl.exp((last - sums).to(tl.float32))
        else:
            total *= tl.exp(sums.to(tl.float32))
        for level in range(0, LEVELS):
            middle = _rows(gy, first, count, head, H, _middle(rows, level), y_columns, Y)
            factor = tl.exp(-tl.abs(sums - middle).to(tl.float32))
            target = ((rows >> level) & 1)[:, None] == (0 if REVERSE else 1)
            same = (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]
            ys = _rows(y, first, count, head, H, rows, y_columns, Y).to(tl.float32)
            part = _dot(tl.where(same, pairs, 0.0), tl.where(target, 0.0, ys * factor), DOT, PRECISION)
            total += tl.where(target, part * factor, 0.0)
    if flow is not None:
        mate = _rows(partner, first, count, head, H, rows, y_columns, Y).to(tl.float32)
        _store_rows(flow, mate * total, first, count, head, H, rows, y_columns, Y)
    if out is not None:
        diagonal = tl.load(weights + row * C * C + rows * (C + 1)).to(tl.float32)
        ys = _rows(y, first, count, head, H, rows, y_columns, Y).to(tl.float32)
        _store_rows(out, total + diagonal[:, None] * ys, first, count, head, H, rows, y_columns, Y)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def gate_grad_kernel(
    gained, lost, states, ends, initial_grad, grad, table, bounds, T, CHUNKS, H,
    D: tl.constexpr, OTHER: tl.constexpr, BLOCKS: tl.constexpr, OTHER_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """dg_t = Σ_other S ⊙ dS at the chunk's start + Σ_{s<t in the chunk} (gained_s − lost_s). Grid: slots · H · BLOCKS.

    Every term passes through at least one gate, so nothing large cancels. States are [D,OTHER], TRANSPOSED [OTHER,D].
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, slot = row % H, row // H
    sequence, local, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.arange(0, BLOCK)
    boundary = tl.zeros([BLOCK], tl.float32)
    for other_block in range(0, OTHER_BLOCKS):
        wide = other_block * BLOCK + others
        if TRANSPOSED:
            tile = wide[None, :] * D + columns[:, None]
        else:
            tile = columns[:, None] * OTHER + wide[None, :]
        inside = (columns < D)[:, None] & (wide < OTHER)[None, :] & (count > 0)
        state = tl.load(states + row * D * OTHER + tile, mask=inside, other=0.0)
        earlier = tl.load(ends + (row - H) * D * OTHER + tile, mask=inside & (local > 0), other=0.0)
        initial = tl.load(
            initial_grad + (sequence * H + head) * D * OTHER + tile, mask=inside & (local == 0), other=0.0
        )
        boundary += tl.sum(state * (earlier + initial), 1)
    change = _rows(gained, first, count, head, H, rows - 1, columns, D)
    change -= _rows(lost, first, count, head, H, rows - 1, columns, D)
    _store_rows(grad, tl.cumsum(change, 0) + boundary[None, :], first, count, head, H, rows, columns, D)


@triton.jit(do_not_specialize=["T", "H"])
def step_kernel(
    q, k, v, g, gv, state, out, T, H, scale,
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
        if g is not None:
            current *= tl.exp(tl.load(g + token * K + keys, mask=keys < K, other=0.0).to(tl.float32))[:, None]
        if gv is not None:
            current *= tl.exp(tl.load(gv + token * V + values, mask=values < V, other=0.0).to(tl.float32))[None, :]
        key = tl.load(k + token * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(v + token * V + values, mask=values < V, other=0.0).to(tl.float32)
        query = tl.load(q + token * K + keys, mask=keys < K, other=0.0).to(tl.float32) * scale
        current += key[:, None] * value[None, :]
        result = tl.sum(current * query[:, None], 0)
        tl.store(out + token * V + values, result.to(out.dtype.element_ty), mask=values < V)
    tl.store(tile, current.to(state.dtype.element_ty), mask=inside)
