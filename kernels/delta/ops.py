"""The (gated) delta rule as an operator: argument checks, custom ops, fakes and gradients.

    S_t = (I − β_t k_t k_tᵀ) exp(g_t) S_{t−1} + β_t k_t v_tᵀ,    o_t = scale · S_tᵀ q_t

Delta rule: Schlag et al. 2102.11174, chunked by Yang et al. 2406.06484; gated: Yang, Kautz, Hatamizadeh 2412.06464.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape, choose_implementation
from fla_swap.kernels.delta import torch_impl
from fla_swap.kernels.delta.reference import gated_delta_rule_reference

MAX_HEAD_DIM = 256  # of the Triton kernels


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
    _check(q, k, v, g, beta)
    check_cu_seqlens(cu_seqlens, q.shape[0], q.device)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, v.shape[2], q.shape[3], v.shape[3]))
        _check_device("initial_state", initial_state, q)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    _check_runnable(choose_implementation(implementation, q.device), q, v)
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
    _check(q, k, v, g, beta)
    check_shape("state", state, (q.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    _check_device("state", state, q)
    wanted = torch.promote_types(q.dtype, torch.float32)
    if state.dtype != wanted:
        raise KernelError(f"state must be {wanted}, got {state.dtype}; keep recurrent states in fp32")
    if not state.is_contiguous():
        raise KernelError("state must be contiguous, as it is updated in place")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = choose_implementation(implementation, q.device)
    if chosen == "reference":
        o, final = gated_delta_rule_reference(
            q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True, qk_l2norm=qk_l2norm
        )
        assert final is not None
        state.copy_(final)
        return o
    _check_runnable(chosen, q, v)
    return _step_op(q, k, v, g, beta, state, scale, qk_l2norm, implementation)


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


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor) -> None:
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
        _check_device(name, tensor, q)
    if g is not None:
        check_shape("g", g, (batch, total, value_heads))
        _check_device("g", g, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise KernelError(f"{name} must be on q's device {q.device}, got {tensor.device}")


def _check_runnable(implementation: str, q: Tensor, v: Tensor) -> None:
    if implementation != "triton":
        return
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        raise KernelError(
            f"the Triton delta rule takes head dims up to {MAX_HEAD_DIM}, got K {q.shape[3]}, V {v.shape[3]}"
        )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"the Triton delta rule takes fp32, bf16 or fp16, got {q.dtype}; use implementation='torch'")


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, inverse, chunk-start states, v_new); what was not asked for, or is recomputed, is empty."""
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.delta import triton_impl

            o, final, inverse = triton_impl.forward(*inputs)
            states = v_new = inverse
            keep_states = False
        else:
            o, final, inverse, states, v_new = torch_impl.forward(*inputs)
            keep_states = save
    return (
        o,
        final if output_final_state else _nothing(final),
        inverse if save else _nothing(final),
        states if keep_states else _nothing(final),
        v_new if keep_states else _nothing(final),
    )


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
    rows = chunks * batch * heads * length  # 2-D, so that a single chunk is not a size-1 dimension to guard on
    states, v_new = final.new_empty(0), final.new_empty(0)
    if choose_implementation(implementation, q.device) != "triton":
        states = final.new_empty(chunks + 1, batch, heads, width, value_width)
        v_new = final.new_empty(rows, value_width)
    kept = (final.new_empty(rows, length), states, v_new)
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
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, initial_state; empty for those that are None."""
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens)
    if not inverse.numel():  # a graph exported for inference is being trained: nothing was saved
        _, _, inverse, states, v_new = _forward_op(*inputs, scale, qk_l2norm, False, True, implementation)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.delta import triton_impl

            grads = triton_impl.backward(*inputs, inverse, d_o, d_final, scale, qk_l2norm)
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
