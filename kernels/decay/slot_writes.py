"""The weights of a softmax over time, one step at a time: what `abc` writes and forgets.

With z the running logsumexp of s (−inf before the first step) and d_t = s_t − z_{t-1},

    weight_t = exp(s_t − z_t) = sigmoid(d_t)        g_t = z_{t-1} − z_t = −softplus(d_t)

so that Σ_j weight_j exp(g_{j+1} + … + g_t) v_j is the mean of all values under the weights exp s_j, with every factor
≤ 1. Nothing precedes the first step, whose g would be −inf: it is `RESET`.

Legend for shapes: B batch, T time, H heads, M slots, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.kernels.common import choose_implementation

RESET = -64.0
"""exp(−64) of an old state is below any float's precision of the new one; chunked kernels subtract sums of gates."""


def slot_writes(
    s: Tensor,
    initial: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Running softmax weights of s along time.

    Args:
        s: [B,T,H,M] logits, any floating dtype, finite.
        initial: [N,H,M] logsumexp of what came before; None: nothing (−inf).
        starts: bool [B,T], True where a new document starts, which forgets everything.
        cu_seqlens: [N+1] bounds of packed sequences (B = 1); rows after the last bound write nothing.
    Returns:
        (weight, g, last): [B,T,H,M] twice and [N,H,M], all in fp32 (float64 for float64).
    """
    chosen = choose_implementation(implementation, s.device)
    return slot_writes_fwd(s, initial, starts, cu_seqlens, "torch" if chosen == "reference" else chosen)


def _dtype(s: Tensor) -> torch.dtype:
    return torch.float64 if s.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fla_swap::slot_writes_fwd", mutates_args=())
def slot_writes_fwd(
    s: Tensor, initial: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator behind `slot_writes`."""
    if implementation == "triton":
        from fla_swap.kernels.decay import slot_writes_triton

        return slot_writes_triton.forward(s, initial, starts, cu_seqlens)
    return forward(s, initial, starts, cu_seqlens)


@slot_writes_fwd.register_fake
def _(
    s: Tensor, initial: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = s.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new = [s.new_empty(shape, dtype=_dtype(s)) for shape in (s.shape, s.shape, (sequences, *s.shape[2:]))]
    return new[0], new[1], new[2]


@torch.library.custom_op("fla_swap::slot_writes_bwd", mutates_args=())
def slot_writes_bwd(
    weight: Tensor,
    g: Tensor,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_grad: Tensor,
    g_grad: Tensor,
    last_grad: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of s and of the initial logsumexp, in fp32 (or float64)."""
    if implementation == "triton":
        from fla_swap.kernels.decay import slot_writes_triton

        return slot_writes_triton.backward(weight, g, starts, cu_seqlens, weight_grad, g_grad, last_grad)
    return backward(weight, g, starts, cu_seqlens, weight_grad, g_grad, last_grad)


@slot_writes_bwd.register_fake
def _(
    weight: Tensor,
    g: Tensor,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_grad: Tensor,
    g_grad: Tensor,
    last_grad: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    sequences = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return g.new_empty(g.shape), g.new_empty((sequences, *g.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    s, initial, starts, cu_seqlens, ctx.implementation = inputs
    ctx.save_for_backward(*output[:2], starts, cu_seqlens)
    ctx.dtypes = s.dtype, None if initial is None else initial.dtype


def _autograd(ctx: Any, weight_grad: Tensor, g_grad: Tensor, last_grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, g, starts, cu_seqlens = ctx.saved_tensors
    ds, dinitial = slot_writes_bwd(weight, g, starts, cu_seqlens, weight_grad, g_grad, last_grad, ctx.implementation)
    of_s, of_initial = ctx.dtypes
    return ds.to(of_s), None if of_initial is None else dinitial.to(of_initial), None, None, None


slot_writes_fwd.register_autograd(_autograd, setup_context=_setup_context)


def _segments(
    s: Tensor, starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """For each row, [B or 1, T]: its sequence, whether it is the sequence's first, whether nothing before it counts
    (False on a border), and whether it lies after all sequences (None if none can)."""
    rows = torch.arange(s.shape[1], device=s.device)
    none = torch.zeros_like(rows, dtype=torch.bool)[None]
    starts = none if starts is None else starts
    if cu_seqlens is None:
        return torch.arange(s.shape[0], device=s.device)[:, None].expand(s.shape[:2]), (rows == 0)[None], starts, None
    bounds = cu_seqlens.to(torch.int64)
    sequence = (torch.searchsorted(bounds, rows, right=True) - 1).clamp(max=bounds.shape[0] - 2)
    return sequence[None], (rows == bounds[sequence])[None], starts, (rows >= bounds[-1])[None]


def _wide(mask: Tensor) -> Tensor:
    return mask[:, :, None, None]


def forward(
    s: Tensor, initial: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch, by doubling: after the step of size n every row knows the logsumexp of the 2n rows before it."""
    s = s.to(_dtype(s))
    sequence, border, starts, outside = _segments(s, starts, cu_seqlens)
    before = F.pad(s[:, :-1], (0, 0, 0, 0, 1, 0))
    first = s.new_full((), -torch.inf) if initial is None else initial.to(s.dtype)[sequence]
    before = torch.where(_wide(border), first, before).masked_fill(_wide(starts), -torch.inf)
    rows = torch.arange(s.shape[1], device=s.device)
    age = rows - torch.where(border | starts, rows, 0).cummax(1).values
    size = 1
    while size < s.shape[1]:
        earlier = torch.logaddexp(before[:, size:], before[:, :-size])
        earlier = torch.where(_wide(age[:, size:] >= size), earlier, before[:, size:])
        before = torch.cat((before[:, :size], earlier), 1)
        size *= 2
    ahead = s - before
    weight, g = torch.sigmoid(ahead), -F.softplus(ahead).clamp(max=-RESET)
    running = torch.logaddexp(before, s)
    if cu_seqlens is None or outside is None:
        return weight, g, running[:, -1].clone()
    last = running[0, (cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)]
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
    last = torch.where(empty, -torch.inf if initial is None else initial.to(s.dtype), last)
    return weight.masked_fill(_wide(outside), 0), g.masked_fill(_wide(outside), 0), last


def backward(
    weight: Tensor,
    g: Tensor,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_grad: Tensor,
    g_grad: Tensor,
    last_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """With d = s − z_before: dz_{t-1} = −dd_t + (1 − weight_t) dz_t, and ds_t = dd_t + weight_t dz_t."""
    _, border, starts, outside = _segments(g, starts, cu_seqlens)
    keep = g.exp()
    ahead_grad = weight * (weight_grad * keep - g_grad)
    cut = border | starts if outside is None else border | starts | outside
    pass_on = torch.where(_wide(cut), 0, keep)
    entering = torch.where(_wide(cut), 0, -ahead_grad)
    factor = torch.cat((pass_on[:, 1:], torch.zeros_like(keep[:, :1])), 1)
    total = torch.cat((entering[:, 1:], torch.zeros_like(keep[:, :1])), 1)
    if last_grad is not None:
        last_grad = last_grad.to(g.dtype)
        if cu_seqlens is None:
            total[:, -1] = last_grad
        else:
            ends = cu_seqlens[1:].to(torch.int64) - 1
            empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
            total[0].index_add_(0, ends.clamp(min=0), last_grad.masked_fill(empty, 0))
    size = 1
    while size < g.shape[1]:
        total = torch.cat((total[:, :-size] + factor[:, :-size] * total[:, size:], total[:, -size:]), 1)
        factor = torch.cat((factor[:, :-size] * factor[:, size:], factor[:, -size:]), 1)
        size *= 2
    s_grad = ahead_grad + weight * total
    initial_grad = (keep * total - ahead_grad).masked_fill(_wide(starts), 0)
    if cu_seqlens is None or outside is None:
        return s_grad, initial_grad[:, 0].clone()
    first = cu_seqlens[:-1].to(torch.int64).clamp(max=g.shape[1] - 1)
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None, None]
    initial_grad = torch.where(empty, 0 if last_grad is None else last_grad, initial_grad[0, first])
    return s_grad.masked_fill(_wide(outside), 0), initial_grad
