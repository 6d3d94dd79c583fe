"""The decode step of `based` and `rebased`: one kernel on a GPU, features and two linear attention steps elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.kernels.common import choose_implementation
from fla_swap.kernels.feature.maps import key_features, query_features
from fla_swap.kernels.feature.normalised import normalised_step


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float,
    eps: float,
    valid: Tensor | None,
    implementation: str | None,
    *,
    taylor: bool,
) -> Tensor:
    """See `ops.based_step`; arguments checked, the scale a number."""
    if choose_implementation(implementation, q.device) == "triton":
        return feature_step(q, k, v, state[0], state[1], valid, scale, float(eps), taylor)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        mapped_q = query_features(q.to(dtype), scale=scale, taylor=taylor)
        mapped_k = key_features(k.to(dtype), taylor=taylor)
        mapped_k = mapped_k if valid is None else mapped_k * valid[:, :, None, None]
        return normalised_step(mapped_q, mapped_k, v, state=state, eps=eps, implementation=implementation)


@torch.library.custom_op("fla_swap::feature_step", mutates_args=("state", "sums"))
def feature_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    sums: Tensor,
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
) -> Tensor:
    """o [B,T,H,V]; state and sums are updated in place. By Triton."""
    from fla_swap.kernels.feature import triton_step

    return triton_step.step(q, k, v, state, sums, valid, scale, eps, taylor)


@feature_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    sums: Tensor,
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
) -> Tensor:
    return v.new_empty(v.shape)
