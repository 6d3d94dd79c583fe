"""Gated decay per channel: `gla`. GLA: Gated Linear Attention Transformers, 2312.06635. One per head: `simple_ops`.

    S_t = diag(exp g_t) S_{t-1} diag(exp gv_t) + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

Legend for shapes: B batch, T time, H query and key heads, HV value heads (a multiple of H), K key width, V value
width, N sequences (B, or the number of packed ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.decay.checks import check_arguments, check_triton, expand_heads
from fla_swap.kernels.decay.reference import gla_reference


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention whose state decays per key channel (`g`) and per value channel (`gv`). GLA, 2312.06635.

    Args:
        q, k: [B,T,H,K], fp32, bf16 or fp16 (float64 with "torch" and "reference"); K at most 256 with "triton".
        v: [B,T,HV,V], the same dtype, HV a multiple of H. The state has HV heads.
        g: [B,T,H,K] or [B,T,HV,K], natural log of the decay before each step, ≤ 0; fp32 or q's dtype. None: no decay.
        gv: [B,T,HV,V], the same on the value side.
        scale: factor on the output; None means K^-0.5.
        initial_state: [N,HV,K,V], fp32; None means zero.
        output_final_state: also return the state after the last step.
        cu_seqlens: [N+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (o, final_state): o [B,T,HV,V] in q's dtype; final_state [N,HV,K,V] in fp32, or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    chosen = choose_implementation(implementation, q.device)
    check_arguments(q, k, v, g, gv, initial_state, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        return gla_reference(
            q,
            k,
            v,
            g,
            gv=gv,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    check_triton(chosen, q)
    heads = v.shape[2]
    q, k = expand_heads(q, heads), expand_heads(k, heads)
    g = None if g is None else expand_heads(g, heads)
    tensors = (q, k, v, g, gv, None, initial_state)
    o, final_state, *_ = gla_fwd(*tensors, cu_seqlens, scale, output_final_state, wants_gradient(*tensors), chosen)
    return o, final_state if output_final_state else None


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    state: Tensor,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`gla` for decoding: T from 1 to a handful, `state` [B,HV,K,V] (fp32, contiguous) updated in place.

    Other arguments as for `gla`; no gradient. Returns o [B,T,HV,V] in q's dtype.
    """
    chosen = choose_implementation(implementation, q.device)
    check_arguments(q, k, v, g, gv, state, None)
    if not state.is_contiguous():
        raise KernelError("state must be contiguous: it is updated in place")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    heads = v.shape[2]
    q, k = expand_heads(q, heads), expand_heads(k, heads)
    g = None if g is None else expand_heads(g, heads)
    if chosen == "reference":
        o, final = gla_reference(q, k, v, g, gv=gv, scale=scale, initial_state=state, output_final_state=True)
        assert final is not None
        state.copy_(final)
        return o
    check_triton(chosen, q)
    return gla_step_op(q, k, v, g, gv, None, state, scale, chosen)


def _implementation(name: str) -> ModuleType:
    if name == "triton":
        from fla_swap.kernels.decay import triton_impl

        return triton_impl
    from fla_swap.kernels.decay import torch_impl

    return torch_impl


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will call the backward."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, v.shape[2], q.shape[3], v.shape[3]


Maybe6 = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


NOTHING: Maybe6 = (None, None, None, None, None, None)


def _given(like: Tensor, kept: Maybe6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Custom ops return tensors only: empty ones where there is nothing."""
    a, b, c, d, e, f = (like.new_empty(0) if x is None else x for x in kept)
    return a, b, c, d, e, f


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fla_swap::gla_fwd", mutates_args=())
def gla_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    save: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator behind `gla` and, with u, `rwkv6` (equal head counts).

    Returns (o, final state, and with `save` what backward would compute again: `triton_impl.Kept`); what was not asked
    for is empty.
    """
    inputs = (q, k, v, g, gv, u, initial_state, cu_seqlens, scale)
    kept: Maybe6 = NOTHING
    with torch.autocast(q.device.type, enabled=False):
        if implementation == "triton":
            from fla_swap.kernels.decay import triton_impl

            o, final_state, kept = triton_impl.forward(*inputs, save=save)
        else:
            o, final_state = _implementation(implementation).forward(*inputs)
    return o, final_state if output_final_state else final_state.new_empty(0), *_given(q, kept)


@gla_fwd.register_fake
def _gla_fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    save: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = _state_shape(q, v, cu_seqlens) if output_final_state else (0,)
    kept: Maybe6 = NOTHING
    if save and implementation == "triton":
        from fla_swap.kernels.decay import triton_impl

        kept = triton_impl.empty_kept(q, v, g, gv, u, cu_seqlens)
    return v.new_empty(v.shape, dtype=q.dtype), q.new_empty(shape, dtype=_state_dtype(q)), *_given(q, kept)


@torch.library.custom_op("fla_swap::gla_bwd", mutates_args=())
def gla_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gla_fwd` with respect to q, k, v, g, gv, u and the initial state (empty where one is None).

    `kept`: what `gla_fwd` returned beyond o and the final state.
    """
    inputs = (q, k, v, g, gv, u, initial_state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):
        if implementation == "triton":
            from fla_swap.kernels.decay import triton_impl

            given = triton_impl.Kept(*(x if x.numel() else None for x in kept))
            grads = triton_impl.backward(*inputs, out_grad, final_grad, scale, kept=given)
        else:
            grads = _implementation(implementation).backward(*inputs, out_grad, final_grad, scale)
    dq, dk, dv, dg, dgv, du, dstate = grads
    empty = q.new_empty(0)
    return (
        dq,
        dk,
        dv,
        empty if dg is None else dg,
        empty.clone() if dgv is None else dgv,
        empty.clone() if du is None else du,
        empty.clone() if initial_state is None else dstate.to(initial_state.dtype),
    )


@gla_bwd.register_fake
def _gla_bwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Sequence[Tensor],
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(gv), like(u), like(initial_state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, output_final_state, _, implementation = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale, ctx.output_final_state, ctx.implementation = scale, output_final_state, implementation
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, out_grad: Tensor | None, final_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, gv, u, initial_state, cu_seqlens, *kept = ctx.saved_tensors
    if out_grad is None:
        out_grad = v.new_zeros(v.shape)
    if not ctx.output_final_state:
        final_grad = None
    inputs = (q, k, v, g, gv, u, initial_state, cu_seqlens)
    dq, dk, dv, dg, dgv, du, dstate = gla_bwd(*inputs, kept, out_grad, final_grad, ctx.scale, ctx.implementation)
    return (
        dq,
        dk,
        dv,
        None if g is None else dg,
        None if gv is None else dgv,
        None if u is None else du,
        None if initial_state is None else dstate,
        *(None,) * 5,
    )


gla_fwd.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("fla_swap::gla_step", mutates_args=("state",))
def gla_step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    state: Tensor,
    scale: float,
    implementation: str,
) -> Tensor:
    """The operator behind `gla_step` and, with u, `rwkv6_step` (equal head counts)."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(implementation).step(q, k, v, g, gv, u, state, scale)


@gla_step_op.register_fake
def _gla_step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    state: Tensor,
    scale: float,
    implementation: str,
) -> Tensor:
    return v.new_empty(v.shape, dtype=q.dtype)
