"""`hgrn`: a gated linear recurrence of every channel on its own. HGRN, 2311.04823.

    h_t = exp(g_t) h_{t−1} + x_t

Legend for shapes: B batch, T time, D channels, N sequences (B, or the number of packed ones).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.scan.checks import check_in_place, check_input, check_others, check_triton, state_dtype
from fla_swap.kernels.scan.reference import hgrn_reference


def hgrn(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(g_t) h_{t−1} + x_t, channel by channel. HGRN, 2311.04823.

    Args:
        x: [B,T,D], fp32, bf16 or fp16 (float64 with "torch" and "reference").
        g: [B,T,D], natural log of the decay before each step, ≤ 0; fp32 or x's dtype.
        initial_state: [N,D], fp32; None means zero.
        output_final_state: also return the state after the last step.
        cu_seqlens: [N+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (h, final_state): h [B,T,D] in x's dtype; final_state [N,D] in fp32, or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    chosen = choose_implementation(implementation, x.device)
    _check(x, g, initial_state, cu_seqlens)
    if chosen == "reference":
        return hgrn_reference(
            x, g, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
    check_triton(chosen, x, g, initial_state)
    h, final_state = hgrn_fwd(x, g, initial_state, cu_seqlens, chosen)
    return h, final_state if output_final_state else None


def hgrn_step(x: Tensor, g: Tensor, *, state: Tensor, implementation: str | None = None) -> Tensor:
    """`hgrn` for decoding: T from 1 to a handful, `state` [B,D] (contiguous) updated in place; no gradient.

    Returns h [B,T,D] in x's dtype.
    """
    chosen = choose_implementation(implementation, x.device)
    _check(x, g, state, None)
    check_in_place(state)
    if chosen == "reference":
        h, final = hgrn_reference(x, g, initial_state=state, output_final_state=True)
        assert final is not None
        state.copy_(final)
        return h
    check_triton(chosen, x, g, state)
    return hgrn_step_op(x, g, state, chosen)


def _check(x: Tensor, g: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    batch, time, width, sequences = check_input(x, cu_seqlens)
    check_others(x, {"g": (g, (batch, time, width)), "the state": (state, (sequences, width))})


def _implementation(name: str) -> ModuleType:
    if name == "triton":
        from fla_swap.kernels.scan import triton_impl

        return triton_impl
    from fla_swap.kernels.scan import torch_impl

    return torch_impl


@torch.library.custom_op("fla_swap::hgrn_fwd", mutates_args=())
def hgrn_fwd(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    """The operator behind `hgrn`: (h, final state)."""
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(implementation).hgrn_forward(x, g, initial_state, cu_seqlens)


@hgrn_fwd.register_fake
def _hgrn_fwd_fake(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((sequences, x.shape[2]), dtype=state_dtype(x))


@torch.library.custom_op("fla_swap::hgrn_bwd", mutates_args=())
def hgrn_bwd(
    g: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, g and the initial state (empty without one), from the outputs h."""
    with torch.autocast(h.device.type, enabled=False):
        dx, dg, dstate = _implementation(implementation).hgrn_backward(
            g, h, initial_state, cu_seqlens, out_grad, final_grad
        )
    return dx, dg, h.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype)


@hgrn_bwd.register_fake
def _hgrn_bwd_fake(
    g: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    state = h.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return h.new_empty(h.shape), g.new_empty(g.shape), state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, g, initial_state, cu_seqlens, implementation = inputs
    ctx.save_for_backward(g, output[0], initial_state, cu_seqlens)
    ctx.implementation = implementation
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, out_grad: Tensor | None, final_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    g, h, initial_state, cu_seqlens = ctx.saved_tensors
    if out_grad is None:
        out_grad = h.new_zeros(h.shape)
    dx, dg, dstate = hgrn_bwd(g, h, initial_state, cu_seqlens, out_grad, final_grad, ctx.implementation)
    return dx, dg, None if initial_state is None else dstate, None, None


hgrn_fwd.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("fla_swap::hgrn_step", mutates_args=("state",))
def hgrn_step_op(x: Tensor, g: Tensor, state: Tensor, implementation: str) -> Tensor:
    """The operator behind `hgrn_step`."""
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(implementation).hgrn_step(x, g, state)


@hgrn_step_op.register_fake
def _hgrn_step_fake(x: Tensor, g: Tensor, state: Tensor, implementation: str) -> Tensor:
    return x.new_empty(x.shape)
