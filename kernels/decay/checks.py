"""Argument checks of the decay operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape

MAX_WIDTH = 256


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise KernelError unless shapes, dtypes and devices fit together (see `ops.gla`)."""
    if q.ndim != 4:
        raise KernelError(f"q must have shape (B, T, H, K), got {tuple(q.shape)}")
    batch, time, heads, width = q.shape
    if time < 1:
        raise KernelError(f"q must have at least one step, got shape {tuple(q.shape)}")
    check_shape("k", k, (batch, time, heads, width))
    check_shape("v", v, (batch, time, None, None))
    value_heads, value_width = v.shape[2], v.shape[3]
    if value_heads % heads:
        raise KernelError(f"v must have a multiple of q's {heads} heads, got {value_heads}")
    if g is not None:
        check_shape("g", g, (batch, time, value_heads if g.ndim > 2 and g.shape[2] == value_heads else heads, width))
    if gv is not None:
        check_shape("gv", gv, (batch, time, value_heads, value_width))
    check_cu_seqlens(cu_seqlens, batch, q.device)
    if state is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape("the state", state, (sequences, value_heads, width, value_width))
    named = {"k": k, "v": v, "g": g, "gv": gv, "the state": state}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != q.device:
            raise KernelError(f"{name} must be on {q.device} like q, got {tensor.device}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise KernelError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if not q.dtype.is_floating_point:
        raise KernelError(f"q, k, v must be floating point, got {q.dtype}")


def check_triton(chosen: str, q: Tensor) -> None:
    """Raise KernelError for what only the Triton kernels cannot take."""
    if chosen != "triton":
        return
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"implementation='triton' takes fp32, bf16 or fp16, got {q.dtype}; use 'torch'")
    if q.shape[3] > MAX_WIDTH:
        raise KernelError(f"implementation='triton' takes K up to {MAX_WIDTH}, got {q.shape[3]}; use 'torch'")


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head so that `heads` heads remain in order: [B,T,H,D] → [B,T,heads,D]."""
    if x.shape[2] == heads:
        return x
    batch, time, own, width = x.shape
    return x.unsqueeze(3).expand(batch, time, own, heads // own, width).reshape(batch, time, heads, width)
