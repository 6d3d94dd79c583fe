"""Argument checks of the scans."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape

CHUNK = 64
"""Rows from one state that `selective_scan` keeps for its backward to the next."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_input(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """(B, T, D, N sequences) of x [B,T,D]; KernelError when x or the bounds are not what a scan takes."""
    if x.ndim != 3:
        raise KernelError(f"x must have shape (B, T, D), got {tuple(x.shape)}")
    batch, time, width = x.shape
    if time < 1:
        raise KernelError(f"x must have at least one step, got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise KernelError(f"x must be floating point, got {x.dtype}")
    check_cu_seqlens(cu_seqlens, batch, x.device)
    return batch, time, width, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_others(x: Tensor, expected: Mapping[str, tuple[Tensor | None, tuple[int | None, ...]]]) -> None:
    """Raise KernelError unless every tensor given has its shape, and x's device."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        check_shape(name, tensor, shape)
        if tensor.device != x.device:
            raise KernelError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise KernelError(f"{name} must be floating point, got {tensor.dtype}")


def check_triton(chosen: str, *tensors: Tensor | None) -> None:
    """Raise KernelError for dtypes that only the Triton kernels cannot take."""
    for tensor in tensors:
        if chosen == "triton" and tensor is not None and tensor.dtype not in TRITON_DTYPES:
            raise KernelError(f"implementation='triton' takes fp32, bf16 or fp16, got {tensor.dtype}; use 'torch'")


def check_in_place(state: Tensor) -> None:
    if not state.is_contiguous():
        raise KernelError("state must be contiguous: it is updated in place")


def state_dtype(x: Tensor) -> torch.dtype:
    """What states are computed and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
