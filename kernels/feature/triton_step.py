"""The decode step of `based` and `rebased` in Triton: features, state and output in one pass over the state."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.feature.maps import feature_count
from fla_swap.kernels.feature.triton_kernels import _names
from fla_swap.kernels.launching import Configuration, Launch, Recorder, launch_now

NUMBERS = 8192
"""Of the state, held by a program at a time."""
WARPS = 4


@triton.jit
def _channel(x, index, K: tl.constexpr):
    """Channels `index` of the row at x, one for the index K, zero beyond: fp32."""
    one = (index == K).to(x.dtype.element_ty)
    return tl.load(x + index, mask=index < K, other=one).to(tl.float32)


@triton.jit(do_not_specialize=["T", "H"])
def step_kernel(
    q, k, v, valid, state, sums, o, T, H, scale, eps,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TAYLOR: tl.constexpr,
):  # fmt: skip
    """One program: one head of one sequence, T tokens one after another; C features of the state at a time."""
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // H, row % H
    values = tl.arange(0, BV)
    for step in range(0, T):
        token = (sequence * T + step) * H + head
        value = tl.load(v + token * V + values, mask=values < V, other=0.0).to(tl.float32)
        counts = 1.0
        if valid is not None:
            counts = tl.load(valid + sequence * T + step).to(tl.float32)
        above = tl.zeros([BV], tl.float32)
        below = 0.0
        for first in range(0, F, C):
            features = first + tl.arange(0, C)
            a, b, c = _names(features, scale, K, TAYLOR)
            key = _channel(k + token * K, a, K) * _channel(k + token * K, b, K) * counts
            query = _channel(q + token * K, a, K) * _channel(q + token * K, b, K) * c
            inside = (features < F)[:, None] & (values < V)[None, :]
            place = state + row * F * V + (features[:, None] * V + values[None, :])
            tile = tl.load(place, mask=inside, other=0.0) + key[:, None] * value[None, :]
            total = tl.load(sums + row * F + features, mask=features < F, other=0.0) + key
            tl.store(place, tile, mask=inside)
            tl.store(sums + row * F + features, total, mask=features < F)
            above += tl.sum(query[:, None] * tile, 0)
            below += tl.sum(query * total, 0)
        tl.store(o + token * V + values, (above / (below + eps)).to(o.dtype.element_ty), mask=values < V)
        tl.debug_barrier()


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    sums: Tensor,
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    launch: Launch = launch_now,
) -> Tensor:
    """o [B,T,H,V]; state [B,H,F,V] and sums [B,H,F], fp32 and contiguous, are updated in place."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"implementation='triton' takes fp32, bf16 or fp16, got {q.dtype}; use 'torch'")
    for name, part in (("the state", state), ("the normaliser's state", sums)):
        if part.dtype != torch.float32 or not part.is_contiguous():
            raise KernelError(f"{name} must be fp32 and contiguous, got {part.dtype} with strides {part.stride()}")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, time, heads, width = q.shape
    o = torch.empty_like(v)
    block = 1 << (v.shape[3] - 1).bit_length()
    launch(
        step_kernel, (batch * heads,), WARPS, 1,
        q=q, k=k, v=v, valid=None if valid is None else valid.contiguous().view(torch.uint8), state=state, sums=sums,
        o=o, T=time, H=heads, scale=scale, eps=eps, K=width, V=v.shape[3], F=feature_count(width, taylor=taylor),
        C=max(16, NUMBERS // block), BV=block, TAYLOR=taylor,
    )  # fmt: skip
    return o


def configurations() -> Iterator[Configuration]:
    """The kernel as shipped, bf16 and fp32, V 64, 128 and 256."""
    record = Recorder()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 256):
            for taylor in (True, False):
                features = feature_count(16, taylor=taylor)
                q, k, v = (new(2, 1, 4, size, dtype=dtype) for size in (16, 16, width))
                state, sums = new(2, 4, features, width), new(2, 4, features)
                valid = None if taylor else new(2, 1, dtype=torch.bool)
                step(q, k, v, state, sums, valid, 0.25, 1e-6, taylor, launch=record)
    yield from record.found.values()
