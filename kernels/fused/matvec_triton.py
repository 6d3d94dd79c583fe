"""Triton kernels of matrices times few tokens. Names as in `matvec.py`."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _one_of(place, n0, n1, n2, n3, n4, a0, a1, a2, a3, a4, a5):
    """The one of six whose turn `place` is: a0 up to n0, then a1 up to n1, …"""
    late = tl.where(place < n3, a3, tl.where(place < n4, a4, a5))
    return tl.where(place < n0, a0, tl.where(place < n1, a1, tl.where(place < n2, a2, late)))


@triton.jit
def _find(pid, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, e0, e1, e2, e3, e4, e5, BN: tl.constexpr):
    """The matrix of a program, its bias, where its rows begin and end in o, the program's block of them, its bit."""
    n0 = tl.cdiv(e0, BN)
    n1 = n0 + tl.cdiv(e1 - e0, BN)
    n2 = n1 + tl.cdiv(e2 - e1, BN)
    n3 = n2 + tl.cdiv(e3 - e2, BN)
    n4 = n3 + tl.cdiv(e4 - e3, BN)
    w = _one_of(pid, n0, n1, n2, n3, n4, w0, w1, w2, w3, w4, w5)
    b = _one_of(pid, n0, n1, n2, n3, n4, b0, b1, b2, b3, b4, b5)
    first = _one_of(pid, n0, n1, n2, n3, n4, 0, e0, e1, e2, e3, e4)
    end = _one_of(pid, n0, n1, n2, n3, n4, e0, e1, e2, e3, e4, e5)
    local = pid - _one_of(pid, n0, n1, n2, n3, n4, 0, n0, n1, n2, n3, n4)
    bit = _one_of(pid, n0, n1, n2, n3, n4, 1, 2, 4, 8, 16, 32)
    return w, b, first, end, local, bit


@triton.jit
def _rounded(y, o):
    """y in o's dtype, and back."""
    return y.to(o.dtype.element_ty).to(tl.float32)


@triton.jit
def _open(y, y1, o, ACT: tl.constexpr):
    """act(y) · y1, rounded where PyTorch rounds."""
    y = _rounded(y, o)
    if ACT == 1:
        y = y * tl.sigmoid(y)
    else:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2 * inner)
    return _rounded(y, o) * _rounded(y1, o)


@triton.jit
def matvec_kernel(
    x, scale, residual, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, o, e0, e1, e2, e3, e4, e5, total, eps,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    BIASED: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of one of up to six matrices times one token.

    e0 … e5: where each matrix's rows end in o (equal to `total` from the last one on). ACT: o is
    act(w0 · x) · (w1 · x), with SiLU (1) or GELU by its tanh (2). NORM: x is divided by its root mean square and
    multiplied by scale + OFFSET first. BIASED: bit i, whether matrix i has a bias. PDL: the kernel may start before the
    one before it has ended, and reads only weights until that has.
    """
    pid = tl.program_id(0)
    w, b, first, end, local, bit = w0, b0, 0, e0, pid, 1
    if ACT == 0:
        w, b, first, end, local, bit = _find(
            pid, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, e0, e1, e2, e3, e4, e5, BN
        )
    row = local * BN + tl.arange(0, BN)
    inside = first + row < end
    k = tl.arange(0, BK)
    at = w + tl.minimum(row, end - first - 1)[:, None] * K + k[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    square = tl.zeros((BK,), tl.float32)
    if ACT > 0:
        also = w1 + tl.minimum(row, end - first - 1)[:, None] * K + k[None, :]
        acc1 = tl.zeros((BN, BK), tl.float32)
    if PDL:
        head = tl.load(at, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
        if ACT > 0:
            head1 = tl.load(also, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
        gdc_wait()
        gdc_launch_dependents()
    for start in tl.static_range(0, K, BK):
        valid = start + k < K
        if PDL and start == 0:
            tile = head
        else:
            tile = tl.load(at + start, mask=valid[None, :], other=0.0, eviction_policy="evict_first")
        token = tl.load(x + start + k, mask=valid, other=0.0).to(tl.float32)
        if NORM > 0:
            square += token * token
            token *= tl.load(scale + start + k, mask=valid, other=0.0).to(tl.float32) + OFFSET
        acc += tile.to(tl.float32) * token[None, :]
        if ACT > 0:
            if PDL and start == 0:
                tile = head1
            else:
                tile = tl.load(also + start, mask=valid[None, :], other=0.0, eviction_policy="evict_first")
            acc1 += tile.to(tl.float32) * token[None, :]
    y = tl.sum(acc, 1)
    if NORM > 0:
        length = tl.rsqrt(tl.sum(square, 0) / K + eps)
        y *= length
    if BIASED > 0 and ACT == 0:
        y += tl.load(b + row, mask=inside & ((bit & BIASED) > 0), other=0.0).to(tl.float32)
    if ACT > 0:
        y1 = tl.sum(acc1, 1)
        if NORM > 0:
            y1 *= length
        y = _open(y, y1, o, ACT)
    if residual is not None:
        y = _rounded(y, o) + tl.load(residual + first + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(o + first + row, y.to(o.dtype.element_ty), mask=inside)


@triton.jit
def matmul_kernel(
    x, scale, residual, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, o, e0, e1, e2, e3, e4, e5, total, eps, rows,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, BIASED: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """As `matvec_kernel`, for up to BM tokens, on the tensor cores. x [rows, K], o and residual [rows, total]."""
    pid = tl.program_id(0)
    w, b, first, end, local, bit = w0, b0, 0, e0, pid, 1
    if ACT == 0:
        w, b, first, end, local, bit = _find(
            pid, w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5, e0, e1, e2, e3, e4, e5, BN
        )
    row = local * BN + tl.arange(0, BN)
    inside = first + row < end
    k = tl.arange(0, BK)
    m = tl.arange(0, BM)
    at = w + tl.minimum(row, end - first - 1)[:, None] * K + k[None, :]
    token_at = x + tl.minimum(m, rows - 1)[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    if ACT > 0:
        also = w1 + tl.minimum(row, end - first - 1)[:, None] * K + k[None, :]
        acc1 = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        tile = tl.load(at + start)
        token = tl.load(token_at + start)
        if NORM > 0:
            wide = token.to(tl.float32)
            square += tl.sum(wide * wide, 0)
            token = (wide * (tl.load(scale + start + k).to(tl.float32) + OFFSET)[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(tile, token, acc)
        if ACT > 0:
            acc1 = tl.dot(tl.load(also + start), token, acc1)
    if NORM > 0:
        length = tl.rsqrt(square / K + eps)[None, :]
        acc *= length
    if BIASED > 0 and ACT == 0:
        acc += tl.load(b + row, mask=inside & ((bit & BIASED) > 0), other=0.0).to(tl.float32)[:, None]
    if ACT > 0:
        if NORM > 0:
            acc1 *= length
        acc = _open(acc, acc1, o, ACT)
    out = m[None, :] * total + (first + row)[:, None]
    mask = inside[:, None] & (m < rows)[None, :]
    if residual is not None:
        acc = _rounded(acc, o) + tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(o + out, acc.to(o.dtype.element_ty), mask=mask)
