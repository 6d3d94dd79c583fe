"""How the kernels of `matvec_triton.py` are launched. Imported only when Triton is chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.fused.matvec import ACTIVATIONS, MAX_MATRICES, MAX_TOKENS, any_of, outputs, tokens_of
from fla_swap.kernels.fused.matvec_triton import matmul_kernel, matvec_kernel
from fla_swap.kernels.launching import Configuration, Launch, Recorder, has_large_memory, launch_now

# Of one token: the four products of a layer in a row reach 3.4 TB/s on an H200; 8 rows by 512 columns 2.5.
ROWS, COLUMNS = 4, 1024
MATRIX_ROWS = 64


def few_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Tensor | None,
    norm_offset: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> Tensor:
    """As `matvec.few_linears`, on checked arguments."""
    x, width, tokens = x.contiguous(), x.shape[-1], tokens_of(x)
    o = x.new_empty((*x.shape[:-1], outputs(weights, activation)))
    ends, end = [], 0
    for weight in weights[:1] if activation else weights:
        end += weight.shape[0]
        ends.append(end)
    ends += [end] * (MAX_MATRICES - len(ends))
    matrices = [*weights, *[weights[-1]] * (MAX_MATRICES - len(weights))]
    given = [*(x if b is None else b for b in biases), *[x] * (MAX_MATRICES - len(biases))]
    shared: dict[str, Any] = {
        "x": x,
        "scale": x if norm is None else norm,
        "residual": None if residual is None else residual.contiguous(),
        **{f"w{i}": w for i, w in enumerate(matrices)},
        **{f"b{i}": b for i, b in enumerate(given)},
        "o": o,
        **{f"e{i}": e for i, e in enumerate(ends)},
        "total": end,
        "eps": eps,
        "K": width,
        "NORM": int(norm is not None),
        "OFFSET": norm_offset,
        "BIASED": sum(1 << i for i, b in enumerate(biases) if b is not None) if any_of(biases) else 0,
        "ACT": 0 if activation is None else 1 + ACTIVATIONS.index(activation),
    }
    rows = [w.shape[0] for w in (weights[:1] if activation else weights)]
    if tokens == 1:
        early: dict[str, Any] = {"launch_pdl": True} if can_start_early(x.device) else {}
        launch(
            matvec_kernel, (sum(-(-n // ROWS) for n in rows),), 4, 3,
            **shared, BN=ROWS, BK=COLUMNS, PDL=bool(early), **early,
        )  # fmt: skip
        return o
    large = has_large_memory(x.device) if large is None else large
    columns, stages = (128, 4) if large else (64, 2)
    launch(
        matmul_kernel, (sum(-(-n // MATRIX_ROWS) for n in rows),), 4, stages,
        **shared, rows=tokens, BM=16, BN=MATRIX_ROWS, BK=columns, STAGES=stages,
    )  # fmt: skip
    return o


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended (sm_90 on)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def configurations(large: bool = True) -> list[Configuration]:
    """What the shipped configurations compile."""
    record = Recorder()
    for tokens in (1, MAX_TOKENS):
        for dtype in (torch.bfloat16, torch.float16):
            x, norm, w = (torch.empty(*shape, dtype=dtype) for shape in ((tokens, 2048), (2048,), (2048, 2048)))
            few_linears(x, [w] * 3, [None, norm, None], norm, 0.0, 1e-6, None, None, record, large)
            few_linears(x, [w] * 2, [None, None], norm, 1.0, 1e-6, "silu", x, record, large)
    return list(record.found.values())
