"""Argument checks of the delta family's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape

MAX_HEAD_DIM = 256  # of the Triton kernels


def check_inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, *, channels: bool = False) -> None:
    """Shapes, dtypes and devices; `channels`: g has a gate per key channel, [B, T, HV, K]."""
    check_shape("q", q, (None, None, None, None))
    check_shape("v", v, (None, None, None, None))
    batch, total, heads, width = q.shape
    value_heads = v.shape[2]
    check_shape("k", k, (batch, total, heads, width))
    check_shape("v", v, (batch, total, None, None))
    check_shape("beta", beta, (batch, total, value_heads))
    if total == 0:
        raise KernelError("q has no tokens (T = 0); skip the call instead")
    if value_heads % heads:
        raise KernelError(f"v must have a multiple of q's {heads} heads, got {value_heads}")
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise KernelError(f"q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, tensor in (("k", k), ("v", v), ("beta", beta)):
        check_device(name, tensor, q)
    if g is not None:
        check_shape("g", g, (batch, total, value_heads, width) if channels else (batch, total, value_heads))
        check_device("g", g, q)


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise KernelError(f"{name} must be on q's device {q.device}, got {tensor.device}")


def check_runnable(implementation: str, q: Tensor, v: Tensor) -> None:
    if implementation != "triton":
        return
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        raise KernelError(
            f"the Triton delta rule takes head dims up to {MAX_HEAD_DIM}, got K {q.shape[3]}, V {v.shape[3]}"
        )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"the Triton delta rule takes fp32, bf16 or fp16, got {q.dtype}; use implementation='torch'")


def check_sequences(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_cu_seqlens(cu_seqlens, q.shape[0], q.device)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, v.shape[2], q.shape[3], v.shape[3]))
        check_device("initial_state", initial_state, q)


def check_state(q: Tensor, v: Tensor, state: Tensor) -> None:
    """Of a step: the state is updated in place."""
    check_shape("state", state, (q.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    check_device("state", state, q)
    wanted = torch.promote_types(q.dtype, torch.float32)
    if state.dtype != wanted:
        raise KernelError(f"state must be {wanted}, got {state.dtype}; keep recurrent states in fp32")
    if not state.is_contiguous():
        raise KernelError("state must be contiguous, as it is updated in place")
