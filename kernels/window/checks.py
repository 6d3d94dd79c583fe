"""Argument checks of the window operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape
from fla_swap.kernels.window.state import WindowState, check_state


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    valid: Tensor | None,
) -> None:
    if q.ndim != 4:
        raise KernelError(f"q must have shape (B, T, H, K), got {tuple(q.shape)}")
    batch, steps, heads, key_dim = q.shape
    check_shape("k", k, (batch, steps, None, key_dim))
    check_shape("v", v, (batch, steps, k.shape[2], None))
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise KernelError(f"q's {heads} heads must be a multiple of k's {k.shape[2]}")
    if window is not None and window < 1:
        raise KernelError(f"window must be at least 1 (it counts the token itself) or None, got {window}")
    if softcap is not None and softcap <= 0:
        raise KernelError(f"softcap must be positive or None, got {softcap}")
    for name, tensor in (("sinks", sinks), ("alibi", alibi)):
        if tensor is not None:
            check_shape(name, tensor, (heads,))
    if valid is not None:
        check_shape("valid", valid, (batch, steps))
        if valid.dtype != torch.bool:
            raise KernelError(f"valid must be bool (True: the token counts), got {valid.dtype}")


def check_initial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: WindowState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> None:
    check_cu_seqlens(cu_seqlens, q.shape[0], q.device)
    if window is None and (state is not None or output_final_state):
        raise KernelError("window=None keeps no constant-size state: use a key/value cache, or give a window")
    if state is not None and window is not None:
        check_state(state, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k, v, window)
