"""The Triton kernels that turn what the walks left behind into gradients, for a gate per head or none.

Arguments as in `triton_kernels.py`. Products over keys and values are cut into tiles of BK and BV; everything [BK, 64]
is turned: rows are channels, columns the chunk's tokens.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import EPS, L, chunk_rows, column, mm_add, put, put_column, tile


@triton.jit
def _token_gates(ahead, behind, through):
    """From the gradients of e^(sums from the chunk's start) and e^(sums to its end) those of each token's gate."""
    i = tl.arange(0, L)
    return tl.sum(tl.where(i[None, :] >= i[:, None], ahead[None, :], behind[None, :]), 1) + through


@triton.jit(do_not_specialize=["T", "slots"])
def gradient_kernel(
    q, k, d_o, du, v_new, states, d_states, pair, beta, gates, q_norm, k_norm, from_v, dq, dk, dv, dg, d_beta,
    parts, chunks, T, slots, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VB: tl.constexpr, GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, FUSED: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, for BK key columns.

    FUSED: one tile holds all keys and no key head is shared, so that norms and gates can be finished here. Otherwise
    dq, dk are those of the normalised q and k, for every value head, and `parts` [tiles, 4, slots, 64] gets what
    `gates_kernel` sums.
    """
    slot = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k0 = part * BK
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ii, jj = i[:, None], i[None, :]
    at_k, at_v = (row0 * H + h // (HV // H)) * K, (row0 * HV + h) * V
    factor = column(beta + row0 * HV + h, rows, HV)
    one = tl.full((L,), 1.0, tl.float32)
    norm_q, norm_k, grow, rest, whole = one, one, one, one, 1.0
    if NORMALISE:
        norm_q = tl.load(q_norm + slot * L + i)
        norm_k = tl.load(k_norm + slot * L + i)
    if GATE:
        gate = tl.load(gates + slot * L + i)
        last = tl.load(gates + slot * L + L - 1)
        grow, rest, whole = tl.exp2(gate), tl.exp2(last - gate), tl.exp2(last)
        decay = tl.exp2(tl.where(ii >= jj, gate[:, None] - gate[None, :], float("-inf")))
    else:
        decay = tl.where(ii >= jj, 1.0, 0.0)
    # the pairs of tokens: gradients of the scores and of N
    d_scores = tl.zeros((L, L), dtype=tl.float32)
    d_lower = tl.zeros((L, L), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        new = tl.trans(tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK))
        inner = tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        d_scores = mm_add(tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK), new, d_scores, PRECISION)
        d_lower = mm_add(inner, new, d_lower, PRECISION)
        if k0 == 0:
            put(dv + at_v + v0, inner.to(tl.float32) * factor[:, None], HV * V, rows, V - v0, L, BV, MASK)
    products = tile(pair + slot * L * L, L, L, L, L, L, False).to(tl.float32) * d_scores
    diagonal = tl.sum(tl.where(ii == jj, products, 0.0), 1)  # no gate reaches it, and it may be much larger
    products = tl.where(ii > jj, products, 0.0)
    along_q, across = tl.sum(products, 1), tl.sum(products, 0)
    d_scores *= decay * scale
    d_lower = tl.where(ii > jj, d_lower * -decay, 0.0)
    products = tl.zeros((L, L), dtype=tl.float32)
    for k1 in tl.static_range(0, K, BK):
        key = tile(k + at_k + k1, H * K, rows, K - k1, L, BK, MASK)
        products = mm_add(key, tl.trans(key), products, PRECISION)
    products *= d_lower * (norm_k[:, None] * norm_k[None, :])
    along_k = tl.sum(products, 1)
    across += tl.sum(products * factor[:, None], 0)
    narrow = k.dtype.element_ty
    to_row_q = tl.trans((d_scores * norm_k[None, :]).to(narrow))
    to_column_q = (d_scores * norm_q[:, None]).to(narrow)
    to_row_k = tl.trans((d_lower * (factor[:, None] * norm_k[None, :])).to(narrow))
    to_column_k = (d_lower * (factor * norm_k)[:, None]).to(narrow)
    # queries, through the state at the chunk's start
    at, at_state = (row0 * HV + h) * K + k0, slot * K * V + k0
    grad = tl.zeros((BK, L), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        state = tl.trans(tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK))
        outer = tl.trans(tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK))
        grad = mm_add(state, outer, grad, PRECISION)
    grad *= (grow * scale)[None, :]
    query = tile(q + at_k + k0, H * K, rows, K - k0, L, BK, MASK)
    key = tile(k + at_k + k0, H * K, rows, K - k0, L, BK, MASK)
    wide = tl.trans(query).to(tl.float32)
    ahead = tl.sum(grad * wide, 0) * norm_q
    grad = mm_add(tl.trans(key), to_row_q, grad, PRECISION)
    if NORMALISE and FUSED:
        grad = grad * norm_q[None, :] - wide * ((ahead + along_q + diagonal) * norm_q * norm_q)[None, :]
    put(dq + at, tl.trans(grad.to(dq.dtype.element_ty)), HV * K, rows, K - k0, L, BK, MASK)
    # keys, through both states
    grad = tl.zeros((BK, L), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        state = tl.trans(tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK))
        inner = tl.trans(tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK))
        grad = mm_add(state, inner, grad, PRECISION)
    grad *= -grow[None, :]
    wide = tl.trans(key).to(tl.float32)
    d_factor = tl.sum(grad * wide, 0) * norm_k
    grad *= factor[None, :]
    grad = mm_add(tl.trans(key), to_row_k, grad, PRECISION)
    grad = mm_add(tl.trans(key), to_column_k, grad, PRECISION)
    grad = mm_add(tl.trans(query), to_column_q, grad, PRECISION)
    from_end = tl.zeros((BK, L), dtype=tl.float32)
    through = 0.0
    for v0 in tl.static_range(0, V, BV):
        d_state = tile(d_states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        if GATE:
            state = tile(states + at_state + v0 * K, K, V - v0, K - k0, BV, BK, MASK).to(tl.float32)
            through += tl.sum(tl.sum(state * d_state.to(tl.float32), 1), 0)
        new = tl.trans(tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK))
        from_end = mm_add(tl.trans(d_state), new, from_end, PRECISION)
    from_end *= rest[None, :]
    wide = tl.trans(tile(k + at_k + k0, H * K, rows, K - k0, L, BK, MASK)).to(tl.float32)
    behind = tl.sum(from_end * wide, 0) * norm_k
    grad += from_end
    if NORMALISE and FUSED:
        along = factor * (d_factor + along_k) + behind + across + diagonal
        grad = grad * norm_k[None, :] - wide * (along * norm_k * norm_k)[None, :]
    put(dk + at, tl.trans(grad.to(dk.dtype.element_ty)), HV * K, rows, K - k0, L, BK, MASK)
    # gates and β
    once = tl.where(part == 0, 1.0, 0.0)
    d_factor += along_k * once
    ahead += factor * d_factor + (along_q - across) * once
    for block in tl.static_range(VB):
        d_factor += tl.load(from_v + (block * slots + slot) * L + i) * once
    through *= whole
    if FUSED:
        put_column(d_beta + row0 * HV + h, d_factor, rows, HV)
        if GATE:
            put_column(dg + row0 * HV + h, _token_gates(ahead, behind, through), rows, HV)
    else:
        at = parts + (part.to(tl.int64) * 4 * slots + slot) * L + i
        tl.store(at, ahead)
        tl.store(at + slots * L, behind)
        tl.store(at + 2 * slots * L, d_factor)
        tl.store(at + 3 * slots * L, one * through)


@triton.jit(do_not_specialize=["T", "slots"])
def gates_kernel(
    parts, dg, d_beta, chunks, T, slots,
    HV: tl.constexpr, TILES: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sum what the tiles of keys found about the gates and β."""
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ahead = tl.zeros((L,), dtype=tl.float32)
    behind, d_factor, through = ahead, ahead, ahead
    for part in tl.static_range(TILES):
        at = parts + (part * 4 * slots + slot) * L + i
        d_factor += tl.load(at + 2 * slots * L)
        if GATE == 1:
            ahead += tl.load(at)
            behind += tl.load(at + slots * L)
            through += tl.load(at + 3 * slots * L)
    put_column(d_beta + row0 * HV + h, d_factor, rows, HV)
    if GATE == 1:
        put_column(dg + row0 * HV + h, _token_gates(ahead, behind, through), rows, HV)


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
