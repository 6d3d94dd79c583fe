"""Matrices times few tokens, as in a decode step: everything around the products in one pass over the weights.

A decode step reads every weight once and computes little with it, so that its time is that of the reading and of
starting kernels. `few_linears` takes all projections of one input at once, the norm in front of them, and what follows
a product at once: a gate and its partner, or a residual.

Legend for shapes: M tokens (1 to 16), K inputs, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.errors import KernelError
from fla_swap.kernels import flops
from fla_swap.kernels.common import check_shape, choose_implementation

MAX_MATRICES = 6
MAX_TOKENS = 16
ACTIVATIONS = ("silu", "gelu_tanh")


def few_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm: Tensor | None = None,
    norm_offset: float = 0.0,
    eps: float = 1e-6,
    activation: str | None = None,
    residual: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Wᵢ · rms_norm(x) + bᵢ side by side, or act(W₀ · x) · (W₁ · x), plus a residual. No gradients.

    Args:
        x: [..., K], at most 16 tokens.
        weights: up to six [Nᵢ, K] in x's dtype. biases: for each [Nᵢ] or None.
        norm: [K]; x is divided by its root mean square (2nd moment + eps) and multiplied by norm + norm_offset first.
        activation: None, or "silu" or "gelu_tanh": of two weights of equal size the first one's product opens the
            second one's.
        residual: [..., N], added at the end.
    Returns:
        [..., N] in x's dtype; N is the sum of the Nᵢ, or N₀ with an activation. Sums are taken in fp32.
    Raises:
        KernelError: shapes, dtypes or counts that do not fit.
    """
    given = [None] * len(weights) if biases is None else list(biases)
    _check(x, weights, given, norm, activation, residual)
    implementation = choose_implementation(implementation, x.device)
    return _few_linears_op(
        x,
        list(weights),
        given,
        norm,
        norm_offset,
        eps,
        activation,
        residual,
        implementation,  # pyright: ignore
    )


def outputs(weights: Sequence[Tensor], activation: str | None) -> int:
    """N."""
    return weights[0].shape[0] if activation else sum(w.shape[0] for w in weights)


def fits(tokens: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take this many tokens of this width."""
    return 1 <= tokens <= MAX_TOKENS and inputs % 128 == 0 and dtype in (torch.bfloat16, torch.float16)


def _check(x, weights, biases, norm, activation, residual) -> None:
    width = x.shape[-1]
    if not 1 <= len(weights) <= MAX_MATRICES or len(biases) != len(weights):
        raise KernelError(f"1 to {MAX_MATRICES} weights, each with a bias or None; got {len(weights)}, {len(biases)}")
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_shape(f"weights[{number}]", weight, (None, width))
        if weight.dtype != x.dtype or not weight.is_contiguous():
            raise KernelError(f"weights[{number}] must be contiguous and {x.dtype} as x; it is {weight.dtype}")
        if bias is not None:
            check_shape(f"biases[{number}]", bias, (weight.shape[0],))
    if norm is not None:
        check_shape("norm", norm, (width,))
    if activation is not None and activation not in ACTIVATIONS:
        raise KernelError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")
    if activation is not None and (len(weights) != 2 or weights[0].shape != weights[1].shape or any_of(biases)):
        raise KernelError("an activation takes two weights of equal shape and no bias")
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], outputs(weights, activation)))


def any_of(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None for t in tensors)


@torch.library.custom_op("fla_swap::few_linears", mutates_args=())
def _few_linears_op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    norm: Tensor | None,
    norm_offset: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    implementation: str,
) -> Tensor:
    if implementation == "triton":
        from fla_swap.kernels.fused import matvec_launch

        return matvec_launch.few_linears(x, weights, biases, norm, norm_offset, eps, activation, residual)
    return few_linears_torch(x, weights, biases, norm, norm_offset, eps, activation, residual)


@_few_linears_op.register_fake
def _few_linears_fake(x, weights, biases, norm, norm_offset, eps, activation, residual, implementation):
    return x.new_empty((*x.shape[:-1], outputs(weights, activation)))


def few_linears_torch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    norm_offset: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Plain PyTorch, rounded where a model in x's dtype rounds."""
    if norm is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        x = (wide * (norm.to(wide.dtype) + norm_offset)).to(x.dtype)
    parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if activation is not None:
        gate = F.silu(parts[0]) if activation == "silu" else F.gelu(parts[0], approximate="tanh")
        parts = [gate * parts[1]]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if residual is None else y + residual


def tokens_of(x: Tensor) -> int:
    """M."""
    return math.prod(x.shape[:-1])


flops.register()
