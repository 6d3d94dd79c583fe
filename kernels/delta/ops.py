"""The (gated) delta rule as an operator: argument checks, custom ops, fakes and gradients.

    S_t = (I − β_t k_t k_tᵀ) exp(g_t) S_{t−1} + β_t k_t v_tᵀ,    o_t = scale · S_tᵀ q_t

Delta rule: Schlag et al. 2102.11174, chunked by Yang et al. 2406.06484; gated: Yang, Kautz, Hatamizadeh 2412.06464;
with a gate per key channel: Kimi Linear 2510.26692. One op serves them all: g is absent, [B, T, HV] or [B, T, HV, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.delta import torch_impl
from fla_swap.kernels.delta.checks import check_inputs, check_runnable, check_sequences, check_state
from fla_swap.kernels.delta.reference import gated_delta_rule_reference


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences, in chunks (Gated DeltaNet, 2412.06464).

    Args:
        q, k: [B, T, H, K]. Keys should have unit norm where β can exceed 1 (see `qk_l2norm`).
        v: [B, T, HV, V], HV a multiple of H: value head hv reads q/k head hv // (HV // H). Same dtype as q and k.
        g: [B, T, HV] natural log of the decay, ≤ 0, or None for no decay.
        beta: [B, T, HV], the writing strength, 0 to 2.
        scale: factor on q; None means K**-0.5.
        initial_state: [N, HV, K, V]; N = B, or the number of packed sequences. None means zeros.
        output_final_state: also return the last state.
        cu_seqlens: [N+1] int32 or int64, packed sequences (then B = 1). Rows after cu_seqlens[-1] give zeros.
        qk_l2norm: divide q and k by sqrt(‖x‖² + 1e-6) in fp32 first.
        implementation: "reference", "torch", "triton", or None for Triton on a GPU and PyTorch on a CPU.
    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in fp32 (None unless asked for).
    Raises:
        KernelError: wrong shapes, dtypes or devices, or an implementation that cannot run here.
    """
    check_inputs(q, k, v, g, beta)
    options = scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, implementation
    return _sequences(q, k, v, g, beta, *options)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Delta rule over whole sequences (DeltaNet, 2406.06484): `gated_delta_rule` without a decay."""
    return gated_delta_rule(
        q,
        k,
        v,
        None,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        implementation=implementation,
    )


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Decode: T tokens (one to a handful) token by token, updating `state` [B, HV, K, V] (fp32) in place.

    Other arguments as in `gated_delta_rule`; no gradient. Returns o [B, T, HV, V] in v's dtype.
    """
    check_inputs(q, k, v, g, beta)
    return _tokens(q, k, v, g, beta, state, scale, qk_l2norm, implementation)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Decode for `delta_rule`: `gated_delta_rule_step` without a decay."""
    return gated_delta_rule_step(
        q, k, v, None, beta, state=state, scale=scale, qk_l2norm=qk_l2norm, implementation=implementation
    )


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi delta attention (2510.26692): the gated delta rule with a decay per key channel.

    S_t = (I − β_t k_t k_tᵀ) diag(exp g_t) S_{t−1} + β_t k_t v_tᵀ. g is [B, T, HV, K], natural log, ≤ 0; all else is as
    in `gated_delta_rule`.
    """
    check_inputs(q, k, v, g, beta, channels=True)
    options = scale, initial_state, output_final_state, cu_seqlens, qk_l2norm, implementation
    return _sequences(q, k, v, g, beta, *options)


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    qk_l2norm: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Decode for `kda`: as `gated_delta_rule_step`, with g [B, T, HV, K]."""
    check_inputs(q, k, v, g, beta, channels=True)
    return _tokens(q, k, v, g, beta, state, scale, qk_l2norm, implementation)


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor | None]:
    check_sequences(q, v, initial_state, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    check_runnable(choose_implementation(implementation, q.device), q, v)
    if implementation == "reference":
        return gated_delta_rule_reference(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=qk_l2norm,
        )
    tensors = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    o, final, *_ = _forward_op(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, output_final_state, save, implementation
    )
    return o, final if output_final_state else None


def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float | None,
    qk_l2norm: bool,
    implementation: str | None,
) -> Tensor:
    check_state(q, v, state)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = choose_implementation(implementation, q.device)
    if chosen == "reference":
        o, final = gated_delta_rule_reference(
            q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True, qk_l2norm=qk_l2norm
        )
        assert final is not None
        state.copy_(final)
        return o
    check_runnable(chosen, q, v)
    return _step_op(q, k, v, g, beta, state, scale, qk_l2norm, implementation)


@torch.library.custom_op("fla_swap::gated_delta_rule_fwd", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    output_final_state: bool,
    save: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, and what backward needs); what was not asked for is empty.

    Backward needs (inverse, chunk-start states, v_new, nothing) in PyTorch, `triton_impl.Kept` in Triton.
    """
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.delta import triton_impl

            o, final, kept = triton_impl.forward(*inputs, output_final_state, save)
        else:
            o, final, *kept = torch_impl.forward(*inputs)
            kept = (*kept, _nothing(final))
    inverse, states, v_new, rows = kept if save else (_nothing(final) for _ in kept)
    return o, final if output_final_state else _nothing(final), inverse, states, v_new, rows


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


