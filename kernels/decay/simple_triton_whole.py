"""Device code for one decay per head where a head's whole state [K, V] fits in the registers of one program.

One program reads every token of a head once, and one pass gives the gradients of keys and values together. Outputs are
made transposed, [width, C]: eight warps need 128 rows to share. `simple_triton` launches this and explains how the
passes combine; legend in `simple_triton_kernels`.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.simple_triton_kernels import _constant, _load, _span, _store, _weights


@triton.jit
def _decays(g, constant, first, sequence, count, head, slots, i, C: tl.constexpr, GATE: tl.constexpr):
    """Of a chunk: (sums of log2 gates to each token, decays from its start, decays to its end, decay over it).

    Read as one tile of four columns: loads of single columns would be made anew in every layout that needs them.
    """
    if GATE == 2:
        row = g + (head * slots + first // C + sequence) * (4 * C)
        tile = tl.load(row + i[:, None] * 4 + tl.arange(0, 4)[None, :])
        sums_end, start_whole = tl.split(tl.reshape(tile, (C, 2, 2)))
        sums, to_end = tl.split(sums_end)
        to_start, _ = tl.split(start_whole)
        whole = tl.load(row + 3)
        return sums, to_start.to(tl.float32), to_end.to(tl.float32), whole.to(tl.float32)
    elif GATE == 1:
        sums = tl.minimum(i + 1, count).to(tl.float32) * constant
        total = count.to(tl.float32) * constant
        return sums, tl.exp2(sums), tl.exp2(total - sums), tl.exp2(total)
    else:
        return 0.0, 0.0, 0.0, 0.0


@triton.jit
def _aligned(range, n, SIZE: tl.constexpr):
    """A range as it is, made anew in every turn of a loop: the compiler would keep what it gives in registers."""
    return tl.max_contiguous(tl.multiple_of(range + tl.minimum(n, 0), SIZE), SIZE)


@triton.jit(do_not_specialize=["T", "PIECES", "LENGTH", "tokens", "slots", "H", "HV"])
def whole_kernel(
    x, y, z, g, partner, initial, final, out, flow, states, boundary, table, bounds,
    T, PIECES, LENGTH, tokens, slots, H, HV, scale, start_scale, end_scale,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, RESET: tl.constexpr,
    GATE: tl.constexpr, TRANSPOSED: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`stream_kernel` forwards: o from (q, k, v), TRANSPOSED dq from (do, v, k). Grid: spans · HV.

    For gate gradients, else None: `partner` [tokens, heads of z, Z], whose product with what out has from the state
    goes to `flow` [HV, tokens]; `states` [.., HV, Z, X], of which the sum of products with the state goes to
    `boundary` [.., HV], every RESET chunks.
    """
    row = tl.program_id(0).to(tl.int64)
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
    zs = tl.arange(0, BZ)
    inside = (zs < Z)[:, None] & (xs < X)[None, :]
    if TRANSPOSED:
        tile = zs[:, None] * X + xs[None, :]
    else:
        tile = xs[None, :] * Z + zs[:, None]
    state = tl.zeros([BZ, BX], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * X * Z + tile, mask=inside, other=0.0).to(tl.float32) * start_scale
    chunks = ((count + C - 1) // C).to(tl.int32)
    if states is not None:  # noqa: SIM102 (the first part is known to the compiler)
        if chunks > 0:
            place = (first // (C * RESET) + sequence) * HV + head
            stored = tl.load(states + place * X * Z + tile, mask=inside, other=0.0)
            tl.store(boundary + place, tl.sum(stored.to(tl.float32) * state) * scale)
    for step in tl.range(0, chunks, num_stages=STAGES):
        here = first + step * C
        n = tl.minimum(count - step * C, C).to(tl.int32)
        x_tile = _load(x, here, n, x_head, x_heads, i, xs, X, BX).to(DOT)
        y_tile = _load(y, here, n, x_head, x_heads, i, xs, X, BX).to(DOT)
        z_tile = _load(z, here, n, z_head, z_heads, i, zs, Z, BZ).to(DOT)
        sums, to_start, to_end, whole = _decays(g, constant, here, sequence, n, head, slots, i, C, GATE)
        pairs = tl.zeros([C, C], tl.float32)
        if n > 0:  # always: keeps this product apart from the next ones, or all warps would share their rows
            pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        pairs *= _weights(sums, constant, i, n, GATE, False, False)
        pairs = tl.trans(pairs.to(DOT))
        result = tl.dot(state.to(DOT), tl.trans(x_tile), input_precision=PRECISION)  # [Z, C]
        if GATE > 0:
            result *= to_start[None, :]
        if partner is not None:
            mate = _load(partner, here, n, z_head, z_heads, i, zs, Z, BZ).to(DOT)
            products = tl.dot(mate, result.to(DOT), input_precision=PRECISION)
            change = tl.sum(tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), products, 0.0), 1)
            tl.store(flow + head * tokens + here + i, change * scale, mask=i < n)
        z_turned = tl.trans(z_tile)
        if GATE > 0:
            z_turned = (z_turned.to(tl.float32) * to_end[None, :]).to(DOT)
            state *= whole
        state = tl.dot(z_turned, y_tile, state, input_precision=PRECISION)
        result = tl.dot(tl.trans(z_tile), pairs, result, input_precision=PRECISION)
        _store(out, tl.trans(result * scale), here, n, head, HV, i, zs, Z, BZ)
        if states is not None:  # noqa: SIM102
            if ((step + 1) % RESET == 0) & (step + 1 < chunks):
                rows, columns = _aligned(zs, n, BZ), _aligned(xs, n, BX)
                place = ((here + C) // (C * RESET) + sequence) * HV + head
                at = states + place * X * Z + (rows[:, None] * X + columns[None, :])
                stored = tl.load(at, mask=(rows < Z)[:, None] & (columns < X)[None, :], other=0.0)
                tl.store(boundary + place, tl.sum(stored.to(tl.float32) * state) * scale)
    if final is not None:
        tl.store(final + row * X * Z + tile, state * end_scale, mask=inside)


@triton.jit(do_not_specialize=["T", "PIECES", "LENGTH", "tokens", "slots", "H", "HV"])
def keys_values_kernel(
    q, k, v, g, out_grad, initial, final, k_grad, v_grad, flow, states, table, bounds,
    T, PIECES, LENGTH, tokens, slots, H, HV, scale, start_scale, end_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, RESET: tl.constexpr,
    GATE: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last token to the first, with dS, the gradient of the state, in registers; w decays from j to i:

        dv_j = scale · (Σ_{i≥j} (k_j·q_i) w_ij do_i + dSᵀ k_j)
        dk_j = scale · (Σ_{i≥j} (v_j·do_i) w_ij q_i + dS v_j)

    Grid: spans · HV. `initial` and `final` (or None): [spans, HV, K, V], times start_scale and end_scale. For gate
    gradients, else None: `flow` [HV, tokens], what a token wrote that others read, less what it read in this chunk;
    `states` [.., HV, K, V]: dS before every RESET-th chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    head, slot = row % HV, row // HV
    sequence, first, count = _span(slot, table, bounds, T, PIECES, LENGTH)
    key_head = head // (HV // H)
    constant = _constant(g, head, GATE)
    i = tl.arange(0, C)
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    tile = ks[:, None] * V + vs[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * K * V + tile, mask=inside, other=0.0).to(tl.float32) * start_scale
    chunks = ((count + C - 1) // C).to(tl.int32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        local = chunks - 1 - step
        here = first + local * C
        n = tl.minimum(count - local * C, C).to(tl.int32)
        q_tile = _load(q, here, n, key_head, H, i, ks, K, BK).to(DOT)
        k_tile = _load(k, here, n, key_head, H, i, ks, K, BK).to(DOT)
        v_tile = _load(v, here, n, head, HV, i, vs, V, BV).to(DOT)
        o_tile = _load(out_grad, here, n, head, HV, i, vs, V, BV).to(DOT)
        sums, to_start, to_end, whole = _decays(g, constant, here, sequence, n, head, slots, i, C, GATE)
        written = tl.zeros([C, C], tl.float32)
        read = tl.zeros([C, C], tl.float32)
        if n > 0:  # always: see `whole_kernel`
            written = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            read = tl.dot(v_tile, tl.trans(o_tile), input_precision=PRECISION)
        weights = _weights(sums, constant, i, n, GATE, True, False)
        written *= weights
        if flow is not None:
            met = tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), 0.0, written * read)
            change = tl.sum(met, 1) - tl.sum(met, 0)
        written = tl.trans(written.to(DOT))
        read = tl.trans((read * weights).to(DOT))
        narrow = state.to(DOT)
        k_part = tl.dot(narrow, tl.trans(v_tile), input_precision=PRECISION)  # [K, C]
        if GATE > 0:
            k_part *= to_end[None, :]
        if flow is not None:
            products = tl.dot(k_tile, k_part.to(DOT), input_precision=PRECISION)
            change += tl.sum(tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), products, 0.0), 1)
            tl.store(flow + head * tokens + here + i, change * scale, mask=i < n)
        q_turned = tl.trans(q_tile)
        if GATE > 0:
            q_turned = (q_turned.to(tl.float32) * to_start[None, :]).to(DOT)
            state *= whole
        state = tl.dot(q_turned, o_tile, state, input_precision=PRECISION)
        k_part = tl.dot(tl.trans(q_tile), read, k_part, input_precision=PRECISION)
        _store(k_grad, tl.trans(k_part * scale), here, n, head, HV, i, ks, K, BK)
        v_part = tl.dot(tl.trans(narrow), tl.trans(k_tile), input_precision=PRECISION)  # [V, C]
        if GATE > 0:
            v_part *= to_end[None, :]
        v_part = tl.dot(tl.trans(o_tile), written, v_part, input_precision=PRECISION)
        _store(v_grad, tl.trans(v_part * scale), here, n, head, HV, i, vs, V, BV)
        if states is not None:  # noqa: SIM102
            if local % RESET == 0:
                rows, columns = _aligned(ks, n, BK), _aligned(vs, n, BV)
                place = (here // (C * RESET) + sequence) * HV + head
                at = states + place * K * V + (rows[:, None] * V + columns[None, :])
                tl.store(at, state.to(states.dtype.element_ty), mask=(rows < K)[:, None] & (columns < V)[None, :])
    if final is not None:
        tl.store(final + row * K * V + tile, state * end_scale, mask=inside)
