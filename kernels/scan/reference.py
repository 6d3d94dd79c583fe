"""Scans over channels as plain loops over time: the oracles for every faster form. They work in float64.

hgrn            h_t = exp(g_t) h_{t−1} + x_t                                                  HGRN, 2311.04823
selective_scan  h_t = exp(δ_t A) h_{t−1} + δ_t B_t x_t,   y_t = C_t · h_t + D x_t, gated      Mamba, 2312.00752
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def hgrn_reference(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`hgrn` step by step, in float64 when x is float64 and in float32 otherwise. Arguments as for `ops.hgrn`."""
    batch, time, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, gates = x.to(dtype), g.to(dtype)
    outputs, finals = [], []
    for start, stop, sequence in _segments(batch, time, cu_seqlens):
        rows = 1 if cu_seqlens is not None else batch
        state = values.new_zeros(rows, width) if initial_state is None else initial_state[sequence].to(dtype)
        for t in range(start, stop):
            state = gates[:, t].exp() * state + values[:, t]
            outputs.append(state)
        finals.append(state)
    h = _join(outputs, values)
    return h.to(x.dtype), torch.cat(finals) if output_final_state else None


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`selective_scan` step by step, in float64 when x is float64 and in float32 otherwise."""
    batch, time, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, delta, rates, inputs, reads = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    outputs, finals = [], []
    for start, stop, sequence in _segments(batch, time, cu_seqlens):
        if initial_state is None:
            state = values.new_zeros(1 if cu_seqlens is not None else batch, width, A.shape[1])
        else:
            state = initial_state[sequence].to(dtype)
        for t in range(start, stop):
            step = delta[:, t, :, None]
            state = (step * rates).exp() * state + step * values[:, t, :, None] * inputs[:, t, None, :]
            outputs.append((state * reads[:, t, None, :]).sum(-1))
        finals.append(state)
    y = _join(outputs, values)
    rows = len(outputs)
    if D is not None:
        y = torch.cat((y[:, :rows] + D.to(dtype) * values[:, :rows], y[:, rows:]), 1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), torch.cat(finals) if output_final_state else None


def _segments(batch: int, time: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, slice]]:
    """(first step, end, rows of the state) of each independent stretch of time."""
    if cu_seqlens is None:
        return [(0, time, slice(0, batch))]
    bounds = cu_seqlens.tolist()
    return [(bounds[n], bounds[n + 1], slice(n, n + 1)) for n in range(len(bounds) - 1)]


def _join(outputs: list[Tensor], like: Tensor) -> Tensor:
    """The steps [B, D] as [B, T, D], zeros where there was none."""
    joined = torch.stack(outputs, 1) if outputs else like[:, :0]
    missing = like.shape[1] - joined.shape[1]
    return torch.cat((joined, like.new_zeros(like.shape[0], missing, like.shape[2])), 1) if missing else joined


Make = Callable[[torch.device | str, torch.dtype, int, int, int, int], dict[str, Tensor]]


def make_hgrn(device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int) -> dict[str, Tensor]:
    """Random `hgrn` arguments of H·D channels (B = 2), for numerics tables and tests."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(2, T, H * D, generator=generator) for _ in range(2))
    state = torch.randn(2, H * D, generator=generator)
    made = {"x": x.to(dtype), "g": F.logsigmoid(g), "initial_state": state}
    return {name: tensor.to(device).requires_grad_() for name, tensor in made.items()}


def make_selective_scan(states: int = 16, *, bare: bool = False) -> Make:
    """A maker of random `selective_scan` arguments (B = 2, H·D channels); `bare`: without D, z and dt_bias."""

    def make(device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        width = H * D

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        made = {"x": normal(2, T, width).to(dtype), "dt": (normal(2, T, width) - 1).to(dtype)}
        made["A"] = -torch.exp(normal(width, states) / 2)
        made |= {name: normal(2, T, states).to(dtype) for name in ("B", "C")}
        if bare:
            made["dt"] = (made["dt"].abs() / 4).detach()
        else:
            made |= {"D": normal(width), "z": normal(2, T, width).to(dtype), "dt_bias": normal(width) / 2}
        made["initial_state"] = normal(2, width, states)
        return {name: tensor.to(device).requires_grad_() for name, tensor in made.items()}

    return make


def numerics_cases() -> tuple[dict[str, Any], ...]:
    """Build `NUMERICS_CASES` late: the public functions live in `ops`, which imports this file."""
    from fla_swap.kernels.scan.ops import hgrn, selective_scan

    scan = {"op": selective_scan, "reference": selective_scan_reference, "gates": ("dt", "A", "dt_bias")}
    return (
        {"name": "hgrn", "op": hgrn, "reference": hgrn_reference, "make": make_hgrn, "kwargs": {}},
        {"name": "selective_scan", "make": make_selective_scan(), "kwargs": {"dt_softplus": True}, **scan},
        {"name": "selective_scan, bare", "make": make_selective_scan(bare=True), "kwargs": {}, **scan},
    )


def __getattr__(name: str) -> Any:
    if name == "NUMERICS_CASES":
        return numerics_cases()
    raise AttributeError(name)
