"""The Triton kernels of the (gated) delta rule; the algebra is in README.md.

`prepare_kernel` and `gradient_kernel` have one program per slot; the three walks one per sequence, value head and
tile of the state. Walks hold the state turned, [V, K], so that it and all that is added to it go from registers into
the tensor cores, and only what is loaded lies in shared memory. GATE is 0 for none, 1 for a gate per head, 2 for one
per channel; then q, k, k_out are scratch [slots, 64, K] with the decays multiplied in, and `gates` [slots, K] is the
decay over the chunk. Otherwise `gates` [slots, 64] are logs to base 2, summed from the chunk's start.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import (
    EPS,
    L,
    chunk_rows,
    column,
    halves,
    mm,
    mm_add,
    mm_add_wide,
    put,
    put_solution,
    sequence_chunks,
    tile,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    q, k, g, beta, gates, q_norm, k_norm, solution, pair, chunks, T, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, GATE: tl.constexpr,
    NORMALISE: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of each slot: summed gates, 1/‖q‖ and 1/‖k‖, T − I and A T, for T = (I + N)⁻¹ and A = scale (q kᵀ) ∘ decay.

    SAVE: A too, into `pair`.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ii, jj = i[:, None], i[None, :]
    q += (row0 * H + h // (HV // H)) * K
    k += (row0 * H + h // (HV // H)) * K
    lower = tl.zeros((L, L), dtype=tl.float32)
    scores = tl.zeros((L, L), dtype=tl.float32)
    size = tl.zeros((L,), dtype=tl.float32)
    for k0 in tl.static_range(0, K, STEP):
        key = tile(k + k0, H * K, rows, K - k0, L, STEP, MASK)
        query = tile(q + k0, H * K, rows, K - k0, L, STEP, MASK)
        lower = mm_add(key, tl.trans(key), lower, PRECISION)
        scores = mm_add(query, tl.trans(key), scores, PRECISION)
        if NORMALISE:
            wide = query.to(tl.float32)
            size += tl.sum(wide * wide, 1)
    factor = column(beta + row0 * HV + h, rows, HV)
    if NORMALISE:
        square = tl.where(ii == jj, lower, 0.0)
        norm = tl.rsqrt(tl.sum(square, 1) + EPS)
        size = tl.rsqrt(size + EPS)
        tl.store(k_norm + slot * L + i, norm)
        tl.store(q_norm + slot * L + i, size)
        factor *= norm
        norm = tl.rsqrt(tl.sum(square, 0) + EPS)
        lower *= norm[None, :]
        scores *= (size * scale)[:, None] * norm[None, :]
    else:
        scores *= scale
    lower *= factor[:, None]
    if GATE:
        gate = tl.cumsum(column(g + row0 * HV + h, rows, HV) * LOG2E, 0)
        tl.store(gates + slot * L + i, gate)
        decay = tl.exp2(tl.where(ii >= jj, gate[:, None] - gate[None, :], float("-inf")))
        lower *= decay
        scores *= decay
    scores = tl.where(ii >= jj, scores, 0.0)
    if SAVE:
        put(pair + slot * L * L, scores, L, L, L, L, L, False)
    put_solution(solution + slot * 2 * L * L, tl.where(ii > jj, lower, 0.0), scores, PRECISION, EXACT)


@triton.jit
def _factors(gates, q_norm, k_norm, slot, GATE: tl.constexpr, NORMALISE: tl.constexpr):
    """What stands before q and k where they meet the chunk's first state, before k where it meets its last one."""
    i = tl.arange(0, L)
    one = tl.full((L,), 1.0, tl.float32)
    query, key = one, one
    if NORMALISE:
        query = tl.load(q_norm + slot * L + i)
        key = tl.load(k_norm + slot * L + i)
    end = key
    if GATE == 1:
        gate = tl.load(gates + slot * L + i)
        end = key * tl.exp2(tl.load(gates + slot * L + L - 1) - gate)
        query *= tl.exp2(gate)
        key *= tl.exp2(gate)
    return query, key, end


