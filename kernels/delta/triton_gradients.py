"""The Triton kernels that turn what the walks left behind into gradients, for a gate per head or none.

Arguments as in `triton_kernels.py`. Products over keys and values are cut into tiles of BK and BV.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import EPS, L, chunk_rows, column, mm_add, put, put_column, tile


@triton.jit(do_not_specialize=["T", "slots"])
def pair_gradient_kernel(
    k, v, d_o, du, v_new, pair, beta, gates, q_norm, k_norm, dv, weights, sums, chunks, T, slots, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What passes through the pairs of a chunk's tokens, and dv.

    `weights` [3, slots, 64, 64]: dq = W₀ k, dk = W₁ᵀ q + W₂ k. `sums` [5, slots, 64]: the pairs' shares of the gates
    (rows of the scores, columns of both), of β, the diagonal, which no gate reaches and which may be much larger, X·v.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ii, jj = i[:, None], i[None, :]
    k += (row0 * H + h // (HV // H)) * K
    at_v = (row0 * HV + h) * V
    factor = column(beta + row0 * HV + h, rows, HV)
    d_scores = tl.zeros((L, L), dtype=tl.float32)
    d_lower = tl.zeros((L, L), dtype=tl.float32)
    from_v = tl.zeros((L,), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        new = tl.trans(tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK))
        d_scores = mm_add(tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK), new, d_scores, PRECISION)
        inner = tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        d_lower = mm_add(inner, new, d_lower, PRECISION)
        value = tile(v + at_v + v0, HV * V, rows, V - v0, L, BV, MASK).to(tl.float32)
        from_v += tl.sum(inner.to(tl.float32) * value, 1)
        put(dv + at_v + v0, inner.to(tl.float32) * factor[:, None], HV * V, rows, V - v0, L, BV, MASK)
    products = tile(pair + slot * L * L, L, L, L, L, L, False).to(tl.float32) * d_scores
    sums += slot * L + i
    tl.store(sums + 4 * slots * L, from_v)
    tl.store(sums + 3 * slots * L, tl.sum(tl.where(ii == jj, products, 0.0), 1))
    products = tl.where(ii > jj, products, 0.0)
    tl.store(sums, tl.sum(products, 1))
    across = tl.sum(products, 0)
    if GATE:
        gate = tl.load(gates + slot * L + i)
        decay = tl.exp2(tl.where(ii >= jj, gate[:, None] - gate[None, :], float("-inf")))
    else:
        decay = tl.where(ii >= jj, 1.0, 0.0)
    norm_q, norm_k = _norms(q_norm, k_norm, slot, NORMALISE)
    weights += slot * L * L
    d_scores *= decay * scale
    put(weights, d_scores * norm_k[None, :], L, L, L, L, L, False)
    put(weights + slots * L * L, d_scores * norm_q[:, None], L, L, L, L, L, False)
    d_lower = tl.where(ii > jj, d_lower * -decay, 0.0)
    products = tl.zeros((L, L), dtype=tl.float32)
    for k0 in tl.static_range(0, K, BK):
        key = tile(k + k0, H * K, rows, K - k0, L, BK, MASK)
        products = mm_add(key, tl.trans(key), products, PRECISION)
    products *= d_lower * (norm_k[:, None] * norm_k[None, :])
    tl.store(sums + 2 * slots * L, tl.sum(products, 1))
    tl.store(sums + slots * L, across + tl.sum(products * factor[:, None], 0))
    d_lower *= factor[:, None]
    put(weights + 2 * slots * L * L, (d_lower + tl.trans(d_lower)) * norm_k[None, :], L, L, L, L, L, False)


@triton.jit
def _norms(q_norm, k_norm, slot, NORMALISE: tl.constexpr):
    i = tl.arange(0, L)
    query = tl.full((L,), 1.0, tl.float32)
    key = query
    if NORMALISE:
        query = tl.load(q_norm + slot * L + i)
        key = tl.load(k_norm + slot * L + i)
    return query, key


@triton.jit(do_not_specialize=["T", "slots"])
def key_gradient_kernel(
    q, k, d_o, du, v_new, states, d_states, weights, beta, gates, q_norm, k_norm, sums, dq, dk, parts, chunks, T, slots,
    scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, FUSED: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of BK key columns, and their shares of the gates and of β.

    `parts` [tiles, 4, slots, 64]: what the decays from the chunk's start and to its end receive, β, the whole decay.
    FUSED: one tile holds all keys and no key head is shared, so that norms can be finished here. Otherwise dq and dk
    are those of the normalised q and k, for every value head.
    """
    part = tl.program_id(0) % ((K + BK - 1) // BK)
    slot = (tl.program_id(0) // ((K + BK - 1) // BK)).to(tl.int64)
    k0 = part * BK
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    at_k, at_v = (row0 * H + h // (HV // H)) * K + k0, (row0 * HV + h) * V
    at, at_state = (row0 * HV + h) * K + k0, slot * K * V + k0
    weights += slot * L * L
    parts += (part.to(tl.int64) * 4 * slots + slot) * L + i
    sums += slot * L + i
    norm_q, norm_k = _norms(q_norm, k_norm, slot, NORMALISE)
    grow = tl.full((L,), 1.0, tl.float32)
    rest = grow
    if GATE:
        through = 0.0
        for v0 in tl.static_range(0, V, BV):
            state = tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK).to(tl.float32)
            ending = tile(d_states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK).to(tl.float32)
            through += tl.sum(tl.sum(state * ending, 1), 0)
        gate = tl.load(gates + slot * L + i)
        last = tl.load(gates + slot * L + L - 1)
        grow, rest = tl.exp2(gate), tl.exp2(last - gate)
        tl.store(parts + 3 * slots * L, tl.zeros((L,), dtype=tl.float32) + through * tl.exp2(last))
    grad = tl.zeros((L, BK), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        outer = tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        state = tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        grad = mm_add(outer, state, grad, PRECISION)
    grad *= (grow * scale)[:, None]
    query = tile(q + at_k, H * K, rows, K - k0, L, BK, MASK)
    key = tile(k + at_k, H * K, rows, K - k0, L, BK, MASK)
    ahead = tl.sum(grad * query.to(tl.float32), 1) * norm_q
    tl.store(parts, ahead)
    grad = mm_add(tile(weights, L, L, L, L, L, False), key, grad, PRECISION)
    if NORMALISE and FUSED:
        along = ahead + tl.load(sums) + tl.load(sums + 3 * slots * L)
        grad = grad * norm_q[:, None] - query.to(tl.float32) * (along * norm_q * norm_q)[:, None]
    put(dq + at, grad, HV * K, rows, K - k0, L, BK, MASK)
    grad = tl.zeros((L, BK), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        new = tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        ending = tile(d_states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        grad = mm_add(new, ending, grad, PRECISION)
    grad *= rest[:, None]
    query = tile(q + at_k, H * K, rows, K - k0, L, BK, MASK)
    key = tile(k + at_k, H * K, rows, K - k0, L, BK, MASK)
    behind = tl.sum(grad * key.to(tl.float32), 1) * norm_k
    tl.store(parts + slots * L, behind)
    weight = tl.trans(tile(weights + slots * L * L, L, L, L, L, L, False))
    grad = mm_add(weight, query, grad, PRECISION)
    grad = mm_add(tile(weights + 2 * slots * L * L, L, L, L, L, L, False), key, grad, PRECISION)
    from_start = tl.zeros((L, BK), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        inner = tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        state = tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        from_start = mm_add(inner, state, from_start, PRECISION)
    from_start *= -grow[:, None]
    wide = tile(k + at_k, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
    d_factor = tl.sum(from_start * wide, 1) * norm_k
    tl.store(parts + 2 * slots * L, d_factor)
    factor = column(beta + row0 * HV + h, rows, HV)
    grad += from_start * factor[:, None]
    if NORMALISE and FUSED:
        along = factor * (d_factor + tl.load(sums + 2 * slots * L)) + behind
        along += tl.load(sums + slots * L) + tl.load(sums + 3 * slots * L)
        grad = grad * norm_k[:, None] - wide * (along * norm_k * norm_k)[:, None]
    put(dk + at, grad, HV * K, rows, K - k0, L, BK, MASK)


@triton.jit(do_not_specialize=["T", "slots"])
def gates_kernel(
    parts, sums, beta, dg, d_beta, chunks, T, slots,
    HV: tl.constexpr, TILES: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sum what was found about the gates and β. With channel gates β alone, all of it in `parts`."""
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    d_factor = tl.zeros((L,), dtype=tl.float32)
    for part in tl.static_range(TILES):
        d_factor += tl.load(parts + ((part * 4 + 2) * slots + slot) * L + i)
    sums += slot * L + i
    if GATE != 2:
        d_factor += tl.load(sums + 2 * slots * L)
    if GATE == 1:
        ahead = tl.load(sums) - tl.load(sums + slots * L) + d_factor * column(beta + row0 * HV + h, rows, HV)
        behind = tl.zeros((L,), dtype=tl.float32)  # of the token before
        through = behind
        for part in tl.static_range(TILES):
            at = parts + (part * 4 * slots + slot) * L + i
            ahead += tl.load(at)
            behind += tl.load(at + slots * L - 1, mask=i > 0, other=0.0)
            through += tl.load(at + 3 * slots * L)
        gate = tl.cumsum(ahead, 0, reverse=True) + tl.cumsum(behind, 0) + through
        put_column(dg + row0 * HV + h, gate, rows, HV)
    d_factor += tl.load(sums + (1 if GATE == 2 else 4) * slots * L)
    put_column(d_beta + row0 * HV + h, d_factor, rows, HV)


@triton.jit(do_not_specialize=["count"])
def norm_kernel(x, norm, count, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """norm = 1 / sqrt(Σ x² + eps) of each row, fp32."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BK)
    inside = (r < count)[:, None] & (d < K)[None, :]
    value = tl.load(x + r[:, None] * K + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + r, tl.rsqrt(tl.sum(value * value, 1) + EPS), mask=r < count)


@triton.jit(do_not_specialize=["count"])
def norm_backward_kernel(x, dy, dx, count, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BK)
    inside = (r < count)[:, None] & (d < K)[None, :]
    at = r[:, None] * K + d[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(value * value, 1) + EPS)[:, None]
    value = value * norm
    grad = norm * (grad - value * tl.sum(value * grad, 1)[:, None])
    tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
