"""One decay per head: `linear_attention`, `retention`, `simple_gla`.

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

Legend for shapes: B batch, T time, H query and key heads, HV value heads (a multiple of H), K key width, V value
width, N sequences (B, or the number of packed ones).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_shape, choose_implementation
from fla_swap.kernels.decay.checks import check_arguments, check_triton
from fla_swap.kernels.decay.reference import gla_reference


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention without normaliser or decay. Transformers are RNNs, 2006.16236. See `simple_gla`."""
    return _run(q, k, v, None, scale, initial_state, output_final_state, cu_seqlens, implementation)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A fixed decay per value head; other arguments as for `simple_gla`. RetNet, 2307.08621.

    decay [HV], natural log, ≤ 0; None means ln(1 − 2^(−5−h)).
    """
    decay = _decay(decay, v)
    return _run(q, k, v, decay, scale, initial_state, output_final_state, cu_seqlens, implementation)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one decay per value head and step. Mamba2 (2405.21060): q=C, k=B, v=dt·x, g=dt·A, scale=1.

    Args:
        q, k: [B,T,H,K], fp32, bf16 or fp16 (float64 with "torch" and "reference"); K at most 256 with "triton".
        v: [B,T,HV,V], the same dtype, HV a multiple of H. The state has HV heads; q and k are not repeated.
        g: [B,T,HV], natural log of the decay before each step, ≤ 0; fp32 or q's dtype.
        scale: factor on the output, not zero; None means K^-0.5.
        initial_state: [N,HV,K,V], fp32; None means zero.
        output_final_state: also return the state after the last step.
        cu_seqlens: [N+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (o, final_state): o [B,T,HV,V] in q's dtype; final_state [N,HV,K,V] in fp32, or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    check_shape("g", g, tuple(v.shape[:3]))
    return _run(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, implementation)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`linear_attention` for decoding; see `simple_gla_step`."""
    return _step(q, k, v, None, state, scale, implementation)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: Tensor,
    decay: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`retention` for decoding; see `simple_gla_step`."""
    return _step(q, k, v, _decay(decay, v), state, scale, implementation)


def simple_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`simple_gla` for decoding: T from 1 to a handful, `state` [B,HV,K,V] (fp32, contiguous) updated in place.

    Other arguments as for `simple_gla`; no gradient. Returns o [B,T,HV,V] in q's dtype.
    """
    check_shape("g", g, tuple(v.shape[:3]))
    return _step(q, k, v, g, state, scale, implementation)


def retention_decay(heads: int, device: torch.device | str) -> Tensor:
    """RetNet's log decays, fp32 [heads]: ln(1 − 2^(−5−h))."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=torch.float32)))


def _decay(decay: Tensor | None, v: Tensor) -> Tensor:
    if decay is None:
        return retention_decay(v.shape[2], v.device)
    check_shape("decay", decay, (v.shape[2],))
    return decay


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    implementation: str | None,
) -> tuple[str, float]:
    """The implementation and the scale, after all checks."""
    chosen = choose_implementation(implementation, q.device)
    check_arguments(q, k, v, None, None, state, cu_seqlens)
    if g is not None and g.device != q.device:
        raise KernelError(f"the gate must be on {q.device} like q, got {g.device}")
    check_triton(chosen, q)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if factor == 0:
        raise KernelError("scale must not be zero")
    return chosen, factor


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    implementation: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Every operator of this file; g [B,T,HV], or [HV] when it is constant, or None."""
    chosen, factor = _checked(q, k, v, g, initial_state, cu_seqlens, scale, implementation)
    if chosen == "reference":
        return gla_reference(
            q,
            k,
            v,
            _wide(q, v, g),
            scale=factor,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    o, final_state = simple_gla_fwd(q, k, v, g, initial_state, cu_seqlens, factor, output_final_state, chosen)
    return o, final_state if output_final_state else None


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None,
    implementation: str | None,
) -> Tensor:
    chosen, factor = _checked(q, k, v, g, state, None, scale, implementation)
    if not state.is_contiguous():
        raise KernelError("state must be contiguous: it is updated in place")
    if chosen == "reference":
        o, final = gla_reference(q, k, v, _wide(q, v, g), scale=factor, initial_state=state, output_final_state=True)
        assert final is not None
        state.copy_(final)
        return o
    return simple_gla_step_op(q, k, v, g, state, factor, chosen)


def _wide(q: Tensor, v: Tensor, g: Tensor | None) -> Tensor | None:
    """The gate as `gla` takes it, [B,T,HV,K]."""
    return None if g is None else g.expand(v.shape[:3]).unsqueeze(-1).expand(*v.shape[:3], q.shape[3])


def _implementation(name: str, dtype: torch.dtype) -> ModuleType:
    if name == "triton" and dtype == torch.bfloat16:
        from fla_swap.kernels.decay import simple_triton

        return simple_triton
    if name == "triton":
        from fla_swap.kernels.decay import simple_wide

        return simple_wide
    from fla_swap.kernels.decay import simple_torch

    return simple_torch


@torch.library.custom_op("fla_swap::simple_gla_fwd", mutates_args=())
def simple_gla_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The operator behind this file; the final state is empty unless asked for."""
    module = _implementation(implementation, q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        return module.forward(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state)


@simple_gla_fwd.register_fake
def _fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(v.shape, dtype=q.dtype), q.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fla_swap::simple_gla_bwd", mutates_args=())
def simple_gla_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    gate_grad: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty unless `gate_grad`) and the initial state (empty if there is none)."""
    module = _implementation(implementation, q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, dg, dstate = module.backward(
            q, k, v, g, initial_state, cu_seqlens, out_grad, final_grad, scale, gate_grad and g is not None
        )
    dg = q.new_empty(0) if dg is None else dg
    return dq, dk, dv, dg, q.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype)


@simple_gla_bwd.register_fake
def _bwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    gate_grad: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g if gate_grad else None), like(initial_state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, output_final_state, implementation = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.output_final_state, ctx.implementation = scale, output_final_state, implementation
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, out_grad: Tensor | None, final_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    if out_grad is None:
        out_grad = v.new_zeros(v.shape)
    if not ctx.output_final_state:
        final_grad = None
    gate_grad = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, dstate = simple_gla_bwd(
        q, k, v, g, initial_state, cu_seqlens, out_grad, final_grad, ctx.scale, gate_grad, ctx.implementation
    )
    return dq, dk, dv, dg if gate_grad else None, None if initial_state is None else dstate, *(None,) * 4


simple_gla_fwd.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("fla_swap::simple_gla_step", mutates_args=("state",))
def simple_gla_step_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float, implementation: str
) -> Tensor:
    """The operator behind the steps of this file."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(implementation, q.dtype).step(q, k, v, g, state, scale)


@simple_gla_step_op.register_fake
def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float, implementation: str
) -> Tensor:
    return v.new_empty(v.shape, dtype=q.dtype)
