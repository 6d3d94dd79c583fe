"""Triton for `slot_softmax`: one pass over memory each way. Imported only when Triton is chosen."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.launching import Configuration, Launch, Recorder, launch_now

ROWS = 32


@triton.jit
def slot_softmax_kernel(scores, p, N, M: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Grid: N / R."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    place = rows[:, None] * M + columns[None, :]
    x = tl.load(scores + place, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(tl.where(inside, x, -1e38), 1)[:, None])
    total = tl.sum(x, 1)
    x = x / tl.where(rows < N, total, 1.0)[:, None]
    tl.store(p + place, x.to(p.dtype.element_ty), mask=inside)


@triton.jit
def slot_softmax_grad_kernel(p, grad, out, N, M: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Grid: N / R."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    place = rows[:, None] * M + columns[None, :]
    weight = tl.load(p + place, mask=inside, other=0.0).to(tl.float32)
    dp = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    result = weight * (dp - tl.sum(weight * dp, 1)[:, None])
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def _shape(x: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    slots = x.shape[-1]
    rows = x.numel() // slots
    return (-(-rows // ROWS),), {"N": rows, "M": slots, "BLOCK": max(2, 1 << (slots - 1).bit_length()), "R": ROWS}


def forward(scores: Tensor, launch: Launch = launch_now) -> Tensor:
    scores = scores.contiguous()
    p = torch.empty_like(scores)
    grid, shape = _shape(scores)
    launch(slot_softmax_kernel, grid, 4, 1, scores=scores, p=p, **shape)
    return p


def backward(p: Tensor, grad: Tensor, launch: Launch = launch_now) -> Tensor:
    out = torch.empty_like(p)
    grid, shape = _shape(p)
    launch(slot_softmax_grad_kernel, grid, 4, 1, p=p, grad=grad.contiguous(), out=out, **shape)
    return out


def configurations() -> Iterator[Configuration]:
    """Kernels as shipped, bf16 and fp32, for 64 slots."""
    record = Recorder()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(1, 128, 2, 64, dtype=dtype, device="meta")
        forward(x, launch=record)
        backward(x, x, launch=record)
    yield from record.found.values()
