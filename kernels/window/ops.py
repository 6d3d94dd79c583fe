"""Causal softmax attention over a sliding window (Mistral, 2310.06825; sinks: gpt-oss, 2508.10925; ALiBi, 2108.12409).

Legend: B batch, T time, H query heads, HK key/value heads (H a multiple of HK; query head h reads key/value head
h // (H / HK)), K key width, V value width, W window, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.window import torch_impl
from fla_swap.kernels.window.checks import check_initial, check_inputs
from fla_swap.kernels.window.state import WindowState, check_state, new_window_state, roll, unroll

__all__ = ["WindowState", "new_window_state", "window_attention", "window_attention_lse", "window_attention_step"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    initial_state: WindowState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Softmax attention of every token over the last `window` tokens, itself counted.

    Args:
        q: [B, T, H, K]. k: [B, T, HK, K]. v: [B, T, HK, V]. Mixed dtypes are promoted; computed in fp32 (or fp64).
        window: tokens seen, at least 1; None is full causal attention (which has no constant-size state).
        softcap: scaled scores s become softcap · tanh(s / softcap), before ALiBi and the mask.
        sinks: [H] logits that enter the softmax's denominator only.
        alibi: [H] slopes; the score of key j for query i gets −slope · (i − j).
        scale: factor on q·k; None is K^-0.5.
        initial_state: what an earlier call left; the result equals one call on the concatenation.
        cu_seqlens: [N+1] int32 or int64, packed sequences (B = 1); rows after the last one give zeros.
        valid: bool [B, T], the tokens that count (left padding). A row that does not count gives zeros. Distances count
            every token, valid or not.
    Returns:
        o [B, T, H, V] in the promoted dtype, and the `WindowState` (None unless `output_final_state`).
    Raises:
        KernelError: shapes, dtypes or devices that do not fit; a state asked of `window=None`.

    Gradients reach q, k, v, sinks, alibi and the keys and values of the state.
    """
    check_inputs(q, k, v, window, softcap, sinks, alibi, valid)
    check_initial(q, k, v, window, initial_state, output_final_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "reference":
        from fla_swap.kernels.window.reference import window_attention_reference

        return window_attention_reference(
            q,
            k,
            v,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi=alibi,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            valid=valid,
        )
    o, _, state = window_attention_lse(
        q,
        k,
        v,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi=alibi,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        valid=valid,
        implementation=implementation,
    )
    return o, state


def window_attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    initial_state: WindowState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, WindowState | None]:
    """`window_attention` with the log of its denominator, to be combined with other attention under one softmax.

    Arguments as in `window_attention` (no "reference"). Returns (o, lse [B, T, H] in fp32 or fp64, state); where no key
    counts lse is +inf and o zero. Gradients reach lse too.
    """
    if implementation == "reference":
        raise KernelError(
            "window_attention_lse has no reference implementation; that of window_attention gives o alone"
        )
    check_inputs(q, k, v, window, softcap, sinks, alibi, valid)
    check_initial(q, k, v, window, initial_state, output_final_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    shared = (sinks, alibi, window, softcap, scale, implementation)
    if cu_seqlens is not None:
        o, lse, state = _packed(q, k, v, valid, cu_seqlens, initial_state, output_final_state, shared)
    else:
        o, lse, state = _batched(q, k, v, valid, initial_state, output_final_state, shared)
    return o, lse.transpose(1, 2), state


def window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    state: WindowState,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Decode: the next T tokens (from 1 to a handful) of every sequence. `state` is updated in place. No gradient.

    Arguments as in `window_attention`, with B = N. Returns o [B, T, H, V]; the rest costs O(window).
    """
    check_inputs(q, k, v, window, softcap, sinks, alibi, valid)
    check_state(state, q.shape[0], k, v, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _step_op(q, k, v, *state, sinks, alibi, valid, softcap, scale, implementation)


def _batched(q, k, v, valid, initial_state, output_final_state, shared):
    """A batch of equal lengths; earlier tokens are put in front of the keys."""
    sinks, alibi, window, softcap, scale, implementation = shared
    counts = valid
    if initial_state is not None:
        past_k, past_v, past_valid = unroll(initial_state)
        k, v = torch.cat((past_k.to(k.dtype), k), 1), torch.cat((past_v.to(v.dtype), v), 1)
        counts = torch.cat((past_valid, _all_valid(q) if valid is None else valid), 1)
    o, lse = _forward_op(q, k, v, sinks, alibi, counts, None, window, softcap, scale, implementation)
    if not output_final_state:
        return o, lse, None
    seen = q.new_zeros(q.shape[0], dtype=torch.int64) if initial_state is None else initial_state.count
    rows = torch.arange(k.shape[1] - window, k.shape[1], device=q.device).expand(q.shape[0], window)
    counts = _all_valid(q) if counts is None else counts
    return o, lse, _tail(k, v, counts, rows, rows >= 0, seen + q.shape[1])


def _packed(q, k, v, valid, cu_seqlens, initial_state, output_final_state, shared):
    """Packed sequences; with earlier tokens, every sequence grows by W rows in front that hold them."""
    sinks, alibi, window, softcap, scale, implementation = shared
    bounds = cu_seqlens.to(torch.int64)
    sequences, total = bounds.shape[0] - 1, q.shape[1]
    lengths = bounds[1:] - bounds[:-1]
    inside = None
    if initial_state is not None:
        grown = bounds + window * torch.arange(sequences + 1, device=q.device)
        number = torch.searchsorted(bounds, torch.arange(total, device=q.device), right=True)
        inside = torch.arange(total, device=q.device) + window * number.clamp(max=sequences)
        before = (grown[:-1, None] + torch.arange(window, device=q.device)).flatten()
        past_k, past_v, past_valid = unroll(initial_state)
        size = total + sequences * window
        k = _spread(size, (inside, k[0]), (before, past_k.to(k.dtype).flatten(0, 1)))
        v = _spread(size, (inside, v[0]), (before, past_v.to(v.dtype).flatten(0, 1)))
        counts = _all_valid(q) if valid is None else valid
        valid = _spread(size, (inside, counts[0]), (before, past_valid.flatten()))
        q, bounds = _spread(size, (inside, q[0])), grown
    o, lse = _forward_op(q, k, v, sinks, alibi, valid, bounds, window, softcap, scale, implementation)
    if inside is not None:
        o, lse = o[:, inside], lse[:, :, inside]
    if not output_final_state:
        return o, lse, None
    seen = lengths if initial_state is None else initial_state.count + lengths
    rows = bounds[1:, None] - window + torch.arange(window, device=q.device)
    counts = _all_valid(k) if valid is None else valid
    return o, lse, _tail(k, v, counts, rows, rows >= bounds[:-1, None], seen)


def _tail(k, v, counts, rows, exists, seen) -> WindowState:
    """The state whose last W tokens are `rows` [N, W] of k and v [B, T, HK, ·], where they exist (B is N or 1)."""
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    if k.shape[1] == 0:
        k, v, counts = (torch.cat((x, x.new_zeros(x.shape[0], 1, *x.shape[2:])), 1) for x in (k, v, counts))
    safe = rows.clamp(min=0)
    exists = exists & counts[batch, safe]
    hidden = ~exists[:, :, None, None]
    return roll(k[batch, safe].masked_fill(hidden, 0), v[batch, safe].masked_fill(hidden, 0), exists, seen)


def _all_valid(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _spread(size: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """[1, size, …] of zeros with rows put at their indices."""
    rows = parts[0][1]
    out = rows.new_zeros(size, *rows.shape[1:])
    for index, values in parts:
        out = out.index_copy(0, index, values)
    return out[None]


@torch.library.custom_op("fla_swap::window_attention_fwd", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """o [B, Tq, H, V] and log-denominators [B, H, Tq]; k, v may hold Tk ≥ Tq tokens, the last being the queries'."""
    band = _band(q, k, alibi, valid, cu_seqlens, window, softcap, scale)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.window import triton_impl

            return triton_impl.forward(q.contiguous(), k.contiguous(), v.contiguous(), sinks, band)
        return torch_impl.forward(q, k, v, sinks, band)


@_forward_op.register_fake
def _(q, k, v, sinks, alibi, valid, cu_seqlens, window, softcap, scale, implementation):
    batch, steps, heads, _ = q.shape
    lse = q.new_empty(batch, heads, steps, dtype=torch_impl.compute_dtype(q.dtype))
    return q.new_empty(batch, steps, heads, v.shape[-1]), lse


@torch.library.custom_op("fla_swap::window_attention_bwd", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lse_grad: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sinks and alibi; the last two are empty where the input is absent."""
    band = _band(q, k, alibi, valid, cu_seqlens, window, softcap, scale)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.window import triton_impl

            grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
            dq, dk, dv, dsinks, dalibi = triton_impl.backward(grad, q, k, v, o, lse, sinks, band, lse_grad)
        else:
            dq, dk, dv, dsinks, dalibi = torch_impl.backward(grad, q, k, v, lse, sinks, band, lse_grad)
    return dq, dk, dv, _or_empty(dsinks, sinks, q), _or_empty(dalibi, alibi, q)


@_backward_op.register_fake
def _(grad, q, k, v, o, lse, lse_grad, sinks, alibi, valid, cu_seqlens, window, softcap, scale, implementation):
    dense = (q.new_empty(x.shape) for x in (q, k, v))
    extra = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (sinks, alibi))
    return (*dense, *extra)


def _setup(ctx, inputs, output):
    q, k, v, sinks, alibi, valid, cu_seqlens, *ctx.static = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, alibi, valid, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, lse_grad):
    none = (None,) * 11
    if grad is None and lse_grad is None:
        return none
    q, k, v, o, lse, sinks, alibi, valid, cu_seqlens = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad
    dq, dk, dv, dsinks, dalibi = _backward_op(
        grad, q, k, v, o, lse, lse_grad, sinks, alibi, valid, cu_seqlens, *ctx.static
    )
    return (
        dq,
        dk,
        dv,
        None if sinks is None else dsinks,
        None if alibi is None else dalibi,
        *none[5:],
    )


_forward_op.register_autograd(_backward, setup_context=_setup)


def _band(q, k, alibi, valid, cu_seqlens, window, softcap, scale) -> torch_impl.Band:
    start = stop = None
    if cu_seqlens is not None:
        start, stop = torch_impl.sequence_bounds(cu_seqlens, q.shape[1])
    return torch_impl.Band(
        window=window,
        softcap=softcap,
        scale=scale,
        offset=k.shape[1] - q.shape[1],
        alibi=alibi,
        valid=valid,
        start=start,
        stop=stop,
    )


def _or_empty(gradient: Tensor | None, like: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)


@torch.library.custom_op(
    "fla_swap::window_attention_step",
    mutates_args=("state_k", "state_v", "state_valid", "state_count"),
)
def _step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor,
    state_v: Tensor,
    state_valid: Tensor,
    state_count: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    valid: Tensor | None,
    softcap: float | None,
    scale: float,
    implementation: str | None,
) -> Tensor:
    """One decode step; the ring is written in place."""
    band = torch_impl.Band(window=state_valid.shape[1], softcap=softcap, scale=scale, alibi=alibi)
    state = WindowState(state_k, state_v, state_valid, state_count)
    with torch.autocast(q.device.type, enabled=False):
        if choose_implementation(implementation, q.device) == "triton":
            from fla_swap.kernels.window import triton_step

            return triton_step.step(q, k, v, state, sinks, valid, band)
        return torch_impl.step(q, k, v, state, sinks, valid, band)


@_step_op.register_fake
def _(q, k, v, state_k, state_v, state_valid, state_count, sinks, alibi, valid, softcap, scale, implementation):
    return q.new_empty(*q.shape[:-1], v.shape[-1])
