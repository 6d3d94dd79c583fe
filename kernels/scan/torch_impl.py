"""Scans in PyTorch: the CPU path, with explicit backwards. `selective_scan` is in `torch_selective`.

`hgrn` cuts time into about √T chunks of about √T steps: one loop runs the steps of all chunks side by side, a second
one carries states over the chunks, so that √T operations on long vectors take the place of T on short ones. Packed
sequences are one line of tokens whose decay is zero, and whose own state enters, at every first token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.kernels.scan.checks import state_dtype
from fla_swap.kernels.scan.packing import packing
from fla_swap.kernels.scan.torch_selective import selective_backward, selective_forward, selective_step

__all__ = [
    "hgrn_backward",
    "hgrn_forward",
    "hgrn_step",
    "selective_backward",
    "selective_forward",
    "selective_step",
]


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + b_t from h = 0, over dimension 1 of [B, T, D]."""
    batch, time, width = b.shape
    chunk = math.isqrt(time)
    chunks = -(-time // chunk)
    missing = chunks * chunk - time
    prefix = F.pad(a, (0, 0, 0, missing), value=1.0).view(batch, chunks, chunk, width)
    prefix = prefix.clone() if missing == 0 else prefix
    h = F.pad(b, (0, 0, 0, missing)).view(batch, chunks, chunk, width)
    h = h.clone() if missing == 0 else h
    for t in range(1, chunk):
        h[:, :, t].addcmul_(prefix[:, :, t], h[:, :, t - 1])
        prefix[:, :, t] *= prefix[:, :, t - 1]
    carry = torch.zeros_like(h[:, :, 0])
    for m in range(1, chunks):
        torch.addcmul(h[:, m - 1, -1], prefix[:, m - 1, -1], carry[:, m - 1], out=carry[:, m])
    h.addcmul_(prefix, carry.unsqueeze(2))
    return h.view(batch, -1, width)[:, :time]


def hgrn_forward(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B,T,D] in x's dtype and the final state [N,D] in the computing dtype."""
    dtype, packed = state_dtype(x), packing(cu_seqlens, x.shape[1])
    a, b = g.to(dtype).exp(), x.to(dtype, copy=True)
    state = None if initial_state is None else initial_state.to(dtype)
    if packed is None:
        if state is not None:
            b[:, 0].addcmul_(a[:, 0], state)
        h = scan(a, b)
        return _contiguous(h, x.dtype), h[:, -1].clone()
    if state is not None:
        entering = a[0, packed.starts] * state
        b[0].index_add_(0, packed.starts, torch.where(packed.filled[:, None], entering, 0))
    h = scan(a.masked_fill(packed.first[:, None], 0), b)
    final = torch.where(packed.filled[:, None], h[0, packed.ends], 0 if state is None else state)
    return _contiguous(torch.where(packed.inside[:, None], h, 0), x.dtype), final


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def hgrn_backward(
    g: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in h's dtype), g and the initial state."""
    dtype, packed = state_dtype(h), packing(cu_seqlens, h.shape[1])
    a, grad = g.to(dtype).exp(), out_grad.to(dtype, copy=True)
    after = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), 1)
    past = torch.cat((torch.zeros_like(a[:, :1]), h[:, :-1].to(dtype)), 1)
    if packed is None:
        if final_grad is not None:
            grad[:, -1] += final_grad
        if initial_state is not None:
            past[:, 0] = initial_state
    else:
        grad = torch.where(packed.inside[:, None], grad, 0)
        if final_grad is not None:
            leaving = torch.where(packed.filled[:, None], final_grad.to(dtype), 0)
            grad[0].index_add_(0, packed.ends, leaving)
        after = after.masked_fill(packed.last[:, None], 0)
        past = past.masked_fill(packed.first[:, None], 0)
        if initial_state is not None:
            entering = torch.where(packed.filled[:, None], initial_state.to(dtype), 0)
            past[0].index_add_(0, packed.starts, entering)
    x_grad = scan(after.flip(1), grad.flip(1)).flip(1)
    passed = a.mul_(x_grad)
    if packed is None:
        initial_grad = passed[:, 0].clone()
    else:
        initial_grad = torch.where(packed.filled[:, None], passed[0, packed.starts], 0)
        if final_grad is not None:
            initial_grad = torch.where(packed.filled[:, None], initial_grad, final_grad.to(dtype))
        past = torch.where(packed.inside[:, None], past, 0)
    return _contiguous(x_grad, h.dtype), _contiguous(passed * past, g.dtype), initial_grad


def hgrn_step(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """T steps, in place on `state` [B,D]. Returns [B,T,D] in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for t in range(x.shape[1]):
        state.mul_(g[:, t].to(state.dtype).exp()).add_(x[:, t])
        out[:, t] = state
    return out
