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


def _make_inputs(
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


def _operator(name: str) -> Callable[..., Any]:
    """The public operator, looked up when called: `ops` imports this module."""

    def call(**arguments: Any) -> Any:
        from fla_swap.kernels.delta import ops

        return getattr(ops, name)(**arguments)

    call.__name__ = name
    return call


_OPTIONS = {"output_final_state": True, "qk_l2norm": True}
_PLAIN_CASES: tuple[dict[str, Any], ...] = (
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
    {
        "name": "kda",
        "op": _operator("kda"),
        "reference": gated_delta_rule_reference,
        "make": partial(_make_inputs, channels=True),
        "kwargs": _OPTIONS,
    },
)


def _hard_inputs(
    device: torch.device | str,
    dtype: torch.dtype,
    T: int,
    H: int,
    D: int,
    seed: int,
    *,
    gates: tuple[float, ...] = (),
    channels: bool = False,
    repeated: bool = False,
    largest: float = 1.0,
) -> dict[str, Tensor]:
    """`_make_inputs` with B = 1, every gate one of `gates`, β up to `largest`, and one key for all tokens if asked."""
    tensors = {name: x.detach() for name, x in _make_inputs("cpu", torch.float32, T, H, D, seed).items()}
    tensors = {name: x[:1] for name, x in tensors.items() if name != "g"}
    tensors["beta"] *= largest / 2
    if repeated:
        tensors["k"] = tensors["k"][:, :1].expand(-1, T, -1, -1).clone()
    if gates:
        shape = (1, T, 2 * H, *((D,) if channels else ()))
        chosen = torch.randint(len(gates), shape, generator=torch.Generator().manual_seed(seed))
        tensors["g"] = torch.tensor(gates)[chosen]
    return {
        name: x.to(device, torch.float32 if name == "initial_state" else dtype).requires_grad_()
        for name, x in tensors.items()
    }


def _chunked(name: str) -> Callable[..., Any]:
    """The operator's PyTorch chunks in float64, where a loop over all steps would take too much memory."""
    return partial(_operator(name), implementation="torch")


def _hard_cases() -> tuple[dict[str, Any], ...]:
    """What breaks delta rules: repeated keys, β to 2 without decay, gates that forget all or nothing, many steps."""
    references = {case["name"]: case["reference"] for case in _PLAIN_CASES}
    found = []
    for name, note, shapes, options in (
        ("delta_rule", "one key repeated, beta to 1", ((130, 64), (1000, 128)), {"repeated": True}),
        ("delta_rule", "random unit keys, beta to 2", ((130, 64), (1000, 128)), {"largest": 2.0}),
        ("gated_delta_rule", "gates 0 and -10", ((1, 64), (130, 64), (1000, 128)), {"gates": (0.0, -10.0)}),
        ("kda", "gates 0 and -10", ((1, 64), (130, 64), (1000, 128)), {"gates": (0.0, -10.0), "channels": True}),
        ("delta_rule", "65,536 steps", ((65_536, 64),), {}),
        ("gated_delta_rule", "65,536 steps", ((65_536, 64),), {"gates": (0.0, -0.001, -10.0)}),
        ("kda", "65,536 steps", ((65_536, 64),), {"gates": (0.0, -0.001, -10.0), "channels": True}),
        ("gated_delta_rule", "20 seeds", ((300, 64),), {"gates": (0.0, -0.01, -1.0, -10.0), "largest": 2.0}),
        ("kda", "20 seeds", ((300, 64),), {"gates": (0.0, -0.01, -1.0, -10.0), "channels": True, "largest": 2.0}),
    ):
        long = "steps" in note
        found.append(
            {
                "name": f"{name}, {note}",
                "op": _operator(name),
                "reference": _chunked(name) if long else references[name],
                "make": partial(_hard_inputs, **options),
                "kwargs": _OPTIONS,
                "shapes": shapes,
                "seeds": 20 if "seeds" in note else 1,
            }
        )
    return tuple(found)


NUMERICS_CASES = _PLAIN_CASES + _hard_cases()
