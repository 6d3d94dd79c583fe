"""Bounded memory: `gsa` and `abc`. Gated Slot Attention, 2409.07146; Attention with Bounded-memory Control, 2110.02488.

A head has M slots that hold a key and a value each. Every step decays the slots by exp g and adds the new key and
value to slot m with weight s_m; a query attends to the slots by softmax:

    A_t = A_{t-1} diag(exp g_t) + k_t s_tᵀ      p_t = softmax(scale · A_tᵀ q_t)
    B_t = diag(exp g_t) B_{t-1} + s_t v_tᵀ      o_t = B_tᵀ p_t

Both are `gla`: the first pass decays the value side, the second the key side.

Legend for shapes: B batch, T time, H key and value heads, HQ query heads (a multiple of H), K key width, V value width,
M slots, N sequences (B, or the number of packed ones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape, choose_implementation
from fla_swap.kernels.decay.ops import gla, gla_step, wants_gradient
from fla_swap.kernels.decay.slot_softmax import slot_softmax
from fla_swap.kernels.decay.slot_writes import slot_writes
from fla_swap.kernels.decay.slots_reference import abc_reference, gsa_reference

SlotState = tuple[Tensor, Tensor]
RunningState = tuple[Tensor, Tensor, Tensor]


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, SlotState | None]:
    """Gated slot attention, 2409.07146.

    Args:
        q: [B,T,HQ,K], fp32, bf16 or fp16 (float64 with "torch" and "reference"); HQ a multiple of H.
        k: [B,T,H,K]. v: [B,T,H,V]; both in q's dtype.
        s: [B,T,H,M], how strongly each slot takes the new key and value (the paper: 1 − exp g); fp32 or q's dtype.
        g: [B,T,H,M], natural log of the slots' decay before each step, ≤ 0; fp32 or q's dtype.
        scale: factor on the scores of the slots; None means K^-0.5.
        initial_state: (A [N,H,K,M], B [N,H,M,V]), fp32; None means zero.
        output_final_state: also return the states after the last step.
        cu_seqlens: [N+1] int32 or int64, bounds of packed sequences (B = 1); rows after the last bound give zero.
        implementation: "reference", "torch" or "triton"; None: Triton on a GPU, PyTorch on a CPU.
    Returns:
        (o, final_state): o [B,T,HQ,V] in q's dtype; the final pair as `initial_state`, or None unless asked for.
    Raises:
        KernelError: a wrong shape, dtype or device, or an implementation that cannot run here.
    """
    chosen = choose_implementation(implementation, q.device)
    check_slots(q, k, v, s, g, cu_seqlens)
    _check_state(initial_state, q, k, v, s, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        return gsa_reference(
            q,
            k,
            v,
            s,
            g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    groups = q.shape[2] // k.shape[2]
    k, v, s, g = (_repeat(x, groups) for x in (k, v, s.to(q.dtype), g))
    keys, values = (None, None) if initial_state is None else (_repeat(x, groups, 1) for x in initial_state)
    _compile(chosen, q, k, v, s, g, (keys, values, None), cu_seqlens)
    scores, keys = gla(
        q,
        k,
        s,
        gv=g,
        scale=scale,
        initial_state=keys,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    o, values = gla(
        slot_softmax(scores, implementation),
        s,
        v,
        g,
        scale=1.0,
        initial_state=values,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    if keys is None or values is None:
        return o, None
    return o, (keys[:, ::groups], values[:, ::groups])


def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    *,
    state: SlotState,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`gsa` for decoding: T from 1 to a handful; both states (fp32, contiguous) are updated in place.

    Other arguments as for `gsa`; no gradient. Returns o [B,T,HQ,V] in q's dtype.
    """
    choose_implementation(implementation, q.device)
    check_slots(q, k, v, s, g, None)
    _check_state(state, q, k, v, s, None)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    groups = q.shape[2] // k.shape[2]
    k, v, s, g = (_first_of_group(x, groups) for x in (k, v, s.to(q.dtype), g))
    line = _group_as_steps(q, groups)
    scores = gla_step(line, k, s, gv=g, state=state[0], scale=scale, implementation=implementation)
    o = gla_step(
        slot_softmax(scores, implementation), s, v, g, state=state[1], scale=1.0, implementation=implementation
    )
    return _steps_as_group(o, groups)


def abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    scale: float | None = None,
    initial_state: RunningState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, RunningState | None]:
    """Attention with bounded-memory control, 2110.02488: slot m holds the mean of all keys and values so far under the
    weights exp s_m (a softmax over time, which restarts with each packed sequence).

    Args:
        s: [B,T,H,M] logits of the weights, fp32 or q's dtype.
        initial_state: (A [N,H,K,M], B [N,H,M,V], running logsumexp of s [N,H,M]), fp32; None means nothing seen: zeros
            and −inf.
    Other arguments and errors as for `gsa`.
    Returns:
        (o, final_state): o [B,T,HQ,V] in q's dtype; the final triple, or None unless asked for.
    """
    chosen = choose_implementation(implementation, q.device)
    check_slots(q, k, v, s, s, cu_seqlens)
    pair, running = (None, None) if initial_state is None else (initial_state[:2], initial_state[2])
    _check_state(pair, q, k, v, s, cu_seqlens)
    if running is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape("the running logsumexp", running, (sequences, *s.shape[2:]))
    options = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    if chosen == "reference":
        return abc_reference(q, k, v, s, initial_state=initial_state, **options)
    _compile(chosen, q, k, v, s, None, (None, None, running), cu_seqlens)
    weights, g, last = slot_writes(s, running, cu_seqlens=cu_seqlens, implementation=implementation)
    o, final = gsa(q, k, v, weights, g, initial_state=pair, implementation=implementation, **options)
    return o, None if final is None else (*final, last)


def abc_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    state: RunningState,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`abc` for decoding: T from 1 to a handful; the three states (fp32, contiguous) are updated in place.

    Other arguments as for `abc`; no gradient. Returns o [B,T,HQ,V] in q's dtype.
    """
    check_slots(q, k, v, s, s, None)
    check_shape("the running logsumexp", state[2], (q.shape[0], *s.shape[2:]))
    with torch.no_grad():
        weights, g, last = slot_writes(s, state[2], implementation=implementation)
        o = gsa_step(q, k, v, weights, g, state=state[:2], scale=scale, implementation=implementation)
        state[2].copy_(last)
    return o


def check_slots(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise KernelError unless shapes, dtypes and devices fit together (see `gsa`)."""
    if q.ndim != 4 or k.ndim != 4:
        raise KernelError(f"q and k must have shape (B, T, heads, K), got {tuple(q.shape)} and {tuple(k.shape)}")
    batch, time, query_heads, width = q.shape
    heads = k.shape[2]
    if time < 1:
        raise KernelError(f"q must have at least one step, got shape {tuple(q.shape)}")
    if heads < 1 or query_heads % heads:
        raise KernelError(f"q's {query_heads} heads must be a multiple of k's {heads}")
    check_shape("k", k, (batch, time, heads, width))
    check_shape("v", v, (batch, time, heads, None))
    check_shape("s", s, (batch, time, heads, None))
    check_shape("g", g, tuple(s.shape))
    check_cu_seqlens(cu_seqlens, batch, q.device)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise KernelError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    for name, tensor in (("k", k), ("v", v), ("s", s), ("g", g)):
        if tensor.device != q.device:
            raise KernelError(f"{name} must be on {q.device} like q, got {tensor.device}")


def _check_state(
    state: SlotState | None, q: Tensor, k: Tensor, v: Tensor, s: Tensor, cu_seqlens: Tensor | None
) -> None:
    if state is None:
        return
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, slots = s.shape[2:]
    check_shape("the keys' state", state[0], (sequences, heads, k.shape[3], slots))
    check_shape("the values' state", state[1], (sequences, heads, slots, v.shape[3]))


def _compile(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    states: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    """Have all kernels of a first call compiled at once. Arguments as in `slots_triton.compile_slots`."""
    if chosen == "triton" and not torch.compiler.is_compiling():
        from fla_swap.kernels.decay.slots_triton import compile_slots

        compile_slots(q, k, v, s, g, states, cu_seqlens, save=wants_gradient(q, k, v, s, g, *states))


def _repeat(x: Tensor, groups: int, dim: int = 2) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim)


def _first_of_group(x: Tensor, groups: int) -> Tensor:
    """[B,T,H,D] → [B,T·G,H,D]: each step followed by G − 1 steps that change nothing (zero key, value and gate)."""
    if groups == 1:
        return x
    batch, time, heads, width = x.shape
    out = x.new_zeros(batch, time, groups, heads, width)
    out[:, :, 0] = x
    return out.flatten(1, 2)


def _group_as_steps(q: Tensor, groups: int) -> Tensor:
    """[B,T,H·G,K] → [B,T·G,H,K]: the queries of a group read the same state one after another."""
    if groups == 1:
        return q
    return q.unflatten(2, (-1, groups)).transpose(2, 3).flatten(1, 2)


def _steps_as_group(o: Tensor, groups: int) -> Tensor:
    """The inverse of `_group_as_steps`."""
    return o if groups == 1 else o.unflatten(1, (-1, groups)).transpose(2, 3).flatten(2, 3)
