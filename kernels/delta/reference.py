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

    g is [B, T, HV], or [B, T, HV, K] for a decay of its own in each key channel (KDA: diag(exp g_t) S_{t−1}).
    Arguments and results as in `fla_swap.kernels.delta.ops.gated_delta_rule`; computes in q's dtype, at least fp32.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    batch, _, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    factor = width**-0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v, beta = (x.to(compute) for x in (q, k, v, beta))
    g = None if g is None else g.to(compute)
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    q, k = (x.repeat_interleave(value_heads // heads, dim=2) for x in (q, k))
    state = q.new_zeros(batch, value_heads, width, value_width) if initial_state is None else initial_state.to(compute)
    if cu_seqlens is None:
        o, state = _loop(q, k, v, g, beta, state)
    else:
        bounds = cu_seqlens.tolist()
        if initial_state is None:
            state = state.expand(len(bounds) - 1, -1, -1, -1)
        outputs, states = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            q_n, k_n, v_n, beta_n = (x[:, start:stop] for x in (q, k, v, beta))
            g_n = None if g is None else g[:, start:stop]
            piece, last = _loop(q_n, k_n, v_n, g_n, beta_n, state[n : n + 1])
            outputs.append(piece)
            states.append(last)
        o, state = torch.cat((*outputs, v.new_zeros(v[:, bounds[-1] :].shape)), 1), torch.cat(states)
    return (o * factor).to(out_dtype), state if output_final_state else None


def _loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """o without the scale, and the last state; every argument has HV heads."""
    rows = []
    decays = beta.new_ones(beta.shape) if g is None else g.exp()
    steps = zip(*(x.unbind(1) for x in (q, k, v, decays, beta)), strict=True)
    for q_t, k_t, v_t, decay, beta_t in steps:
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        wrong = v_t - torch.einsum("bhk,bhkv->bhv", k_t, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, beta_t[..., None] * wrong)
        rows.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(rows, 1) if rows else v, state


def make_inputs(
    device: torch.device | str,
    dtype: torch.dtype,
    T: int,
    H: int,
    D: int,
    seed: int,
    gated: bool = True,
    channels: bool = False,
) -> dict[str, Tensor]:
    """Random inputs for one comparison: B = 2, HV = 2H, K = V = D, β from 0 to 2, decays down to e^−0.5 a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    tensors = {"q": normal(2, T, H, D), "k": normal(2, T, H, D), "v": normal(2, T, 2 * H, D)}
    if gated:
        tensors["g"] = uniform(2, T, 2 * H, *((D,) if channels else ())) * -0.5
    tensors["beta"] = uniform(2, T, 2 * H) * 2
    tensors = {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}
    tensors["initial_state"] = (normal(2, 2 * H, D, D) * 0.3).to(device).requires_grad_()
    return tensors


def _delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    return gated_delta_rule_reference(q, k, v, None, beta, **options)


def operator(name: str) -> Callable[..., Any]:
    """The public operator, looked up when called: `ops` imports this module."""

    def call(**arguments: Any) -> Any:
        from fla_swap.kernels.delta import ops

        return getattr(ops, name)(**arguments)

    call.__name__ = name
    return call


OPTIONS = {"output_final_state": True, "qk_l2norm": True}
NUMERICS_CASES: tuple[dict[str, Any], ...] = (
    {
        "name": "gated_delta_rule",
        "op": operator("gated_delta_rule"),
        "reference": gated_delta_rule_reference,
        "make": make_inputs,
        "kwargs": OPTIONS,
    },
    {
        "name": "delta_rule",
        "op": operator("delta_rule"),
        "reference": _delta_rule_reference,
        "make": partial(make_inputs, gated=False),
        "kwargs": OPTIONS,
    },
    {
        "name": "kda",
        "op": operator("kda"),
        "reference": gated_delta_rule_reference,
        "make": partial(make_inputs, channels=True),
        "kwargs": OPTIONS,
    },
)