@triton.jit
def _decayed(state, gates, slot, K: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr):
    if GATE == 1:
        state *= tl.exp2(tl.load(gates + slot * L + L - 1))
    if GATE == 2:
        d = tl.arange(0, BK)
        state *= tl.load(gates + slot * K + d, mask=d < K, other=0.0)[None, :]
    return state


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, k, k_out, v, beta, gates, q_norm, k_norm, solution, initial, o, v_new, final, chunks, sequences, T, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, SAVE: tl.constexpr,
    FINAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the first chunk to the last: r = β (v − e^G k S), v_new = T r, o = scale e^G q S + A T r, and the next S."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % blocks) * BV
    pid = pid // blocks
    n, h = pid // HV, pid % HV
    first, count = sequence_chunks(n, sequences, T, PACKED)
    state = tl.zeros((BV, BK), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.trans(tile(initial + pid * K * V + v0, V, K, V - v0, BK, BV, True).to(tl.float32))
    for c in tl.range(first, first + count, num_stages=STAGES):
        slot = c * HV + h
        row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
        at, stride = (row0 * H + h // (HV // H)) * K, H * K
        if GATE == 2:
            at, stride = slot * L * K, K
        at_v = (row0 * HV + h) * V + v0
        key = tile(k + at, stride, rows, K, L, BK, MASK)
        value = tile(v + at_v, HV * V, rows, V - v0, L, BV, MASK)
        solve = tile(solution + slot * 2 * L * L, L, 2 * L, L, 2 * L, L, False)
        query = tile(q + at, stride, rows, K, L, BK, MASK)
        factor = column(beta + row0 * HV + h, rows, HV)
        from_q, from_k, to_end = _factors(gates, q_norm, k_norm, slot, GATE, NORMALISE)
        narrow = state.to(key.dtype)
        new = mm(narrow, tl.trans(key), PRECISION)
        out = mm(narrow, tl.trans(query), PRECISION)
        if GATE != 2:
            out *= (from_q * scale)[None, :]
        new = factor[None, :] * tl.trans(value).to(tl.float32) - new * (factor * from_k)[None, :]
        both = mm_add_wide(new, tl.trans(solve), tl.zeros((BV, 2 * L), dtype=tl.float32), PRECISION)
        solved, read = halves(both)
        new += solved
        put(o + at_v, tl.trans((out + read).to(o.dtype.element_ty)), HV * V, rows, V - v0, L, BV, MASK)
        if SAVE:
            put(v_new + at_v, tl.trans(new.to(key.dtype)), HV * V, rows, V - v0, L, BV, MASK)
        state = _decayed(state, gates, slot, K, BK, GATE)
        if GATE == 2:
            key = tile(k_out + at, stride, rows, K, L, BK, MASK)
        else:
            new *= to_end[None, :]
        state = mm_add_wide(new, key, state, PRECISION)
    if FINAL:
        put(final + pid * K * V + v0, tl.trans(state), V, K, V - v0, BK, BV, True)


@triton.jit(do_not_specialize=["T"])
def state_kernel(
    k, v_new, gates, q_norm, k_norm, initial, states, chunks, sequences, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The states at the chunks' starts, [slots, V, K], from v_new. With channel gates k is k_out."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    parts: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0).to(tl.int64)
    k0 = (pid % parts) * BK
    pid = pid // parts
    v0 = (pid % blocks) * BV
    pid = pid // blocks
    n, h = pid // HV, pid % HV
    first, count = sequence_chunks(n, sequences, T, PACKED)
    state = tl.zeros((BV, BK), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.trans(tile(initial + (pid * K + k0) * V + v0, V, K - k0, V - v0, BK, BV, True).to(tl.float32))
    for c in tl.range(first, first + count, num_stages=STAGES):
        slot = c * HV + h
        row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
        at, stride = (row0 * H + h // (HV // H)) * K + k0, H * K
        if GATE == 2:
            at, stride = slot * L * K + k0, K
        key = tile(k + at, stride, rows, K - k0, L, BK, MASK)
        new = tile(v_new + (row0 * HV + h) * V + v0, HV * V, rows, V - v0, L, BV, MASK)
        put(states + slot * K * V + v0 * K + k0, state, K, V - v0, K - k0, BV, BK, MASK)
        new = tl.trans(new)
        if GATE == 2:
            d = k0 + tl.arange(0, BK)
            state *= tl.load(gates + slot * K + d, mask=d < K, other=0.0)[None, :]
        else:
            _, _, to_end = _factors(gates, q_norm, k_norm, slot, GATE, NORMALISE)
            state = _decayed(state, gates, slot, K, BK, GATE)
            if GATE or NORMALISE:
                new = (new.to(tl.float32) * to_end[None, :]).to(key.dtype)
        state = mm_add(new, key, state, PRECISION)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    q, k, k_out, d_o, beta, gates, q_norm, k_norm, solution, d_final, du, d_states, d_initial, chunks, sequences, T,
    scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr, HAS_FINAL: tl.constexpr,
    INITIAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dS, and X = Tᵀ (e^(G_last − G) k dS + Aᵀ do) into `du`.
    `d_states` [slots, V, K] gets dS at each chunk's end.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % blocks) * BV
    pid = pid // blocks
    n, h = pid // HV, pid % HV
    first, count = sequence_chunks(n, sequences, T, PACKED)
    grad = tl.zeros((BV, BK), dtype=tl.float32)
    if HAS_FINAL:
        grad = tl.trans(tile(d_final + pid * K * V + v0, V, K, V - v0, BK, BV, True).to(tl.float32))
    for step in tl.range(0, count, num_stages=STAGES):
        slot = (first + count - 1 - step) * HV + h
        row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
        at, stride = (row0 * H + h // (HV // H)) * K, H * K
        if GATE == 2:
            at, stride = slot * L * K, K
        at_v = (row0 * HV + h) * V + v0
        ending = tile(k_out + at, stride, rows, K, L, BK, MASK)
        outer = tl.trans(tile(d_o + at_v, HV * V, rows, V - v0, L, BV, MASK))
        read = tile(solution + (slot * 2 + 1) * L * L, L, L, L, L, L, False)
        solve = tile(solution + slot * 2 * L * L, L, L, L, L, L, False)
        query = tile(q + at, stride, rows, K, L, BK, MASK)
        factor = column(beta + row0 * HV + h, rows, HV)
        from_q, from_k, to_end = _factors(gates, q_norm, k_norm, slot, GATE, NORMALISE)
        narrow = grad.to(ending.dtype)
        put(d_states + slot * K * V + v0 * K, narrow, K, V - v0, K, BV, BK, MASK)
        new = mm(narrow, tl.trans(ending), PRECISION)
        if GATE != 2:
            new *= to_end[None, :]
        new = mm_add_wide(new, solve, mm_add(outer, read, new, PRECISION), PRECISION)
        put(du + at_v, tl.trans(new.to(du.dtype.element_ty)), HV * V, rows, V - v0, L, BV, MASK)
        if STAGES == 1:  # read again, so that not all need lie in shared memory at once
            query = tile(q + at, stride, rows, K, L, BK, MASK)
            ending = tile(k_out + at, stride, rows, K, L, BK, MASK)
        grad = _decayed(grad, gates, slot, K, BK, GATE)
        if GATE == 2:
            grad = mm_add(outer, query, grad, PRECISION)
            key = tile(k + at, stride, rows, K, L, BK, MASK)
            grad = mm_add_wide(new * -factor[None, :], key, grad, PRECISION)
        else:
            outer = (outer.to(tl.float32) * (from_q * scale)[None, :]).to(query.dtype)
            grad = mm_add(outer, query, grad, PRECISION)
            grad = mm_add_wide(new * -(factor * from_k)[None, :], ending, grad, PRECISION)
    if INITIAL:
        put(d_initial + pid * K * V + v0, tl.trans(grad), V, K, V - v0, BK, BV, True)
