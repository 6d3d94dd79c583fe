"""The fused functions written out plainly (whole logits, loops over time): the oracle. Works in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.fused.ops import (
    gated_rms_norm,
    linear_cross_entropy,
    linear_kl,
    rms_norm,
    short_conv,
)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_kl_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels_mask: Tensor | None = None,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Same contract as `linear_kl`, from whole logits."""
    student = _logits(student_hidden, student_weight, student_bias, softcap) / temperature
    teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, softcap).detach() / temperature
    per_token = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    mask = torch.ones_like(per_token) if labels_mask is None else labels_mask.to(per_token.dtype)
    total = (per_token * mask).sum()
    return total if reduction == "sum" else total / mask.sum().clamp_min(1)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Same contract as `linear_cross_entropy`, from whole logits."""
    logits = _logits(hidden, weight, bias, softcap).flatten(0, -2)
    counted = labels.flatten() != ignore_index
    logs = logits.log_softmax(-1)[counted]
    total = -logs.gather(1, labels.flatten()[counted, None]).sum()
    return total if reduction == "sum" else total / counted.sum().clamp_min(1)


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `short_conv`, one token at a time."""
    bounds = [(row, 0, x.shape[1]) for row in range(x.shape[0])]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        bounds = [(0, ends[n], ends[n + 1]) for n in range(len(ends) - 1)]
    rows = [[torch.zeros_like(x[0, 0]) for _ in range(x.shape[1])] for _ in range(x.shape[0])]
    states = []
    for n, (row, begin, end) in enumerate(bounds):
        state = x.new_zeros(x.shape[2], weight.shape[1] - 1) if initial_state is None else initial_state[n]
        for t in range(begin, end):
            seen = torch.cat((state, x[row, t][:, None]), 1)
            y = (seen * weight).sum(1) + (0.0 if bias is None else bias)
            rows[row][t] = y if activation is None else y * torch.sigmoid(y)
            state = seen[:, 1:]
        states.append(state)
    out = torch.stack([torch.stack(row) for row in rows])
    return out, torch.stack(states) if output_final_state else None


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Same contract as `rms_norm`."""
    normalised = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight


def gated_rms_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, activation: str = "silu"
) -> Tensor:
    """Same contract as `gated_rms_norm`."""
    factor = torch.sigmoid(gate) * (gate if activation == "silu" else 1.0)
    return rms_norm_reference(x, weight, eps) * factor


def _normals(device: torch.device | str, dtype: torch.dtype, seed: int, **shapes: tuple[int, ...]):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def _make_kl(device, dtype, T, H, D, seed) -> dict[str, Tensor]:
    shapes = {name: (2, T, D) for name in ("student_hidden", "teacher_hidden")}
    weights = {name: (1000, D) for name in ("student_weight", "teacher_weight")}
    tensors = _normals(device, dtype, seed, **shapes, **weights)
    for name in weights:
        tensors[name] = (tensors[name].detach() * D**-0.5).requires_grad_()
    return {n: t.detach() if n.startswith("teacher") else t for n, t in tensors.items()}


def _make_cross_entropy(device, dtype, T, H, D, seed) -> dict[str, Tensor]:
    tensors = _normals(device, dtype, seed, hidden=(2, T, D), weight=(1000, D))
    tensors["weight"] = (tensors["weight"].detach() * D**-0.5).requires_grad_()
    labels = torch.randint(0, 1000, (2, T), generator=torch.Generator().manual_seed(seed))
    labels[:, 0] = -100
    return {**tensors, "labels": labels.to(device)}


def _make_conv(device, dtype, T, H, D, seed) -> dict[str, Tensor]:
    shapes = {"x": (2, T, H * D), "weight": (H * D, 4), "bias": (H * D,), "initial_state": (2, H * D, 3)}
    return _normals(device, dtype, seed, **shapes)


def _make_norm(device, dtype, T, H, D, seed) -> dict[str, Tensor]:
    return _normals(device, dtype, seed, x=(2, T, H, D), weight=(D,))


def _make_gated_norm(device, dtype, T, H, D, seed) -> dict[str, Tensor]:
    return _normals(device, dtype, seed, x=(2, T, H, D), gate=(2, T, H, D), weight=(D,))


NUMERICS_CASES: tuple[dict[str, Any], ...] = (
    {"op": linear_kl, "reference": linear_kl_reference, "make": _make_kl, "kwargs": {}},
    {
        "op": linear_cross_entropy,
        "reference": linear_cross_entropy_reference,
        "make": _make_cross_entropy,
        "kwargs": {},
    },
    {
        "op": short_conv,
        "reference": short_conv_reference,
        "make": _make_conv,
        "kwargs": {"activation": "silu", "output_final_state": True},
    },
    {"op": rms_norm, "reference": rms_norm_reference, "make": _make_norm, "kwargs": {}},
    {"op": gated_rms_norm, "reference": gated_rms_norm_reference, "make": _make_gated_norm, "kwargs": {}},
)
