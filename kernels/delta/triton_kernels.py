"""The Triton kernels of the gated delta rule. Simple and separate: one quantity each, README.md has the algebra.

Every kernel but the state walks has one program per (chunk slot, value head) and works on 64×64 tiles: chunks are 64
tokens, K and V are cut into tiles of 64, the rest is masked. `chunks` [C, 2] int64 holds (first row, rows) of each slot
in the token-major arrays [B·T, heads, D]; `sequences` [N, 2] int64 holds (first slot, slots). Scratch arrays are
[C, HV, 64, D] or [C, HV, K, V]. Rows past a chunk's end are read as zeros, so their gates repeat the last one.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

L = tl.constexpr(64)
EPS = tl.constexpr(1e-6)


@triton.jit
def _load(x, row0, rows, stride, col0, width):
    """The [64, 64] tile of rows row0.. and columns col0..; zeros past `rows` rows or `width` columns."""
    i = tl.arange(0, L)
    d = col0 + tl.arange(0, L)
    inside = (i < rows)[:, None] & (d < width)[None, :]
    return tl.load(x + (row0 + i)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _load_wide(x, row0, rows, stride, col0, width, WIDTH: tl.constexpr):
    """As `_load`, [64, WIDTH]."""
    i = tl.arange(0, L)
    d = col0 + tl.arange(0, WIDTH)
    inside = (i < rows)[:, None] & (d < width)[None, :]
    return tl.load(x + (row0 + i)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _load_rows(x, row0, rows, stride, col0, width, first, ROWS: tl.constexpr):
    """As `_load`, the ROWS rows from row `first` of the tile: [ROWS, 64]."""
    i = first + tl.arange(0, ROWS)
    d = col0 + tl.arange(0, L)
    inside = (i < rows)[:, None] & (d < width)[None, :]
    return tl.load(x + (row0 + i)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, row0, rows, stride, col0, width):
    i = tl.arange(0, L)
    d = col0 + tl.arange(0, L)
    inside = (i < rows)[:, None] & (d < width)[None, :]
    tl.store(x + (row0 + i)[:, None] * stride + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_column(x, row0, rows, stride):
    """64 numbers, one per row, as fp32."""
    i = tl.arange(0, L)
    return tl.load(x + (row0 + i) * stride, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def _decay(gates):
    """e^(G_i − G_j) for i ≥ j, zero above: the exponent is never positive."""
    i = tl.arange(0, L)
    return tl.exp(tl.where(i[:, None] >= i[None, :], gates[:, None] - gates[None, :], float("-inf")))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32; bf16 beside fp32 is widened. Exact products of 64 inner elements are cut into slices of 16.

    "interpreted": Triton's interpreter cannot multiply bf16, so it gets the same values as fp32.
    """
    if PRECISION == "ieee" and a.shape[1] == 16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRECISION == "ieee":
        return _exact_dot(a.to(tl.float32), b.to(tl.float32))
    elif PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif a.dtype == b.dtype:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _exact_dot(a, b):
    """fp32 products without tensor cores, 16 inner elements at a time: each thread holds whole rows of its operands."""
    a0, a1 = tl.split(tl.permute(tl.reshape(a, (L, 2, 32)), (0, 2, 1)))
    b0, b1 = tl.split(tl.permute(tl.reshape(b, (2, 32, L)), (1, 2, 0)))
    return _exact_half(a1, b1, _exact_half(a0, b0, tl.zeros((L, L), dtype=tl.float32)))


@triton.jit
def _exact_half(a, b, total):
    a0, a1 = tl.split(tl.permute(tl.reshape(a, (L, 2, 16)), (0, 2, 1)))
    b0, b1 = tl.split(tl.permute(tl.reshape(b, (2, 16, L)), (1, 2, 0)))
    total = tl.dot(a0, b0, total, input_precision="ieee")
    return tl.dot(a1, b1, total, input_precision="ieee")


