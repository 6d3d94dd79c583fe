"""RWKV6's recurrence: `gla` whose output reads the state before the step, and the step itself through a bonus u.

    o_t = scale · (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t        S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ

Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, 2404.05892. Shapes as in `ops`.
"""

from __future__ import annotations

from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_shape, choose_implementation
from fla_swap.kernels.decay.checks import check_arguments, check_triton, expand_heads
from fla_swap.kernels.decay.ops import gla_fwd, gla_step_op, wants_gradient
from fla_swap.kernels.decay.reference import rwkv6_reference


def rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a decay per key channel and a bonus for the current step. RWKV6, 2404.05892.

    Args:
        q, k: [B,T,H,K], fp32, bf16 or fp16 (float64 with "torch" and "reference"); K at most 256 with "triton".
        v: [B,T,HV,V], the same dtype, HV a multiple of H. The state has HV heads.
        g: [B,T,H,K] or [B,T,HV,K], natural log of the decay, ≤ 0 (RWKV6: −exp(w)); fp32 or q's dtype.
        u: [H,K], any float dtype: the weight of the current step's k v in its own output.
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
    check_arguments(q, k, v, g, None, initial_state, cu_seqlens)
    _check_bonus(q, u)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        return rwkv6_reference(
            q,
            k,
            v,
            g,
            u,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    check_triton(chosen, q)
    heads = v.shape[2]
    q, k, g = (expand_heads(x, heads) for x in (q, k, g))
    u = u.repeat_interleave(heads // u.shape[0], 0)
    tensors = (q, k, v, g, None, u, initial_state)
    o, final_state, *_ = gla_fwd(*tensors, cu_seqlens, scale, output_final_state, wants_gradient(*tensors), chosen)
    return o, final_state if output_final_state else None


def rwkv6_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    state: Tensor,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`rwkv6` for decoding: T from 1 to a handful, `state` [B,HV,K,V] (fp32, contiguous) updated in place.

    Other arguments as for `rwkv6`; no gradient. Returns o [B,T,HV,V] in q's dtype.
    """
    chosen = choose_implementation(implementation, q.device)
    check_arguments(q, k, v, g, None, state, None)
    _check_bonus(q, u)
    if not state.is_contiguous():
        raise KernelError("state must be contiguous: it is updated in place")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        o, final = rwkv6_reference(q, k, v, g, u, scale=scale, initial_state=state, output_final_state=True)
        assert final is not None
        state.copy_(final)
        return o
    check_triton(chosen, q)
    heads = v.shape[2]
    q, k, g = (expand_heads(x, heads) for x in (q, k, g))
    u = u.repeat_interleave(heads // u.shape[0], 0)
    return gla_step_op(q, k, v, g, None, u, state, scale, chosen)


def _check_bonus(q: Tensor, u: Tensor) -> None:
    check_shape("u", u, (q.shape[2], q.shape[3]))
    if u.device != q.device:
        raise KernelError(f"u must be on {q.device} like q, got {u.device}")
    if not u.dtype.is_floating_point:
        raise KernelError(f"u must be floating point, got {u.dtype}")
