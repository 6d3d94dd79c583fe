"""The gated delta rule as a plain loop over time: the oracle that every other implementation is compared with.

Works in any floating dtype (float64 for comparisons) and is differentiated by autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

NORM_EPS = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x²) + 1e-6)` over the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I − β_t k_t k_tᵀ) exp(g_t) S_{t−1} + β_t k_t v_tᵀ, o_t = scale · S_tᵀ q_t, one step at a time.

    Arguments and results as in `fla_swap.kernels.delta.ops.gated_delta_rule`; computes in q's dtype, at least fp32.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    batch, total, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    scale = width**-0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v, beta = (x.to(compute) for x in (q, k, v, beta))
    g = None if g is None else g.to(compute)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q, k = (x.repeat_interleave(value_heads // heads, dim=2) for x in (q, k))
    if cu_seqlens is None:
        pieces = [(b, 0, total) for b in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        pieces = [(0, start, stop) for start, stop in itertools.pairwise(bounds)]

    outputs, states = [], []
    for number, (b, start, stop) in enumerate(pieces):
        if initial_state is None:
            state = q.new_zeros(value_heads, width, value_width)
        else:
            state = initial_state[number].to(compute)
        rows = []
        for t in range(start, stop):
            if g is not None:
                state = state * g[b, t].exp()[:, None, None]
            error = v[b, t] - torch.einsum("hk,hkv->hv", k[b, t], state)
            state = state + torch.einsum("hk,hv->hkv", k[b, t], beta[b, t, :, None] * error)
            rows.append(scale * torch.einsum("hk,hkv->hv", q[b, t], state))
        outputs.append(torch.stack(rows) if rows else v.new_zeros(0, value_heads, value_width))
        states.append(state)
    if cu_seqlens is None:
        o = torch.stack(outputs)
    else:
        o = torch.cat(outputs)
        o = torch.cat((o, o.new_zeros(total - o.shape[0], value_heads, value_width)))[None]
    return o.to(out_dtype), torch.stack(states) if output_final_state else None


def _make_inputs(
    device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int, gated: bool = True
) -> dict[str, Tensor]:
    """Random inputs for one comparison: B = 2, HV = 2H, K = V = D, β from 0 to 2, decays down to e^−0.5 a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    tensors = {"q": normal(2, T, H, D), "k": normal(2, T, H, D), "v": normal(2, T, 2 * H, D)}
    if gated:
        tensors["g"] = uniform(2, T, 2 * H) * -0.5
    tensors["beta"] = uniform(2, T, 2 * H) * 2
    tensors = {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}
    tensors["initial_state"] = (normal(2, 2 * H, D, D) * 0.3).to(device).requires_grad_()
    return tensors


def _delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    return gated_delta_rule_reference(q, k, v, None, beta, **options)


def _operator(name: str) -> Callable[..., Any]:
    """The public operator, looked up when called: `ops` imports this module."""

    def call(**arguments: Any) -> Any:
        from fla_swap.kernels.delta import ops

        return getattr(ops, name)(**arguments)

    call.__name__ = name
    return call


_OPTIONS = {"output_final_state": True, "qk_l2norm": True}
NUMERICS_CASES: tuple[dict[str, Any], ...] = (
    {
        "name": "gated_delta_rule",
        "op": _operator("gated_delta_rule"),
        "reference": gated_delta_rule_reference,
        "make": _make_inputs,
        "kwargs": _OPTIONS,
    },
    {
        "name": "delta_rule",
        "op": _operator("delta_rule"),
        "reference": _delta_rule_reference,
        "make": partial(_make_inputs, gated=False),
        "kwargs": _OPTIONS,
    },
)