@triton.jit
def _load_norm(norm, row0, rows, stride, NORMALISE: tl.constexpr):
    """1/‖x‖ of each row, ones when nothing is normalised: products use x as given (exact in bf16) and are scaled."""
    if NORMALISE:
        return _load_column(norm, row0, rows, stride)
    else:
        return tl.full((L,), 1.0, tl.float32)


@triton.jit
def _load_slice(norm, row0, rows, stride, NORMALISE: tl.constexpr, COUNT: tl.constexpr):
    """As `_load_norm`, for COUNT rows."""
    i = tl.arange(0, COUNT)
    if NORMALISE:
        return tl.load(norm + (row0 + i) * stride, mask=i < rows, other=0.0).to(tl.float32)
    else:
        return tl.full((COUNT,), 1.0, tl.float32)


@triton.jit
def _scaled(pair, norm):
    """pair with its columns scaled, in its own dtype."""
    return (pair.to(tl.float32) * norm[None, :]).to(pair.dtype)


@triton.jit
def norm_kernel(x, norm, count, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr):
    """norm = 1 / sqrt(Σ x² + eps) of each row, fp32."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BK)
    inside = (r < count)[:, None] & (d < K)[None, :]
    value = tl.load(x + r[:, None] * K + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + r, tl.rsqrt(tl.sum(value * value, 1) + EPS), mask=r < count)


@triton.jit
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


@triton.jit
def gates_kernel(g, gates, chunks, HV: tl.constexpr):
    """gates [C, HV, 64]: g summed from the chunk's start, the row itself included, as a masked sum."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    i = tl.arange(0, L)
    value = _load_column(g + h, row0, rows, HV)
    total = tl.sum(tl.where(i[None, :] <= i[:, None], value[None, :], 0.0), 1)
    tl.store(gates + slot * L + i, total)


