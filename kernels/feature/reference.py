"""Attention with a polynomial similarity, token by token: the oracle of `based` and `rebased`. Works in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.decay.reference import segments
from fla_swap.kernels.feature.maps import feature_count, key_features, query_features

FeatureState = tuple[Tensor, Tensor]


def based_reference(
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
) -> tuple[Tensor, FeatureState | None]:
    """`based`: every token over all tokens before it, with the similarity written out. Arguments as for `ops.based`."""
    return _reference(q, k, v, scale, eps, initial_state, output_final_state, cu_seqlens, valid, taylor=True)


def rebased_reference(
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
) -> tuple[Tensor, FeatureState | None]:
    """`rebased` likewise."""
    return _reference(q, k, v, scale, eps, initial_state, output_final_state, cu_seqlens, valid, taylor=False)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    eps: float,
    initial_state: FeatureState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    *,
    taylor: bool,
) -> tuple[Tensor, FeatureState | None]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, time, heads, width = q.shape
    factor = width**-0.5 if scale is None else scale
    qf, kf, vf = (x.to(dtype) for x in (q, k, v))
    counts = torch.ones(batch, time, 1, dtype=dtype, device=q.device) if valid is None else valid[..., None].to(dtype)
    outputs, finals = [], []
    for start, stop, rows in segments(batch, time, cu_seqlens):
        if initial_state is None:
            count = feature_count(width, taylor=taylor)
            lead = (1 if cu_seqlens is not None else batch, heads, count)
            state, sums = vf.new_zeros(*lead, v.shape[3]), vf.new_zeros(lead)
        else:
            state, sums = (x[rows].to(dtype) for x in initial_state)
        for t in range(start, stop):
            scores = (kf[:, start : t + 1] * qf[:, t : t + 1]).sum(-1) * factor
            weights = 1 + scores + scores.square() / 2 if taylor else scores.square()
            weights = weights * counts[:, start : t + 1]
            mapped = query_features(qf[:, t], scale=factor, taylor=taylor)
            above = (weights.unsqueeze(-1) * vf[:, start : t + 1]).sum(1) + (mapped.unsqueeze(-1) * state).sum(-2)
            below = weights.sum(1) + (mapped * sums).sum(-1)
            outputs.append(above / (below + eps).unsqueeze(-1))
        mapped = key_features(kf[:, start:stop], taylor=taylor) * counts[:, start:stop, :, None]
        finals.append((state + torch.einsum("bthf,bthv->bhfv", mapped, vf[:, start:stop]), sums + mapped.sum(1)))
    o = torch.stack(outputs, 1) if outputs else vf[:, :0]
    if o.shape[1] < time:
        o = torch.cat((o, o.new_zeros(batch, time - o.shape[1], heads, v.shape[3])), 1)
    if not output_final_state:
        return o.to(q.dtype), None
    return o.to(q.dtype), (torch.cat([state for state, _ in finals]), torch.cat([sums for _, sums in finals]))


def make_inputs(device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int) -> dict[str, Tensor]:
    """Random arguments: B = 2, K = 16, V = D."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"q": 16, "k": 16, "v": D}
    values = {name: torch.randn(2, T, H, width, generator=generator).to(dtype) for name, width in widths.items()}
    return {name: x.to(device).requires_grad_() for name, x in values.items()}


def numerics_cases() -> tuple[dict[str, Any], ...]:
    """Build `NUMERICS_CASES` late: the public functions live in `ops`, which imports this file.

    With eps 1 the first token's output depends on its q and k, so that their gradients are not made of rounding errors.
    """
    from fla_swap.kernels.feature.ops import based, rebased

    return (
        {"name": "based", "op": based, "reference": based_reference, "make": make_inputs, "kwargs": {"eps": 1.0}},
        {"name": "rebased", "op": rebased, "reference": rebased_reference, "make": make_inputs, "kwargs": {"eps": 1.0}},
    )


def __getattr__(name: str) -> Any:
    if name == "NUMERICS_CASES":
        return numerics_cases()
    raise AttributeError(name)
