"""The gated decay recurrence as a plain loop over time: the oracle for every faster form. Works in float64.

S_t = diag(exp g_t) S_{t-1} diag(exp gv_t) + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    u: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gla` step by step, in float64 when q is float64 and in float32 otherwise. Arguments as for `ops.gla`.

    With u [H,K] the output reads the state before the step, and k_t v_tᵀ through the bonus u (`rwkv6`).
    """
    batch, time, _, width = q.shape
    heads, value_width = v.shape[2], v.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = width**-0.5 if scale is None else scale
    group = heads // q.shape[2]
    qf, kf = (x.to(dtype).repeat_interleave(group, 2) for x in (q, k))
    vf = v.to(dtype)
    gf = None if g is None else g.to(dtype).repeat_interleave(heads // g.shape[2], 2)
    gvf = None if gv is None else gv.to(dtype)
    uf = None if u is None else u.to(dtype).repeat_interleave(group, 0).unsqueeze(-1)

    outputs, finals = [], []
    for start, stop, sequence in segments(batch, time, cu_seqlens):
        if initial_state is None:
            state = vf.new_zeros(1 if cu_seqlens is not None else batch, heads, width, value_width)
        else:
            state = initial_state[sequence].to(dtype)
        steps = []
        for t in range(start, stop):
            update = kf[:, t].unsqueeze(-1) * vf[:, t].unsqueeze(-2)
            if uf is not None:
                steps.append(((state + uf * update) * qf[:, t].unsqueeze(-1)).sum(-2) * factor)
            if gf is not None:
                state = state * gf[:, t].exp().unsqueeze(-1)
            if gvf is not None:
                state = state * gvf[:, t].exp().unsqueeze(-2)
            state = state + update
            if uf is None:
                steps.append((state * qf[:, t].unsqueeze(-1)).sum(-2) * factor)
        outputs += steps
        finals.append(state)
    o = torch.stack(outputs, 1) if outputs else vf[:, :0]
    if o.shape[1] < time:
        o = torch.cat([o, o.new_zeros(batch, time - o.shape[1], heads, value_width)], 1)
    return o.to(q.dtype), torch.cat(finals) if output_final_state else None


def rwkv6_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rwkv6` step by step. Arguments as for `rwkv6.rwkv6`."""
    return gla_reference(
        q,
        k,
        v,
        g,
        u=u,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def segments(batch: int, time: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, slice]]:
    """(first step, end, rows of the state) of each independent stretch of time."""
    if cu_seqlens is None:
        return [(0, time, slice(0, batch))]
    bounds = cu_seqlens.tolist()
    return [(bounds[n], bounds[n + 1], slice(n, n + 1)) for n in range(len(bounds) - 1)]


def make_inputs(
    gates: tuple[str, ...] = ("g",), *, states: bool = True, per_head: bool = False
) -> Callable[[torch.device | str, torch.dtype, int, int, int, int], dict[str, Tensor]]:
    """A maker of random `gla` arguments (B = 2, value width D) with these gates (or u), for numerics and tests.

    `per_head`: one gate for a head and step, [B,T,H].
    """

    def make(device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        values = {name: normal(2, T, H, D).to(dtype) for name in ("q", "k", "v")}
        for name in [name for name in gates if name != "u"]:
            size = (2, T, H) if per_head else (2, T, H, D)
            values[name] = (torch.nn.functional.logsigmoid(normal(*size)) / 4).float()
        if "u" in gates:
            values["u"] = normal(H, D).float()
        if states:
            values["initial_state"] = normal(2, H, D, D)
        return {name: x.to(device).requires_grad_() for name, x in values.items()}

    return make


def numerics_cases() -> tuple[dict[str, Any], ...]:
    """Build `NUMERICS_CASES` late: the public functions live in `ops`, which imports this file."""
    from fla_swap.kernels.decay.ops import gla
    from fla_swap.kernels.decay.rwkv6 import rwkv6
    from fla_swap.kernels.decay.simple_ops import linear_attention, retention, retention_decay, simple_gla

    def per_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return gla_reference(q, k, v, g.unsqueeze(-1).expand(*g.shape, q.shape[3]), **options)

    def fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return per_head(q, k, v, retention_decay(v.shape[2], q.device).to(v.dtype).expand(v.shape[:3]), **options)

    cases = (
        ("gla", gla, gla_reference, make_inputs(("g",))),
        ("gla, gv", gla, gla_reference, make_inputs(("g", "gv"))),
        ("gla, gv alone", gla, gla_reference, make_inputs(("gv",))),
        ("gla, no gate", gla, gla_reference, make_inputs(())),
        ("rwkv6", rwkv6, rwkv6_reference, make_inputs(("g", "u"))),
        ("simple_gla", simple_gla, per_head, make_inputs(("g",), per_head=True)),
        ("retention", retention, fixed, make_inputs(())),
        ("linear_attention", linear_attention, gla_reference, make_inputs(())),
    )
    return tuple({"name": n, "op": op, "reference": ref, "make": make, "kwargs": {}} for n, op, ref, make in cases)


def __getattr__(name: str) -> Any:
    if name == "NUMERICS_CASES":
        return numerics_cases()
    raise AttributeError(name)
