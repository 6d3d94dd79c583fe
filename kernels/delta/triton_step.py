"""The Triton kernel of the gated delta rule's decode step. Names as in `triton_kernels.py`."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.delta.triton_tiles import EPS


@triton.jit(do_not_specialize=["tokens"])
def step_kernel(
    q, k, v, g, beta, state, o, tokens, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Token by token on one head's state, BV value columns, in place."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // HV, pid % HV
    i = tl.arange(0, BK)
    d = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = (i < K)[:, None] & (d < V)[None, :]
    at = state + pid * K * V + i[:, None] * V + d[None, :]
    s = tl.load(at, mask=inside, other=0.0)
    for t in range(0, tokens):
        row = b * tokens + t
        query = tl.load(q + (row * H + h // (HV // H)) * K + i, mask=i < K, other=0.0).to(tl.float32)
        key = tl.load(k + (row * H + h // (HV // H)) * K + i, mask=i < K, other=0.0).to(tl.float32)
        value = tl.load(v + (row * HV + h) * V + d, mask=d < V, other=0.0).to(tl.float32)
        if NORMALISE:
            query *= tl.rsqrt(tl.sum(query * query, 0) + EPS)
            key *= tl.rsqrt(tl.sum(key * key, 0) + EPS)
        if GATE == 1:
            s *= tl.exp(tl.load(g + row * HV + h).to(tl.float32))
        if GATE == 2:
            gate = tl.load(g + (row * HV + h) * K + i, mask=i < K, other=0.0).to(tl.float32)
            s *= tl.exp(gate)[:, None]
        value -= tl.sum(s * key[:, None], 0)
        value *= tl.load(beta + row * HV + h).to(tl.float32)
        s += key[:, None] * value[None, :]
        result = tl.sum(s * query[:, None], 0) * scale
        tl.store(o + (row * HV + h) * V + d, result.to(o.dtype.element_ty), mask=d < V)
    tl.store(at, s, mask=inside)
