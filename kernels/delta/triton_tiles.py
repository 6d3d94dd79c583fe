"""What the Triton kernels of the delta family share: tiles, products, rows of a chunk, the triangular inverse.

A chunk is 64 tokens; a slot is a (chunk, value head). Token-major arrays are [B·T, heads, D]; scratch arrays are
[slots, 64, …]. Rows past a chunk's end are read as zeros.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

L = tl.constexpr(64)
EPS = tl.constexpr(1e-6)


@triton.jit
def chunk_rows(slot, chunks, T, HV: tl.constexpr, PACKED: tl.constexpr):
    """First row in [B·T, …] and number of rows of a slot's chunk. `chunks` [C, 2] is read for packed sequences only."""
    c = slot // HV
    if PACKED:
        row0, rows = tl.load(chunks + 2 * c), tl.load(chunks + 2 * c + 1)
    else:
        count = (T + L - 1) // L
        row0, rows = (c // count) * T + (c % count) * L, tl.minimum(T - (c % count) * L, L)
    return row0, rows


@triton.jit
def sequence_chunks(n, sequences, T, PACKED: tl.constexpr):
    """First chunk and number of chunks of sequence n."""
    if PACKED:
        first, count = tl.load(sequences + 2 * n), tl.load(sequences + 2 * n + 1)
    else:
        count = ((T + L - 1) // L).to(tl.int64)
        first = n * count
    return first, count


@triton.jit
def tile(x, stride, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr, MASK: tl.constexpr):
    """[ROWS, COLS] from x on; with MASK, zeros past `rows` rows or `width` columns."""
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, COLS)[None, :]
    if MASK:
        return tl.load(x + i * stride + d, mask=(i < rows) & (d < width), other=0.0)
    else:
        return tl.load(x + i * stride + d)


@triton.jit
def put(x, value, stride, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr, MASK: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, COLS)[None, :]
    value = value.to(x.dtype.element_ty)
    if MASK:
        tl.store(x + i * stride + d, value, mask=(i < rows) & (d < width))
    else:
        tl.store(x + i * stride + d, value)


@triton.jit
def column(x, rows, stride):
    """64 numbers, one per row, as fp32."""
    i = tl.arange(0, L)
    return tl.load(x + i * stride, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def put_column(x, value, rows, stride):
    i = tl.arange(0, L)
    tl.store(x + i * stride, value.to(x.dtype.element_ty), mask=i < rows)


@triton.jit
def mm(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32; narrow beside fp32 is widened. "interpreted": Triton's interpreter cannot multiply bf16."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif a.dtype == tl.float32 or b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    else:
        return tl.dot(a, b)


@triton.jit
def mm_add(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    elif a.dtype == tl.float32 or b.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    else:
        return tl.dot(a, b, total)


@triton.jit
def mm_add_wide(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b for an fp32 a: in b's dtype twice, the rounded values and what rounding left."""
    if b.dtype == tl.float32:
        return mm_add(a, b, total, PRECISION)
    else:
        rounded = a.to(b.dtype)
        total = mm_add(rounded, b, total, PRECISION)
        return mm_add((a - rounded.to(tl.float32)).to(b.dtype), b, total, PRECISION)


@triton.jit
def inverse(lower, EXACT: tl.constexpr):
    """(I + lower)⁻¹ [64, 64], lower strictly lower triangular, fp32.

    Diagonal blocks of 8 by forward substitution, all at once; then [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]]
    three times.
    """
    row4 = tl.arange(0, 4)[:, None, None, None]
    column4 = tl.arange(0, 4)[None, None, :, None]
    blocks = tl.reshape(lower, (4, 16, 4, 16))
    diagonal = tl.permute(tl.sum(tl.where(row4 == column4, blocks, 0.0), 2), (0, 2, 1))
    below = tl.sum(tl.where((row4 == column4 + 1) & (column4 % 2 == 0), blocks, 0.0), 2)
    below16 = tl.sum(tl.reshape(below, (2, 2, 16, 16)), 1)
    row2 = tl.arange(0, 2)[:, None, None, None]
    column2 = tl.arange(0, 2)[None, None, :, None]
    below = tl.where(row2 > column2, tl.reshape(lower, (2, 32, 2, 32)), 0.0)
    below32 = tl.sum(tl.sum(below, 2), 0)
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    near = i // 8 == j // 8
    solved = tl.where(i == j, 1.0, 0.0) + tl.zeros((4, 16, 16), dtype=tl.float32)
    inside = tl.where(near, diagonal, 0.0)  # turned: [block, column, row]
    for r in range(1, 8):
        weights = tl.sum(tl.where(j % 8 == r, inside, 0.0), 2)
        found = tl.sum(weights[:, :, None] * solved, 1)
        solved -= tl.where((i % 8 == r) & near, found[:, None, :], 0.0)
    below8 = tl.permute(tl.where(near, 0.0, diagonal), (0, 2, 1))
    solved -= mm(solved, mm(below8, solved, EXACT), EXACT)
    first, second = tl.split(tl.permute(tl.reshape(solved, (2, 2, 16, 16)), (0, 2, 3, 1)))
    corner = -mm(second, mm(below16, first, EXACT), EXACT)
    solved = tl.join(tl.join(first, tl.zeros((2, 16, 16), dtype=tl.float32)), tl.join(corner, second))
    solved = tl.reshape(tl.permute(solved, (0, 4, 1, 3, 2)), (2, 32, 32))
    first, second = tl.split(tl.permute(solved, (1, 2, 0)))
    corner = -mm(second, mm(below32, first, EXACT), EXACT)
    solved = tl.join(tl.join(first, tl.zeros((32, 32), dtype=tl.float32)), tl.join(corner, second))
    return tl.reshape(tl.permute(solved, (3, 0, 2, 1)), (L, L))


@triton.jit
def put_solution(out, lower, scores, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """Store T − I and A T, one above the other [128, 64], for T = (I + lower)⁻¹ and A = scores."""
    solved = inverse(lower, EXACT)
    i = tl.arange(0, L)
    put(out, tl.where(i[:, None] > i[None, :], solved, 0.0), L, L, L, L, L, False)
    put(out + L * L, mm(scores, solved, PRECISION), L, L, L, L, L, False)


@triton.jit
def halves(x):
    """[R, 128] → its left and right 64 columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, L)), (0, 2, 1)))
