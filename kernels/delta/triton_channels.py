"""The Triton kernels that a gate per key channel needs besides the walks (KDA); the algebra is in README.md.

With G the summed gates, row i meets column j through a token m, e^(G_i − G_m) e^(G_m − G_j). Where 64 channels forget
little within a chunk, m is the chunk's middle for all pairs (one pass). Otherwise pairs are split by binary levels, as
in `torch_pairs.py`: those between the two halves of a block pass the block's middle, so that no factor exceeds 1; a
third level of whole blocks of 16 ends it where these forget little (three passes), six levels always do.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import L, chunk_rows, column, mm, mm_add, put, put_solution, tile

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(50.0)  # powers of two that a factor may reach; a product of two stays far from fp32's end


@triton.jit
def _around(summed, at, i, d, size, K: tl.constexpr, MASK: tl.constexpr):
    """Sums of gates, as seen from the middles of blocks of 2 · size tokens, [64, D]; `summed` + `at` is the chunk's."""
    middle = (i // (2 * size)) * 2 * size + size - 1
    if MASK:
        here = tl.load(summed + at + i[:, None] * K + d[None, :], mask=(d < K)[None, :], other=0.0)
        there = tl.load(summed + at + middle[:, None] * K + d[None, :], mask=(d < K)[None, :], other=0.0)
    else:
        here = tl.load(summed + at + i[:, None] * K + d[None, :])
        there = tl.load(summed + at + middle[:, None] * K + d[None, :])
    return here - there


@triton.jit
def _passes(summed, at, i, d, K: tl.constexpr, MASK: tl.constexpr):
    """How many passes a chunk's pairs take: 1, 3 or 6."""
    passes = 1
    if tl.max(tl.max(tl.abs(_around(summed, at, i, d, 32, K, MASK)), 1), 0) > LIMIT:
        passes = 3
        if tl.max(tl.max(tl.abs(_around(summed, at, i, d, 8, K, MASK)), 1), 0) > LIMIT:
            passes = 6
    return passes


@triton.jit
def _pass(summed, at, i, d, number, passes, K: tl.constexpr, MASK: tl.constexpr):
    """Factors [64, D] of rows and of columns of one pass, and where its pairs stand [64, 64]."""
    size = 32 >> number
    whole = (number == passes - 1) & (passes < 6)
    limit = tl.where(whole, LIMIT, 0.0)
    distance = _around(summed, at, i, d, size, K, MASK)
    row, across = tl.exp2(tl.minimum(distance, limit)), tl.exp2(tl.minimum(-distance, limit))
    ii, jj = i[:, None], i[None, :]
    pairs = (ii > jj) & (ii // (2 * size) == jj // (2 * size)) & (whole | (ii // size != jj // size))
    return row, across, pairs


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
    narrow = k.dtype.element_ty
    for k0 in range(0, K, BK):
        query = tile(q + at_k + k0, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
        key = tile(k + at_k + k0, H * K, rows, K - k0, L, BK, MASK).to(tl.float32)
        diagonal += tl.sum(query * key, 1)
        d = k0 + tl.arange(0, BK)
        passes = _passes(summed, slot * L * K, i, d, K, MASK)
        for number in range(passes):
            row, across, pairs = _pass(summed, slot * L * K, i, d, number, passes, K, MASK)
            turned = tl.trans((key * across).to(narrow))
            lower += tl.where(pairs, mm((key * row).to(narrow), turned, PRECISION), 0.0)
            scores += tl.where(pairs, mm((query * row).to(narrow), turned, PRECISION), 0.0)
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
def channel_scores_kernel(
    v, d_o, du, v_new, beta, dv, weights, sums, chunks, T, slots, scale,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores and of N below the diagonal into `weights` [2, slots, 64, 64], and dv.

    `sums` [2, slots, 64]: the scores' diagonal, and X·v.
    """
    slot = tl.program_id(0).to(tl.int64)
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ii, jj = i[:, None], i[None, :]
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
    d_scores *= scale
    sums += slot * L + i
    tl.store(sums, tl.sum(tl.where(ii == jj, d_scores, 0.0), 1))
    tl.store(sums + slots * L, from_v)
    weights += slot * L * L
    put(weights, tl.where(ii > jj, d_scores, 0.0), L, L, L, L, L, False)
    put(weights + slots * L * L, tl.where(ii > jj, -d_lower, 0.0), L, L, L, L, L, False)


@triton.jit
def _rows(x, norm, rows, width, H, K, BK: tl.constexpr, NORMALISE: tl.constexpr, MASK: tl.constexpr):
    """A tile of q or k [64, BK], normalised, fp32."""
    value = tile(x, H * K, rows, width, L, BK, MASK).to(tl.float32)
    if NORMALISE:
        value *= column(norm, rows, H)[:, None]
    return value


@triton.jit
def _sums(chosen, x, total, like, EXACT: tl.constexpr):
    """total + chosen @ x for a mask: x in `like`'s dtype twice, the rounded values and what rounding left."""
    if like.dtype.element_ty == tl.float32 or EXACT == "ieee":
        return mm_add(tl.where(chosen, 1.0, 0.0), x, total, EXACT)
    else:
        mask = tl.where(chosen, 1.0, 0.0).to(like.dtype.element_ty)
        rounded = x.to(like.dtype.element_ty)
        total = mm_add(mask, rounded, total, EXACT)
        return mm_add(mask, (x - rounded.to(tl.float32)).to(like.dtype.element_ty), total, EXACT)


@triton.jit(do_not_specialize=["T", "slots"])
def channel_gradient_kernel(
    q, k, d_o, du, v_new, states, d_states, weights, sums, beta, summed, whole, q_norm, k_norm, dq, dk, dg, parts,
    chunks, T, slots, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORMALISE: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of BK key columns: dq, dk of the normalised q, k, for every value head.

    β's share of these columns goes to `parts` [tiles, 4, slots, 64], row 2.
    """
    part = tl.program_id(0) % ((K + BK - 1) // BK)
    slot = (tl.program_id(0) // ((K + BK - 1) // BK)).to(tl.int64)
    k0 = part * BK
    h = slot % HV
    row0, rows = chunk_rows(slot, chunks, T, HV, PACKED)
    if rows <= 0:
        return
    i = tl.arange(0, L)
    ii, jj = i[:, None], i[None, :]
    d = k0 + tl.arange(0, BK)
    key_head = row0 * H + h // (HV // H)
    at_k, at_v, at_s = key_head * K + k0, (row0 * HV + h) * V, slot * K * V + k0
    at = (row0 * HV + h) * K + k0
    weights += slot * L * L
    diagonal = tl.load(sums + slot * L + i)[:, None]
    narrow = k.dtype.element_ty
    passes = _passes(summed, slot * L * K, i, d, K, MASK)
    # queries
    grad = tl.zeros((L, BK), dtype=tl.float32)
    through = tl.zeros((BK,), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        state = tile(states + at_s + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        d_state = tile(d_states + at_s + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
        grad = mm_add(tile(d_o + at_v + v0, HV * V, rows, V - v0, L, BV, MASK), state, grad, PRECISION)
    through *= tl.load(whole + slot * K + d, mask=d < K, other=0.0)
    grad *= tl.exp2(tile(summed + slot * L * K + k0, K, L, K - k0, L, BK, MASK)) * scale
    for number in range(passes):
        row, across, pairs = _pass(summed, slot * L * K, i, d, number, passes, K, MASK)
        key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
        weight = tl.where(pairs, tile(weights, L, L, L, L, L, False), 0.0)
        grad += row * mm(weight, (key * across).to(narrow), PRECISION)
    key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
    put(dq + at, grad + diagonal * key, HV * K, rows, K - k0, L, BK, MASK)
    ahead = _rows(q + at_k, q_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK) * grad
    # keys, as rows: through the state at the chunk's start and through pairs
    grad = tl.zeros((L, BK), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        state = tile(states + at_s + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        grad = mm_add(tile(du + at_v + v0, HV * V, rows, V - v0, L, BV, MASK), state, grad, PRECISION)
    grad *= -tl.exp2(tile(summed + slot * L * K + k0, K, L, K - k0, L, BK, MASK))
    for number in range(passes):
        row, across, pairs = _pass(summed, slot * L * K, i, d, number, passes, K, MASK)
        key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
        weight = tl.where(pairs, tile(weights + slots * L * L, L, L, L, L, L, False), 0.0)
        grad += row * mm(weight, (key * across).to(narrow), PRECISION)
    key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
    tl.store(parts + ((part.to(tl.int64) * 4 + 2) * slots + slot) * L + i, tl.sum(grad * key, 1))
    grad *= column(beta + row0 * HV + h, rows, HV)[:, None]
    ahead += key * grad
    # keys, as columns of pairs
    columns = tl.zeros((L, BK), dtype=tl.float32)
    for number in range(passes):
        row, across, pairs = _pass(summed, slot * L * K, i, d, number, passes, K, MASK)
        key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
        key *= column(beta + row0 * HV + h, rows, HV)[:, None]
        weight = tl.where(pairs, tile(weights + slots * L * L, L, L, L, L, L, False), 0.0)
        received = mm(tl.trans(weight), (key * row).to(narrow), PRECISION)
        query = _rows(q + at_k, q_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
        weight = tl.where(pairs, tile(weights, L, L, L, L, L, False), 0.0)
        columns += across * mm_add(tl.trans(weight), (query * row).to(narrow), received, PRECISION)
    key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
    ahead -= key * columns
    grad += columns + diagonal * _rows(q + at_k, q_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
    # keys, through the state at the chunk's end
    from_end = tl.zeros((L, BK), dtype=tl.float32)
    for v0 in tl.static_range(0, V, BV):
        d_state = tile(d_states + at_s + v0 * K, K, V - v0, K - k0, BV, BK, MASK)
        from_end = mm_add(tile(v_new + at_v + v0, HV * V, rows, V - v0, L, BV, MASK), d_state, from_end, PRECISION)
    last = tl.load(summed + slot * L * K + (L - 1) * K + d, mask=d < K, other=0.0)
    from_end *= tl.exp2(last[None, :] - tile(summed + slot * L * K + k0, K, L, K - k0, L, BK, MASK))
    put(dk + at, grad + from_end, HV * K, rows, K - k0, L, BK, MASK)
    gates = tl.zeros((L, BK), dtype=tl.float32) + through[None, :]
    gates = _sums(jj >= ii, ahead, gates, k, EXACT)
    key = _rows(k + at_k, k_norm + key_head, rows, K - k0, H, K, BK, NORMALISE, MASK)
    put(dg + at, _sums(jj < ii, key * from_end, gates, k, EXACT), HV * K, rows, K - k0, L, BK, MASK)
