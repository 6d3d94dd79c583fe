"""Attention whose similarity is a polynomial of q·k, in linear time: `based` and `rebased`.

    o_t = Σ_{j≤t} sim(q_t, k_j) v_j / (Σ_{j≤t} sim(q_t, k_j) + eps)

Based, 2402.18668: sim = 1 + s + s²/2 with s = scale · q·k, the exponential's Taylor series. Rebased, 2402.10644: s².

Legend for shapes: B batch, T time, H heads, K key width, V value width, F features (`maps.feature_count`), N sequences
(B, or the number of packed ones).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape, choose_implementation
from fla_swap.kernels.feature.maps import feature_count, key_features, query_features
from fla_swap.kernels.feature.normalised import normalised
from fla_swap.kernels.feature.reference import based_reference, rebased_reference
from fla_swap.kernels.feature.step import step

FeatureState = tuple[Tensor, Tensor]
MAX_WIDTH = 16


def based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: FeatureState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, FeatureState | None]:
    """Attention with the similarity 1 + s + s²/2, s = scale · q·k. Based, 2402.18668.

    Args:
        q, k: [B,T,H,K], fp32, bf16 or fp16 (float64 with "torch" and "reference"); K at most 16 with "triton".
        v: [B,T,H,V], the same dtype.
        scale: factor on q·k; None means K^-0.5.
        eps: added to the denominator.
        initial_state: (S [N,H,F,V], z [N,H,F]), fp32: sums over the tokens so far of the keys' features (the order is
            that of `maps.channels`) times the values, and of the features alone; None means zero.
        output_final_state: also return the state after the last step.
        cu_seqlens: [N+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        valid: bool [B,T], the keys that count (padding does not: it would add its 1 to the denominator); the output of
            a token that does not count is arbitrary.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (o, final_state): o [B,T,H,V] in q's dtype; the final (S, z), or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    o, _, state = attend(
        q,
        k,
        v,
        taylor=True,
        scale=scale,
        eps=eps,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        valid=valid,
        implementation=implementation,
    )
    return o, state


def rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: FeatureState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, FeatureState | None]:
    """Attention with the similarity s², s = scale · q·k. Rebased, 2402.10644 (whose learned map of q and k, with its
    norm, comes before: it is part of the mixer). Arguments as for `based`."""
    o, _, state = attend(
        q,
        k,
        v,
        taylor=False,
        scale=scale,
        eps=eps,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        valid=valid,
        implementation=implementation,
    )
    return o, state


def based_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: FeatureState,
    scale: float | None = None,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`based` for decoding: T from 1 to a handful, both parts of the state (fp32, contiguous) updated in place.

    Other arguments as for `based`; no gradient. Returns o [B,T,H,V] in q's dtype.
    """
    return _step(q, k, v, state, scale, eps, valid, implementation, taylor=True)


def rebased_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: FeatureState,
    scale: float | None = None,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`rebased` for decoding; see `based_step`."""
    return _step(q, k, v, state, scale, eps, valid, implementation, taylor=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    taylor: bool,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: FeatureState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, FeatureState | None]:
    """`based` (`taylor`) or `rebased`, with the denominators [B,T,H] (without eps; not of the reference)."""
    chosen = choose_implementation(implementation, q.device)
    check_arguments(q, k, v, initial_state, cu_seqlens, taylor=taylor)
    if valid is not None:
        check_shape("valid", valid, tuple(q.shape[:2]))
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen == "triton":
        check_triton(q)
        initial, initial_sum = initial_state or (None, None)
        o, den, final, final_sum = feature_fwd(
            q, k, v, initial, initial_sum, cu_seqlens, valid, factor, float(eps), taylor, output_final_state
        )
        return o, den, (final, final_sum) if output_final_state else None
    options = {"eps": eps, "initial_state": initial_state, "output_final_state": output_final_state}
    if chosen == "reference":
        reference = based_reference if taylor else rebased_reference
        o, state = reference(q, k, v, scale=factor, cu_seqlens=cu_seqlens, valid=valid, **options)
        return o, o.new_empty(0), state
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    counts = _counted(q, cu_seqlens, valid)
    if counts is not None:
        q, k, v = (torch.where(counts, x, 0) for x in (q, k, v))
    mapped_q = query_features(q.to(dtype), scale=factor, taylor=taylor)
    mapped_k = key_features(k.to(dtype), taylor=taylor)
    mapped_k = mapped_k if counts is None else mapped_k * counts
    return normalised(mapped_q, mapped_k, v, cu_seqlens=cu_seqlens, implementation="torch", **options)


