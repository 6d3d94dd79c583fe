"""The Triton kernels that a gate per key channel needs besides the walks (KDA); the algebra is in README.md.

Pairs of tokens are split by binary levels, as in `torch_pairs.py`: at level s those whose row lies in the second half
and whose column in the first half of the same block of 2s tokens. Row i meets column j through the sum of gates at the
block's middle, and both factors are f = e^−|G − middle| ≤ 1.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import L, chunk_rows, column, mm, mm_add, put, put_solution, tile

LOG2E = tl.constexpr(1.4426950408889634)
LEVELS = tl.constexpr(6)


@triton.jit
def _level(summed, at, i, d, size, K: tl.constexpr, MASK: tl.constexpr):
    """The factors f [64, D] of one level and where its pairs stand [64, 64]; `summed` + `at` is the chunk's."""
    middle = (i // (2 * size)) * 2 * size + size - 1
    if MASK:
        here = tl.load(summed + at + i[:, None] * K + d[None, :], mask=(d < K)[None, :], other=0.0)
        there = tl.load(summed + at + middle[:, None] * K + d[None, :], mask=(d < K)[None, :], other=0.0)
    else:
        here = tl.load(summed + at + i[:, None] * K + d[None, :])
        there = tl.load(summed + at + middle[:, None] * K + d[None, :])
    same = (i // (2 * size))[:, None] == (i // (2 * size))[None, :]
    pairs = same & ((i // size) % 2 == 1)[:, None] & ((i // size) % 2 == 0)[None, :]
    return tl.exp2(-tl.abs(here - there)), pairs


@triton.jit(do_not_specialize=["T"])
def channel_decay_kernel(
    q, k, g, q_norm, k_norm, summed, q_in, k_in, k_out, whole, chunks, T, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORMALISE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Summed gates (to base 2), and q, k with the decays that they meet the state with. q_norm, k_norm: [B·T, H]."""
    slot = tl.program_id(0).to(tl.int64)
    k0 = tl.program_id(1) * BK
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    key_head = h // (HV // H)
    gate = tl.cumsum(tile(g + (row0 * HV + h) * K + k0, HV * K, rows, K - k0, L, BK, True).to(tl.float32) * LOG2E, 0)
    last = tl.sum(tl.where(tl.arange(0, L)[:, None] == L - 1, gate, 0.0), 0)
    query = tile(q + (row0 * H + key_head) * K + k0, H * K, rows, K - k0, L, BK, True).to(tl.float32) * scale
    key = tile(k + (row0 * H + key_head) * K + k0, H * K, rows, K - k0, L, BK, True).to(tl.float32)
    if NORMALISE:
        query *= column(q_norm + row0 * H + key_head, rows, H)[:, None]
        key *= column(k_norm + row0 * H + key_head, rows, H)[:, None]
    at = slot * L * K + k0
    put(summed + at, gate, K, L, K - k0, L, BK, True)
    put(q_in + at, query * tl.exp2(gate), K, L, K - k0, L, BK, True)
    put(k_in + at, key * tl.exp2(gate), K, L, K - k0, L, BK, True)
    put(k_out + at, key * tl.exp2(last[None, :] - gate), K, L, K - k0, L, BK, True)
    d = k0 + tl.arange(0, BK)
    tl.store(whole + slot * K + d, tl.exp2(last), mask=d < K)


@triton.jit(do_not_specialize=["T"])
def channel_pairs_kernel(
    q, k, q_norm, k_norm, summed, beta, solution, pair, chunks, T, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORMALISE: tl.constexpr,
    PACKED: tl.constexpr, SAVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """T = (I + N)⁻¹ and the scores A of each slot, as in `prepare_kernel`."""
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    at_k = (row0 * H + h // (HV // H)) * K
    lower = tl.zeros((L, L), dtype=tl.float32)
    scores = tl.zeros((L, L), dtype=tl.float32)
    diagonal = tl.zeros((L,), dtype=tl.float32)
    for k0 in range(0, K, BK):
        query = tile(q + at_k + k0, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
        key = tile(k + at_k + k0, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
        diagonal += tl.sum(query * key, 1)
        for level in range(LEVELS):
            factor, pairs = _level(summed, slot * L * K, i, k0 + tl.arange(0, BK), 1 << level, K, MASK)
            turned = tl.trans(key * factor)
            lower += tl.where(pairs, mm(key * factor, turned, PRECISION), 0.0)
            scores += tl.where(pairs, mm(query * factor, turned, PRECISION), 0.0)
    scores += tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0)
    if NORMALISE:
        norm_q = column(q_norm + row0 * H + h // (HV // H), rows, H)
        norm_k = column(k_norm + row0 * H + h // (HV // H), rows, H)
        scores *= norm_q[:, None] * norm_k[None, :]
        lower *= norm_k[:, None] * norm_k[None, :]
    scores *= scale
    if SAVE:
        put(pair + slot * L * L, scores, L, L, L, L, L, False)
    lower *= column(beta + row0 * HV + h, rows, HV)[:, None]
    put_solution(solution + slot * 2 * L * L, lower, scores, PRECISION, EXACT)


@triton.jit(do_not_specialize=["T", "slots"])
def channel_gradient_kernel(
    q, k, d_o, du, v_new, states, d_states, beta, summed, whole, q_norm, k_norm, from_v, dq, dk, dv, dg, parts,
    chunks, T, slots, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VB: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, for BK key columns: dq, dk of the normalised q, k, for every value head.

    β's share of these columns goes to `parts` [tiles, 4, slots, 64], row 2.
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
    d = k0 + tl.arange(0, BK)
    at_k, at_v = (row0 * H + h // (HV // H)) * K + k0, (row0 * HV + h) * V
    factor = column(beta + row0 * HV + h, rows, HV)
    d_scores = tl.zeros((L, L), dtype=tl.float32)
    d_lower = tl.zeros((L, L), dtype=tl.float32)
    from_q = tl.zeros((L, BK), dtype=tl.float32)
    from_k = tl.zeros((L, BK), dtype=tl.float32)
    from_end = tl.zeros((L, BK), dtype=tl.float32)
    through = tl.zeros((BK,), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        new = tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        outer = tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        inner = tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK)
        if part == 0:
            put(dv + at_v + v0, inner.to(tl.float32) * factor[:, None], HV * V, rows, V - v0, L, BV, MASK)
        at = slot * K * V + v0 * K + k0
        state = tile(states + at, K, V - v0, K - k0, BV, BK, MASK)
        d_state = tile(d_states + at, K, V - v0, K - k0, BV, BK, MASK)
        d_scores = mm_add(outer, tl.trans(new), d_scores, PRECISION)
        d_lower = mm_add(inner, tl.trans(new), d_lower, PRECISION)
        from_q = mm_add(outer, state, from_q, PRECISION)
        from_k = mm_add(inner, state, from_k, PRECISION)
        from_end = mm_add(new, d_state, from_end, PRECISION)
        through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    d_scores *= scale
    query = tile(q + at_k, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
    key = tile(k + at_k, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
    if NORMALISE:
        query *= column(q_norm + row0 * H + h // (HV // H), rows, H)[:, None]
        key *= column(k_norm + row0 * H + h // (HV // H), rows, H)[:, None]
    gate = tile(summed + slot * L * K + k0, K, L, K - k0, L, BK, MASK)
    last = tl.load(summed + slot * L * K + (L - 1) * K + d, mask=d < K, other=0.0)
    through *= tl.load(whole + slot * K + d, mask=d < K, other=0.0)
    from_q *= tl.exp2(gate) * scale
    from_k *= -tl.exp2(gate)
    from_end *= tl.exp2(last[None, :] - gate)
    columns = tl.zeros((L, BK), dtype=tl.float32)
    for level in range(LEVELS):
        f, pairs = _level(summed, slot * L * K, i, d, 1 << level, K, MASK)
        of_q = tl.where(pairs, d_scores, 0.0)
        of_k = tl.where(pairs, -d_lower, 0.0)
        from_q += f * mm(of_q, key * f, PRECISION)
        from_k += f * mm(of_k, key * f, PRECISION)
        received = mm(tl.trans(of_q), query * f, PRECISION)
        received = mm_add(tl.trans(of_k * factor[:, None]), key * f, received, PRECISION)
        columns += f * received
    tl.store(parts + ((part.to(tl.int64) * 4 + 2) * slots + slot) * L + i, _beta_share(
        from_k * key, from_v, part, slot, slots, VB
    ))  # fmt: skip
    from_k *= factor[:, None]
    ahead = query * from_q + key * (from_k - columns)
    gates = mm(tl.where(jj >= ii, 1.0, 0.0), ahead, EXACT) + through[None, :]
    gates = mm_add(tl.where(jj < ii, 1.0, 0.0), key * from_end, gates, EXACT)
    at = (row0 * HV + h) * K + k0
    put(dg + at, gates, HV * K, rows, K - k0, L, BK, True)
    diagonal = tl.sum(tl.where(ii == jj, d_scores, 0.0), 1)[:, None]
    put(dq + at, from_q + diagonal * key, HV * K, rows, K - k0, L, BK, True)
    put(dk + at, from_k + columns + from_end + diagonal * query, HV * K, rows, K - k0, L, BK, True)


@triton.jit
def _beta_share(products, from_v, part, slot, slots, VB: tl.constexpr):
    share = tl.sum(products, 1)
    once = tl.where(part == 0, 1.0, 0.0)
    for block in tl.static_range(VB):
        share += tl.load(from_v + (block * slots + slot) * L + tl.arange(0, L)) * once
    return share