@_forward_op.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, output_final_state, save, implementation):
    batch, total, _, width = q.shape
    heads, value_width = v.shape[2:]
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks, length = torch_impl.chunk_count(total, sequences), torch_impl.CHUNK
    dtype = torch.promote_types(q.dtype, torch.float32)
    final = q.new_empty(batch if sequences is None else sequences, heads, width, value_width, dtype=dtype)
    count = chunks * batch * heads * length  # 2-D, so that a single chunk is not a size-1 dimension to guard on
    inverse, rows = final.new_empty(count, length), final.new_empty(0)
    if choose_implementation(implementation, q.device) == "triton":
        inverse, states = q.new_empty(2 * count, length), q.new_empty(count, length)
        v_new = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        if g is None or g.ndim == 3:
            rows = final.new_empty(3 * count)
    else:
        states = final.new_empty(chunks + 1, batch, heads, width, value_width)
        v_new = final.new_empty(count, value_width)
    kept = (inverse, states, v_new, rows)
    if not save:
        kept = tuple(final.new_empty(0) for _ in kept)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return o, final if output_final_state else final.new_empty(0), *kept


@torch.library.custom_op("fla_swap::gated_delta_rule_bwd", mutates_args=())
def _backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor,
    states: Tensor,
    v_new: Tensor,
    rows: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, initial_state; empty for those that are None."""
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens)
    if not inverse.numel():  # a graph exported for inference is being trained: nothing was saved
        _, _, inverse, states, v_new, rows = _forward_op(*inputs, scale, qk_l2norm, False, True, implementation)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.delta import triton_impl

            grads = triton_impl.backward(
                *inputs, triton_impl.Kept(inverse, states, v_new, rows), d_o, d_final, scale, qk_l2norm
            )
        else:
            grads = torch_impl.backward(*inputs, inverse, states, v_new, d_o, d_final, scale, qk_l2norm)
    d_q, d_k, d_v, d_g, d_beta, d_initial = grads
    return (
        d_q,
        d_k,
        d_v,
        _nothing(q) if d_g is None else d_g,
        d_beta,
        _nothing(q) if d_initial is None else d_initial,
    )


@_backward_op.register_fake
def _(q, k, v, g, beta, initial_state, *_):
    inputs = (q, k, v, g, beta, initial_state)
    return tuple(q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _save(ctx, inputs, output) -> None:
    q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, has_final, _, implementation = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])
    ctx.scale, ctx.qk_l2norm, ctx.has_final, ctx.implementation = scale, qk_l2norm, has_final, implementation
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_final, *_):
    saved = ctx.saved_tensors
    v, g, initial_state = saved[2], saved[3], saved[5]
    if d_o is None:
        d_o = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    grads = _backward_op(*saved, d_o, d_final if ctx.has_final else None, ctx.scale, ctx.qk_l2norm, ctx.implementation)
    d_q, d_k, d_v, d_g, d_beta, d_initial = grads
    none = (None,) * 6
    return d_q, d_k, d_v, None if g is None else d_g, d_beta, None if initial_state is None else d_initial, *none


_forward_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fla_swap::gated_delta_rule_step", mutates_args=("state",))
def _step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
    implementation: str | None,
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.delta import triton_impl

            return triton_impl.step(q, k, v, g, beta, state, scale, qk_l2norm)
        return torch_impl.step(q, k, v, g, beta, state, scale, qk_l2norm)


@_step_op.register_fake
def _(q, k, v, g, beta, state, scale, qk_l2norm, implementation):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)
