"""Softmax over the slots between the two passes of `gsa`; only the result is kept for the gradient, in its dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.common import choose_implementation


def slot_softmax(scores: Tensor, implementation: str | None = None) -> Tensor:
    """Softmax of scores [B,T,H,M] along M, computed in fp32 (or float64), contiguous, in the dtype of `scores`."""
    chosen = choose_implementation(implementation, scores.device)
    return slot_softmax_fwd(scores, "torch" if chosen == "reference" else chosen)


@torch.library.custom_op("fla_swap::slot_softmax_fwd", mutates_args=())
def slot_softmax_fwd(scores: Tensor, implementation: str) -> Tensor:
    """The operator behind `slot_softmax`."""
    if implementation == "triton":
        from fla_swap.kernels.decay import slot_softmax_triton

        return slot_softmax_triton.forward(scores)
    return torch.softmax(scores.contiguous(), -1, dtype=_wide(scores)).to(scores.dtype)


@slot_softmax_fwd.register_fake
def _(scores: Tensor, implementation: str) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("fla_swap::slot_softmax_bwd", mutates_args=())
def slot_softmax_bwd(p: Tensor, grad: Tensor, implementation: str) -> Tensor:
    """p ⊙ (dp − Σ p ⊙ dp)."""
    if implementation == "triton":
        from fla_swap.kernels.decay import slot_softmax_triton

        return slot_softmax_triton.backward(p, grad)
    wide, grad = p.to(_wide(p)), grad.to(_wide(p)).contiguous()
    return (wide * (grad - (wide * grad).sum(-1, keepdim=True))).to(p.dtype)


@slot_softmax_bwd.register_fake
def _(p: Tensor, grad: Tensor, implementation: str) -> Tensor:
    return p.new_empty(p.shape)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.implementation = inputs[1]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return slot_softmax_bwd(ctx.saved_tensors[0], grad, ctx.implementation), None


slot_softmax_fwd.register_autograd(_autograd, setup_context=_setup_context)