@triton.jit
def inverse_kernel(
    k, k_norm, beta, gates, inverse, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + N)⁻¹, N_ij = β_i (k_i·k_j) e^(G_i − G_j) below the diagonal, in fp32.

    Diagonal blocks of 2, 4, … 64 are inverted in turn: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]].
    """
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    k += (h // (HV // H)) * K
    lower = tl.zeros((L, L), dtype=tl.float32)
    for k0 in range(0, K, L):
        key = _load(k, row0, rows, H * K, k0, K)
        lower += _dot(key, tl.trans(key), PRECISION)
    norm = _load_norm(k_norm + h // (HV // H), row0, rows, H, NORMALISE)
    lower *= norm[:, None] * norm[None, :]
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    lower *= _decay(_load_column(gates, slot * L, L, 1)) * _load_column(beta + h, row0, rows, HV)[:, None]
    lower = tl.where(i > j, lower, 0.0)
    result = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), lower, 0.0)
    for level in range(1, 6):
        pairs = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        result -= _exact_dot(_exact_dot(result, tl.where(pairs, lower, 0.0)), result)
    _store(inverse + slot * L * L, result, 0, L, L, 0, L)


@triton.jit
def apply_kernel(
    x, k_norm, beta, gates, inverse, out, chunks,
    HX: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, GROW: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = T (β x), or T (β e^G x) with GROW: u from v, w from k. One program per (slot, head) and 64 columns."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    d0 = tl.program_id(1) * L
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    factor = _load_column(beta + h, row0, rows, HV)
    if GROW:
        factor *= tl.exp(_load_column(gates, slot * L, L, 1))
        factor *= _load_norm(k_norm + h // (HV // HX), row0, rows, HX, NORMALISE)
    tile = _load(x + (h // (HV // HX)) * D, row0, rows, HX * D, d0, D).to(tl.float32) * factor[:, None]
    matrix = _load(inverse + slot * L * L, 0, L, L, 0, L)
    _store(out + slot * L * D, _dot(matrix, tile, PRECISION), 0, L, D, d0, D)


@triton.jit
def state_kernel(
    w, u, k, k_norm, gates, initial, states, v_new, final, chunks, sequences,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_INITIAL: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry S over the chunks of one sequence and head, 64 value columns: v_new = u − w S, S ← e^G_last S + kᵀ v_new.

    S lives in up to four tiles of 64 key rows.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, h = pid // HV, pid % HV
    v0 = tl.program_id(1) * L
    first, count = tl.load(sequences + 2 * n), tl.load(sequences + 2 * n + 1)
    k += (h // (HV // H)) * K
    k_norm += h // (HV // H)
    initial += pid * K * V
    s0 = tl.zeros((L, L), dtype=tl.float32)
    s1, s2, s3 = s0, s0, s0
    if HAS_INITIAL:
        s0 = _load(initial, 0, K, V, v0, V).to(tl.float32)
        if K > 64:
            s1 = _load(initial, 64, K - 64, V, v0, V).to(tl.float32)
        if K > 128:
            s2 = _load(initial, 128, K - 128, V, v0, V).to(tl.float32)
        if K > 192:
            s3 = _load(initial, 192, K - 192, V, v0, V).to(tl.float32)
    for c in range(first, first + count):
        row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
        slot = c * HV + h
        start, w_at = states + slot * K * V, w + slot * L * K
        value = _load(u + slot * L * V, 0, L, V, v0, V).to(tl.float32)
        _store(start, s0, 0, K, V, v0, V)
        value -= _dot(_load(w_at, 0, L, K, 0, K), s0, PRECISION)
        if K > 64:
            _store(start, s1, 64, K - 64, V, v0, V)
            value -= _dot(_load(w_at, 0, L, K, 64, K), s1, PRECISION)
        if K > 128:
            _store(start, s2, 128, K - 128, V, v0, V)
            value -= _dot(_load(w_at, 0, L, K, 128, K), s2, PRECISION)
        if K > 192:
            _store(start, s3, 192, K - 192, V, v0, V)
            value -= _dot(_load(w_at, 0, L, K, 192, K), s3, PRECISION)
        _store(v_new + slot * L * V, value, 0, L, V, v0, V)
        gate = _load_column(gates, slot * L, L, 1)
        last = tl.load(gates + slot * L + L - 1)
        value *= (tl.exp(last - gate) * _load_norm(k_norm, row0, rows, H, NORMALISE))[:, None]
        total = tl.exp(last)
        key = tl.trans(_load(k, row0, rows, H * K, 0, K))
        s0 = s0 * total + _dot(key, value, PRECISION)
        if K > 64:
            key = tl.trans(_load(k, row0, rows, H * K, 64, K))
            s1 = s1 * total + _dot(key, value, PRECISION)
        if K > 128:
            key = tl.trans(_load(k, row0, rows, H * K, 128, K))
            s2 = s2 * total + _dot(key, value, PRECISION)
        if K > 192:
            key = tl.trans(_load(k, row0, rows, H * K, 192, K))
            s3 = s3 * total + _dot(key, value, PRECISION)
    final += pid * K * V
    _store(final, s0, 0, K, V, v0, V)
    if K > 64:
        _store(final, s1, 64, K - 64, V, v0, V)
    if K > 128:
        _store(final, s2, 128, K - 128, V, v0, V)
    if K > 192:
        _store(final, s3, 192, K - 192, V, v0, V)


@triton.jit
def output_kernel(
    q, k, q_norm, k_norm, v_new, states, gates, o, chunks, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORMALISE: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = scale (e^G q S + ((q kᵀ) ∘ decay) v_new), 64 value columns."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    v0 = tl.program_id(1) * L
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    q += (h // (HV // H)) * K
    k += (h // (HV // H)) * K
    through = tl.zeros((L, L), dtype=tl.float32)
    scores = tl.zeros((L, L), dtype=tl.float32)
    for k0 in range(0, K, STEP):
        query = _load_wide(q, row0, rows, H * K, k0, K, STEP)
        key = _load_wide(k, row0, rows, H * K, k0, K, STEP)
        state = _load_rows(states + slot * K * V, 0, K, V, v0, V, k0, STEP)
        through += _dot(query, state, PRECISION)
        scores += _dot(query, tl.trans(key), PRECISION)
    norm = _load_norm(q_norm + h // (HV // H), row0, rows, H, NORMALISE)
    through *= norm[:, None]
    scores *= norm[:, None] * _load_norm(k_norm + h // (HV // H), row0, rows, H, NORMALISE)[None, :]
    gate = _load_column(gates, slot * L, L, 1)
    value = _load(v_new + slot * L * V, 0, L, V, v0, V)
    scores = (scores * _decay(gate)).to(value.dtype)
    result = through * tl.exp(gate)[:, None] + _dot(scores, value, PRECISION)
    _store(o + h * V, result * scale, row0, rows, HV * V, v0, V)


@triton.jit
def dv_kernel(
    q, k, q_norm, k_norm, d_o, gates, dv, chunks, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv [C, HV, 64, V] = scale ((q kᵀ) ∘ decay)ᵀ do: what v_new receives from its own chunk's outputs."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    v0 = tl.program_id(1) * L
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    q += (h // (HV // H)) * K
    k += (h // (HV // H)) * K
    scores = tl.zeros((L, L), dtype=tl.float32)
    for k0 in range(0, K, L):
        query = _load(q, row0, rows, H * K, k0, K)
        key = _load(k, row0, rows, H * K, k0, K)
        scores += _dot(query, tl.trans(key), PRECISION)
    scores *= _load_norm(q_norm + h // (HV // H), row0, rows, H, NORMALISE)[:, None]
    scores *= _load_norm(k_norm + h // (HV // H), row0, rows, H, NORMALISE)[None, :]
    grad = _load(d_o + h * V, row0, rows, HV * V, v0, V)
    scores = (scores * _decay(_load_column(gates, slot * L, L, 1)) * scale).to(grad.dtype)
    result = _dot(tl.trans(scores), grad, PRECISION)
    _store(dv + slot * L * V, result, 0, L, V, v0, V)


@triton.jit
def state_backward_kernel(
    q, k, q_norm, k_norm, w, d_o, gates, d_final, d_states, dv, dv_new, d_initial, chunks, sequences, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    HAS_FINAL: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry dS from the last chunk to the first. Stores dS at each chunk's end; dv_new = dv + the state's part."""
    pid = tl.program_id(0).to(tl.int64)
    n, h = pid // HV, pid % HV
    v0 = tl.program_id(1) * L
    first, count = tl.load(sequences + 2 * n), tl.load(sequences + 2 * n + 1)
    q += (h // (HV // H)) * K
    k += (h // (HV // H)) * K
    q_norm += h // (HV // H)
    k_norm += h // (HV // H)
    d_final += pid * K * V
    s0 = tl.zeros((L, L), dtype=tl.float32)
    s1, s2, s3 = s0, s0, s0
    if HAS_FINAL:
        s0 = _load(d_final, 0, K, V, v0, V).to(tl.float32)
        if K > 64:
            s1 = _load(d_final, 64, K - 64, V, v0, V).to(tl.float32)
        if K > 128:
            s2 = _load(d_final, 128, K - 128, V, v0, V).to(tl.float32)
        if K > 192:
            s3 = _load(d_final, 192, K - 192, V, v0, V).to(tl.float32)
    for step in range(0, count):
        c = first + count - 1 - step
        row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
        slot = c * HV + h
        end, w_at = d_states + slot * K * V, w + slot * L * K
        _store(end, s0, 0, K, V, v0, V)
        value = _dot(_load(k, row0, rows, H * K, 0, K), s0, PRECISION)
        if K > 64:
            _store(end, s1, 64, K - 64, V, v0, V)
            value += _dot(_load(k, row0, rows, H * K, 64, K), s1, PRECISION)
        if K > 128:
            _store(end, s2, 128, K - 128, V, v0, V)
            value += _dot(_load(k, row0, rows, H * K, 128, K), s2, PRECISION)
        if K > 192:
            _store(end, s3, 192, K - 192, V, v0, V)
            value += _dot(_load(k, row0, rows, H * K, 192, K), s3, PRECISION)
        gate = _load_column(gates, slot * L, L, 1)
        last = tl.load(gates + slot * L + L - 1)
        value *= (tl.exp(last - gate) * _load_norm(k_norm, row0, rows, H, NORMALISE))[:, None]
        value += _load(dv + slot * L * V, 0, L, V, v0, V).to(tl.float32)
        _store(dv_new + slot * L * V, value, 0, L, V, v0, V)
        growth = tl.exp(gate) * scale * _load_norm(q_norm, row0, rows, H, NORMALISE)
        grad = _load(d_o + h * V, row0, rows, HV * V, v0, V).to(tl.float32)
        grad = (grad * growth[:, None]).to(k.dtype.element_ty)
        total = tl.exp(last)
        s0 = s0 * total + _dot(tl.trans(_load(q, row0, rows, H * K, 0, K)), grad, PRECISION)
        s0 -= _dot(tl.trans(_load(w_at, 0, L, K, 0, K)), value, PRECISION)
        if K > 64:
            s1 = s1 * total + _dot(tl.trans(_load(q, row0, rows, H * K, 64, K)), grad, PRECISION)
            s1 -= _dot(tl.trans(_load(w_at, 0, L, K, 64, K)), value, PRECISION)
        if K > 128:
            s2 = s2 * total + _dot(tl.trans(_load(q, row0, rows, H * K, 128, K)), grad, PRECISION)
            s2 -= _dot(tl.trans(_load(w_at, 0, L, K, 128, K)), value, PRECISION)
        if K > 192:
            s3 = s3 * total + _dot(tl.trans(_load(q, row0, rows, H * K, 192, K)), grad, PRECISION)
            s3 -= _dot(tl.trans(_load(w_at, 0, L, K, 192, K)), value, PRECISION)
    d_initial += pid * K * V
    _store(d_initial, s0, 0, K, V, v0, V)
    if K > 64:
        _store(d_initial, s1, 64, K - 64, V, v0, V)
    if K > 128:
        _store(d_initial, s2, 128, K - 128, V, v0, V)
    if K > 192:
        _store(d_initial, s3, 192, K - 192, V, v0, V)


@triton.jit
def apply_backward_kernel(
    v, beta, inverse, dv_new, du, dv, d_factor, chunks,
    HV: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du = Tᵀ dv_new (of β v, also what the other gradients start from), dv = β du, and β's part from v."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    factor = _load_column(beta + h, row0, rows, HV)
    matrix = tl.trans(_load(inverse + slot * L * L, 0, L, L, 0, L))
    along = tl.zeros((L,), dtype=tl.float32)
    for v0 in range(0, V, L):
        grad = _load(dv_new + slot * L * V, 0, L, V, v0, V).to(tl.float32)
        grad = _dot(matrix, grad, PRECISION)
        _store(du + slot * L * V, grad, 0, L, V, v0, V)
        _store(dv + h * V, grad * factor[:, None], row0, rows, HV * V, v0, V)
        along += tl.sum(grad * _load(v + h * V, row0, rows, HV * V, v0, V).to(tl.float32), 1)
    tl.store(d_factor + slot * L + tl.arange(0, L), along)


@triton.jit
def pair_backward_kernel(
    q, k, q_norm, k_norm, beta, d_o, v_new, du, gates, d_qk, d_kk, d_gates, d_factor, chunks, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORMALISE: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the two 64×64 products q kᵀ and k kᵀ, and what passes through them to G and β."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    q += (h // (HV // H)) * K
    k += (h // (HV // H)) * K
    d_scores = tl.zeros((L, L), dtype=tl.float32)
    d_lower = tl.zeros((L, L), dtype=tl.float32)
    for v0 in range(0, V, STEP):
        value = tl.trans(_load_wide(v_new + slot * L * V, 0, L, V, v0, V, STEP))
        grad = _load_wide(d_o + h * V, row0, rows, HV * V, v0, V, STEP)
        d_scores += _dot(grad, value, PRECISION)
        d_lower -= _dot(_load_wide(du + slot * L * V, 0, L, V, v0, V, STEP), value, PRECISION)
    decay = _decay(_load_column(gates, slot * L, L, 1))
    i = tl.arange(0, L)
    below = i[:, None] > i[None, :]
    factor = _load_column(beta + h, row0, rows, HV)
    d_scores *= decay * scale
    d_lower = tl.where(below, d_lower * decay, 0.0)
    scores = tl.zeros((L, L), dtype=tl.float32)
    overlap = tl.zeros((L, L), dtype=tl.float32)
    for k0 in range(0, K, STEP):
        key = _load_wide(k, row0, rows, H * K, k0, K, STEP)
        scores += _dot(_load_wide(q, row0, rows, H * K, k0, K, STEP), tl.trans(key), PRECISION)
        overlap += _dot(key, tl.trans(key), PRECISION)
    norm = _load_norm(k_norm + h // (HV // H), row0, rows, H, NORMALISE)
    scores *= _load_norm(q_norm + h // (HV // H), row0, rows, H, NORMALISE)[:, None] * norm[None, :]
    overlap *= d_lower * (norm[:, None] * norm[None, :])
    pair = tl.where(below, d_scores * scores, 0.0) + overlap * factor[:, None]
    tl.store(d_gates + slot * L + i, tl.sum(pair, 1) - tl.sum(pair, 0))
    tl.store(d_factor + slot * L + i, tl.sum(overlap, 1))
    _store(d_qk + slot * L * L, d_scores, 0, L, L, 0, L)
    _store(d_kk + slot * L * L, d_lower * factor[:, None], 0, L, L, 0, L)


@triton.jit
def qk_backward_kernel(
    q, k, q_norm, k_norm, beta, d_o, v_new, du, states, d_states, gates, d_qk, d_kk, dq, dk, parts, through, chunks,
    slots, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, NORMALISE: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of 64 key columns, one value head ([B·T, HV, K]).

    `parts` [tile of K, 3, C·HV, 64] gets the columns' shares for the gates ahead, the gates behind, and β;
    `through` [tile of K, C·HV] that of the whole chunk's decay.
    """
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    k0 = tl.program_id(1) * L
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    from_q = tl.zeros((L, L), dtype=tl.float32)
    from_w = tl.zeros((L, L), dtype=tl.float32)
    from_s = tl.zeros((L, L), dtype=tl.float32)
    overlap = tl.zeros((L,), dtype=tl.float32)
    for v0 in range(0, V, STEP):
        state = _load_wide(states + slot * K * V, k0, K - k0, V, v0, V, STEP)
        d_state = _load_wide(d_states + slot * K * V, k0, K - k0, V, v0, V, STEP)
        overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        grad = _load_wide(d_o + h * V, row0, rows, HV * V, v0, V, STEP)
        from_q += _dot(grad, tl.trans(state), PRECISION)
        grad = _load_wide(du + slot * L * V, 0, L, V, v0, V, STEP)
        from_w -= _dot(grad, tl.trans(state), PRECISION)
        value = _load_wide(v_new + slot * L * V, 0, L, V, v0, V, STEP)
        from_s += _dot(value, tl.trans(d_state), PRECISION)
    gate = _load_column(gates, slot * L, L, 1)
    last = tl.load(gates + slot * L + L - 1)
    factor = _load_column(beta + h, row0, rows, HV)
    query = _load(q + (h // (HV // H)) * K, row0, rows, H * K, k0, K)
    key = _load(k + (h // (HV // H)) * K, row0, rows, H * K, k0, K)
    norm_q = _load_norm(q_norm + h // (HV // H), row0, rows, H, NORMALISE)
    norm_k = _load_norm(k_norm + h // (HV // H), row0, rows, H, NORMALISE)
    from_q *= (tl.exp(gate) * scale)[:, None]
    from_w *= tl.exp(gate)[:, None]
    from_s *= tl.exp(last - gate)[:, None]
    d_factor = tl.sum(from_w * key.to(tl.float32), 1) * norm_k
    ahead = tl.sum(from_q * query.to(tl.float32), 1) * norm_q + d_factor * factor
    behind = tl.sum(from_s * key.to(tl.float32), 1) * norm_k
    tile = tl.program_id(1).to(tl.int64)
    at = parts + (tile * 3 * slots + slot) * L + tl.arange(0, L)
    tl.store(at, ahead)
    tl.store(at + slots * L, behind)
    tl.store(at + 2 * slots * L, d_factor)
    tl.store(through + tile * slots + slot, tl.sum(overlap, 0) * tl.exp(last))
    from_s += from_w * factor[:, None]
    at_q, at_k = d_qk + slot * L * L, d_kk + slot * L * L
    q += (h // (HV // H)) * K
    k += (h // (HV // H)) * K
    for j0 in range(0, L, STEP):
        left = rows - j0
        inner_q = _load_slice(q_norm + h // (HV // H), row0 + j0, left, H, NORMALISE, STEP)
        inner_k = _load_slice(k_norm + h // (HV // H), row0 + j0, left, H, NORMALISE, STEP)
        part = _load_rows(k, row0, rows, H * K, k0, K, j0, STEP)
        pair = _load_wide(at_q, 0, L, L, j0, L, STEP)
        from_q += _dot(_scaled(pair, inner_k), part, PRECISION)
        pair = tl.trans(_load_rows(at_q, 0, L, L, 0, L, j0, STEP))
        from_s += _dot(_scaled(pair, inner_q), _load_rows(q, row0, rows, H * K, k0, K, j0, STEP), PRECISION)
        pair = _load_wide(at_k, 0, L, L, j0, L, STEP).to(tl.float32)
        pair += tl.trans(_load_rows(at_k, 0, L, L, 0, L, j0, STEP)).to(tl.float32)
        from_s += _dot(_scaled(pair, inner_k).to(part.dtype), part, PRECISION)
    _store(dq + h * K, from_q, row0, rows, HV * K, k0, K)
    _store(dk + h * K, from_s, row0, rows, HV * K, k0, K)


@triton.jit
def gates_backward_kernel(
    parts, through, d_gates, from_pair, from_v, dg, d_beta, chunks, slots,
    HV: tl.constexpr, TILES: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Sum the shares of the key tiles; turn the gradient of G into that of g (sums from and up to each row)."""
    slot = tl.program_id(0).to(tl.int64)
    c, h = slot // HV, slot % HV
    row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    if rows == 0:
        return
    i = tl.arange(0, L)
    ahead = tl.load(d_gates + slot * L + i)
    grad = tl.load(from_pair + slot * L + i) + tl.load(from_v + slot * L + i)
    behind = tl.zeros((L,), dtype=tl.float32)
    whole = 0.0
    for tile in tl.static_range(TILES):
        at = parts + (tile * 3 * slots + slot) * L + i
        ahead += tl.load(at)
        behind += tl.load(at + slots * L)
        grad += tl.load(at + 2 * slots * L)
        whole += tl.load(through + tile * slots + slot)
    inside = i < rows
    tl.store(d_beta + (row0 + i) * HV + h, grad.to(d_beta.dtype.element_ty), mask=inside)
    if HAS_GATE:
        total = tl.sum(tl.where(i[None, :] >= i[:, None], ahead[None, :], 0.0), 1)
        total += tl.sum(tl.where(i[None, :] < i[:, None], behind[None, :], 0.0), 1) + whole
        tl.store(dg + (row0 + i) * HV + h, total.to(dg.dtype.element_ty), mask=inside)