def _counted(q: Tensor, cu_seqlens: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """bool [B or 1,T,1,1]: the tokens that count; None: all."""
    if cu_seqlens is None:
        return None if valid is None else valid[:, :, None, None]
    inside = torch.arange(q.shape[1], device=q.device)[None] < cu_seqlens[-1]
    return (inside if valid is None else inside & valid)[:, :, None, None]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState,
    scale: float | None,
    eps: float,
    valid: Tensor | None,
    implementation: str | None,
    *,
    taylor: bool,
) -> Tensor:
    check_arguments(q, k, v, state, None, taylor=taylor)
    if valid is not None:
        check_shape("valid", valid, tuple(q.shape[:2]))
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    return step(q, k, v, state, factor, eps, valid, implementation, taylor=taylor)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, state: FeatureState | None, cu_seqlens: Tensor | None, *, taylor: bool
) -> None:
    """Raise KernelError unless shapes, dtypes and devices fit together (see `based`)."""
    if q.ndim != 4:
        raise KernelError(f"q must have shape (B, T, H, K), got {tuple(q.shape)}")
    batch, time, heads, width = q.shape
    if time < 1:
        raise KernelError(f"q must have at least one step, got shape {tuple(q.shape)}")
    check_shape("k", k, (batch, time, heads, width))
    check_shape("v", v, (batch, time, heads, None))
    check_cu_seqlens(cu_seqlens, batch, q.device)
    if state is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        features = feature_count(width, taylor=taylor)
        check_shape("the state", state[0], (sequences, heads, features, v.shape[3]))
        check_shape("the normaliser's state", state[1], (sequences, heads, features))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise KernelError(f"{name} must be on {q.device} like q, got {tensor.device}")
        if tensor.dtype != q.dtype:
            raise KernelError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")


def check_triton(q: Tensor) -> None:
    """Raise KernelError for what only the Triton kernels cannot take."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(f"implementation='triton' takes fp32, bf16 or fp16, got {q.dtype}; use 'torch'")
    if q.shape[3] > MAX_WIDTH:
        raise KernelError(
            f"implementation='triton' takes K up to {MAX_WIDTH} ({feature_count(MAX_WIDTH, taylor=True)} features), "
            f"got {q.shape[3]}; use 'torch', or map q and k to fewer channels first"
        )


@torch.library.custom_op("fla_swap::feature_fwd", mutates_args=())
def feature_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the denominators [B,T,H], and the final state (both parts empty unless asked for), by Triton."""
    from fla_swap.kernels.feature import triton_impl

    o, den, final, final_sum = triton_impl.forward(
        q, k, v, initial, initial_sum, cu_seqlens, valid, scale, eps, taylor, output_final_state
    )
    if final is None or final_sum is None or not output_final_state:
        return o, den, den.new_empty(0), den.new_empty(0)
    return o, den, final, final_sum


@feature_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead = (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, q.shape[2])
    features = feature_count(q.shape[3], taylor=taylor)
    shapes = ((*lead, features, v.shape[3]), (*lead, features)) if output_final_state else ((0,), (0,))
    den = q.new_empty(q.shape[:3], dtype=torch.float32)
    state = [q.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return v.new_empty(v.shape), den, state[0], state[1]


@torch.library.custom_op("fla_swap::feature_bwd", mutates_args=())
def feature_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    o: Tensor,
    den: Tensor,
    out_grad: Tensor,
    den_grad: Tensor | None,
    final_grad: Tensor | None,
    final_sum_grad: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of both parts of the initial state (empty where there is none)."""
    from fla_swap.kernels.feature import triton_impl

    dq, dk, dv, ds, dz = triton_impl.backward(
        q,
        k,
        v,
        initial,
        initial_sum,
        cu_seqlens,
        valid,
        o,
        den,
        out_grad,
        den_grad,
        final_grad,
        final_sum_grad,
        scale,
        eps,
        taylor,
    )
    if initial is None or initial_sum is None or ds is None or dz is None:
        return dq, dk, dv, den.new_empty(0), den.new_empty(0)
    return dq, dk, dv, ds.to(initial.dtype), dz.to(initial_sum.dtype)


@feature_bwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    o: Tensor,
    den: Tensor,
    out_grad: Tensor,
    den_grad: Tensor | None,
    final_grad: Tensor | None,
    final_sum_grad: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    parts = [q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (initial, initial_sum)]
    return dq, dk, dv, parts[0], parts[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, eps, taylor, output_final_state = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.options, ctx.output_final_state = (scale, eps, taylor), output_final_state
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, out_grad: Tensor | None, den_grad: Tensor | None, final_grad: Tensor | None, final_sum_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, o, den = ctx.saved_tensors
    if out_grad is None:
        out_grad = torch.zeros_like(o)
    if not ctx.output_final_state:
        final_grad = final_sum_grad = None
    if final_grad is None and final_sum_grad is not None:
        final_grad = final_sum_grad.new_zeros(*final_sum_grad.shape, o.shape[3])
    if final_sum_grad is None and final_grad is not None:
        final_sum_grad = final_grad.new_zeros(final_grad.shape[:3])
    gradients = feature_bwd(*tensors, o, den, out_grad, den_grad, final_grad, final_sum_grad, *ctx.options)
    dq, dk, dv, ds, dz = gradients
    has_state = tensors[3] is not None
    return dq, dk, dv, ds if has_state else None, dz if has_state else None, *(None,) * 6


feature_fwd.register_autograd(_autograd, setup_context=_setup_context)
