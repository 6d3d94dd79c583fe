"""`selective_scan`: Mamba's state space layer, whose step, input and output depend on the token. Mamba, 2312.00752.

    δ_t = softplus(dt_t + dt_bias)                         h_t = exp(δ_t A) h_{t−1} + δ_t x_t B_tᵀ     [D, N]
    y_t = (h_t C_t + D x_t) · silu(z_t)

Legend for shapes: B batch, T time, D channels, N states of a channel, S sequences (B, or the number of packed ones).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.scan.checks import CHUNK, check_in_place, check_input, check_others, check_triton, state_dtype
from fla_swap.kernels.scan.reference import selective_scan_reference


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba's selective scan; decays and inputs of the recurrence are never stored. Mamba, 2312.00752.

    Args:
        x: [B,T,D], fp32, bf16 or fp16 (float64 with "torch" and "reference").
        dt: [B,T,D], steps ≥ 0 after `dt_bias` and softplus.
        A: [D,N], rates ≤ 0; exp(δ A) is the decay.
        B, C: [B,T,N], what is written to and read from the states.
        D: [D], weight of x in the output, or None.
        z: [B,T,D], the output is multiplied by silu(z), or None.
        dt_bias: [D], added to dt, or None. dt_softplus: δ = softplus(dt + dt_bias).
        initial_state: [S,D,N], fp32; None means zero.
        output_final_state: also return the state after the last step.
        cu_seqlens: [S+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (y, final_state): y [B,T,D] in x's dtype; final_state [S,D,N] in fp32, or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    chosen = choose_implementation(implementation, x.device)
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    if chosen == "reference":
        return selective_scan_reference(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    check_triton(chosen, x, dt, A, B, C, D, z, dt_bias, initial_state)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, final_state, _ = selective_scan_fwd(*tensors, cu_seqlens, dt_softplus, keep, chosen)
    return y, final_state if output_final_state else None


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """`selective_scan` for decoding: T from 1 to a handful, `state` [B,D,N] (contiguous) updated in place; no gradient.

    Other arguments as for `selective_scan`. Returns y [B,T,D] in x's dtype.
    """
    chosen = choose_implementation(implementation, x.device)
    _check(x, dt, A, B, C, D, z, dt_bias, state, None)
    check_in_place(state)
    if chosen == "reference":
        y, final = selective_scan_reference(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_state=state,
            output_final_state=True,
        )
        assert final is not None
        state.copy_(final)
        return y
    check_triton(chosen, x, dt, A, B, C, D, z, dt_bias, state)
    return selective_scan_step_op(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, chosen)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    batch, time, width, sequences = check_input(x, cu_seqlens)
    check_others(x, {"A": (A, (width, None))})
    states = A.shape[1]
    line, mixed = (batch, time, width), (batch, time, states)
    check_others(x, {"dt": (dt, line), "z": (z, line), "B": (B, mixed), "C": (C, mixed)})
    check_others(x, {"D": (D, (width,)), "dt_bias": (dt_bias, (width,))})
    check_others(x, {"the state": (state, (sequences, width, states))})


def _implementation(name: str) -> ModuleType:
    if name == "triton":
        from fla_swap.kernels.scan import triton_impl

        return triton_impl
    from fla_swap.kernels.scan import torch_impl

    return torch_impl


@torch.library.custom_op("fla_swap::selective_scan_fwd", mutates_args=())
def selective_scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind `selective_scan`: y, the final state, and the states [B,M,N,D] before every CHUNK-th row
    (in x's dtype, flat: a dimension of M would be specialised; empty unless `keep`)."""
    with torch.autocast(x.device.type, enabled=False):
        y, final, saved = _implementation(implementation).selective_forward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, keep
        )
    return y, final, saved


@selective_scan_fwd.register_fake
def _fwd_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty((sequences, width, A.shape[1]), dtype=state_dtype(x))
    size = batch * ((time + CHUNK - 1) // CHUNK) * A.shape[1] * width if keep else 0
    return x.new_empty(x.shape), final, x.new_empty(size)


@torch.library.custom_op("fla_swap::selective_scan_bwd", mutates_args=())
def selective_scan_bwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    out_grad: Tensor,
    final_grad: Tensor | None,
    dt_softplus: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state (empty where the input is None)."""
    with torch.autocast(x.device.type, enabled=False):
        grads = _implementation(implementation).selective_backward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, saved, out_grad, final_grad, dt_softplus
        )
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    pairs = zip(grads, inputs, strict=True)
    return tuple(x.new_empty(0) if i is None else g.to(i.dtype).contiguous() for g, i in pairs)  # type: ignore[return-value]


@selective_scan_bwd.register_fake
def _bwd_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    out_grad: Tensor,
    final_grad: Tensor | None,
    dt_softplus: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(x.new_empty(0) if i is None else i.new_empty(i.shape) for i in inputs)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dt_softplus, _, implementation = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.dt_softplus, ctx.implementation = dt_softplus, implementation
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, out_grad: Tensor | None, final_grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, saved = ctx.saved_tensors
    if out_grad is None:
        out_grad = x.new_zeros(x.shape)
    grads = selective_scan_bwd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_state,
        cu_seqlens,
        saved,
        out_grad,
        final_grad,
        ctx.dt_softplus,
        ctx.implementation,
    )
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    given = (None if i is None else g for g, i in zip(grads, inputs, strict=True))
    return (*given, None, None, None, None)


selective_scan_fwd.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("fla_swap::selective_scan_step", mutates_args=("state",))
def selective_scan_step_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    implementation: str,
) -> Tensor:
    """The operator behind `selective_scan_step`."""
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(implementation).selective_step(x, dt, A, B, C, D, z, dt_bias, state, dt_softplus)


@selective_scan_step_op.register_fake
def _step_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    implementation: str,
) -> Tensor:
    return x.new_empty(x.shape)
