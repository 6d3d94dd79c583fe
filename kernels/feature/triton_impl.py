"""Triton for `based` and `rebased`, forward and backward. Imported only when Triton is chosen.

state           what the segments before each segment hold; backwards in time: the gradient of that
forward         o and the denominators, one program per block of queries
delta           1 / denominator and the denominators' gradient
query_grad      dq, one program per block of queries
key_value_grad  dk and dv, one program per block of keys
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.common import chunk_bound, chunk_table, triton_interpreted
from fla_swap.kernels.feature.maps import feature_count
from fla_swap.kernels.feature.triton_kernels import (
    delta_kernel,
    forward_kernel,
    key_value_grad_kernel,
    query_grad_kernel,
    state_kernel,
)

MAX_VALUE_WIDTH = 256
SEGMENT = 512
TILE = 64
KEY_PAD = 16

Launch = Callable[..., None]
States = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Tile sizes and how to run a kernel: BQ queries, BK keys (C tokens in the state kernel)."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = Blocks(queries=128, keys=64, warps=8, stages=2)
QUERY_GRAD = Blocks(queries=128, keys=64, warps=8, stages=2)
KEY_VALUE_GRAD = Blocks(queries=64, keys=64, warps=4, stages=2)
STATE = Blocks(queries=64, keys=64, warps=4, stages=2)


def launch_now(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run a kernel."""
    if not all(grid):
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: shapes, packed bounds, precision, and how to launch (the cross-compile test records instead)."""

    q: Tensor
    v: Tensor
    bounds: Tensor | None
    scale: float
    eps: float
    taylor: bool
    launch: Launch

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.bounds is None else self.bounds.shape[0] - 1

    @property
    def features(self) -> int:
        return feature_count(self.q.shape[3], taylor=self.taylor)

    @property
    def segments(self) -> int:
        """Segments of a sequence; of all of them together when packed."""
        time = self.q.shape[1]
        return -(-time // SEGMENT) if self.bounds is None else chunk_bound(time, SEGMENT, self.sequences)

    @property
    def first_slots(self) -> Tensor | None:
        """The first segment of each packed sequence."""
        if self.bounds is None:
            return None
        counts = ((self.bounds[1:] - self.bounds[:-1]).to(torch.int64) + SEGMENT - 1) // SEGMENT
        return counts.cumsum(0) - counts

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments of every kernel but `delta`."""
        q, narrow = self.q, self.q.dtype == torch.bfloat16 and not triton_interpreted()
        return {
            "bounds": self.bounds,
            "first_slots": self.first_slots,
            "T": q.shape[1],
            "H": q.shape[2],
            "SEGMENTS": self.segments,
            "scale": self.scale,
            "K": q.shape[3],
            "V": self.v.shape[3],
            "F": self.features,
            "TILES": -(-self.features // TILE),
            "KP": KEY_PAD,
            "BV": max(16, triton.next_power_of_2(self.v.shape[3])),
            "L": SEGMENT,
            "TAYLOR": self.taylor,
            "PACKED": self.bounds is not None,
            "DOT": tl.bfloat16 if narrow else tl.float32,
            "PRECISION": "tf32" if q.dtype == torch.float16 and torch.version.hip is None else "ieee",
        }

    def blocks(self, size: int) -> tuple[int, dict[str, Any]]:
        """(slots, arguments): where the blocks of `size` tokens are."""
        batch, time = self.q.shape[:2]
        if self.bounds is None:
            count = -(-time // size)
            return batch * count, {"table": None, "BLOCKS": count}
        return chunk_bound(time, size, self.sequences), {"table": chunk_table(self.bounds, time, size), "BLOCKS": 0}

    def new(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """An output over tokens: zero where no packed sequence is."""
        make = torch.empty if self.bounds is None else torch.zeros
        return make(shape, dtype=dtype, device=self.q.device)

    def state(self, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        lead, device = (slots, self.q.shape[2], self.features), self.q.device
        state = torch.empty((*lead, self.v.shape[3]), dtype=dtype, device=device)
        return state, torch.empty(lead, dtype=torch.float32, device=device)


def walk(
    p: Problem, x: Tensor, y: Tensor, initial: States, factor: Tensor | None = None, weight: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """States before each segment and after the last; with `factor` and `weight`, gradients after each and before all.

    The states that only the kernels read are rounded to q's dtype if that is bf16, as the products would.
    """
    slots = p.segments if p.bounds is not None else p.segments * p.sequences
    states, sums = p.state(slots, torch.bfloat16 if p.q.dtype == torch.bfloat16 else torch.float32)
    final, final_sum = p.state(p.sequences, torch.float32)
    shared = p.shared
    p.launch(
        state_kernel,
        (p.sequences * p.q.shape[2] * shared["TILES"],),
        STATE.warps,
        STATE.stages,
        x=x,
        y=y,
        factor=factor,
        weight=weight,
        initial=initial[0],
        initial_sum=initial[1],
        states=states,
        sums=sums,
        final=final,
        final_sum=final_sum,
        C=STATE.keys,
        REVERSE=factor is not None,
        **shared,
    )
    return (states, sums), (final, final_sum)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    output_final_state: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o, the denominators [B,T,H], and the final state if asked for."""
    q, k, v, initial, initial_sum, cu_seqlens = _contiguous(q, k, v, initial, initial_sum, cu_seqlens)
    p = Problem(q=q, v=v, bounds=cu_seqlens, scale=scale, eps=eps, taylor=taylor, launch=launch)
    states: States = (None, None)
    final: States = (None, None)
    if output_final_state or initial is not None or q.shape[1] > SEGMENT:
        states, final = walk(p, k, v, (initial, initial_sum))
    o, den = p.new(v.shape, v.dtype), p.new(q.shape[:3], torch.float32)
    slots, place = p.blocks(FORWARD.queries)
    launch(
        forward_kernel,
        (slots, q.shape[2]),
        FORWARD.warps,
        FORWARD.stages,
        q=q,
        k=k,
        v=v,
        states=states[0],
        sums=states[1],
        o=o,
        den_out=den,
        eps=eps,
        BQ=FORWARD.queries,
        BK=FORWARD.keys,
        FROM_START=initial is not None,
        **place,
        **p.shared,
    )
    return o, den, final[0], final[1]


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    initial_sum: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    den: Tensor,
    out_grad: Tensor,
    final_grad: Tensor | None,
    final_sum_grad: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and, if there is one, of the initial state."""
    q, k, v, initial, initial_sum, cu_seqlens = _contiguous(q, k, v, initial, initial_sum, cu_seqlens)
    out_grad, final_grad, final_sum_grad = _contiguous(out_grad.to(q.dtype), final_grad, final_sum_grad)
    p = Problem(q=q, v=v, bounds=cu_seqlens, scale=scale, eps=eps, taylor=taylor, launch=launch)
    factor, den_grad = _delta(p, o, out_grad, den)
    given = {"q": q, "k": k, "v": v, "out_grad": out_grad, "factor": factor, "den_grad": den_grad, **p.shared}
    long = q.shape[1] > SEGMENT
    states: States = (None, None)
    if initial is not None or long:
        states, _ = walk(p, k, v, (initial, initial_sum))
    dq = p.new(q.shape, q.dtype)
    slots, place = p.blocks(QUERY_GRAD.queries)
    launch(
        query_grad_kernel,
        (slots, q.shape[2]),
        QUERY_GRAD.warps,
        QUERY_GRAD.stages,
        states=states[0],
        sums=states[1],
        dq=dq,
        BQ=QUERY_GRAD.queries,
        BK=QUERY_GRAD.keys,
        FROM_START=initial is not None,
        **given,
        **place,
    )
    states, start_grad = (None, None), (None, None)
    if initial is not None or final_grad is not None or long:
        states, start_grad = walk(p, q, out_grad, (final_grad, final_sum_grad), factor, den_grad)
    dk, dv = p.new(k.shape, k.dtype), p.new(v.shape, v.dtype)
    slots, place = p.blocks(KEY_VALUE_GRAD.keys)
    launch(
        key_value_grad_kernel,
        (slots, q.shape[2]),
        KEY_VALUE_GRAD.warps,
        KEY_VALUE_GRAD.stages,
        states=states[0],
        sums=states[1],
        dk=dk,
        dv=dv,
        BQ=KEY_VALUE_GRAD.queries,
        BK=KEY_VALUE_GRAD.keys,
        FROM_END=final_grad is not None,
        **given,
        **place,
    )
    return dq, dk, dv, start_grad[0], start_grad[1]


def _delta(p: Problem, o: Tensor, out_grad: Tensor, den: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (den + eps) and the gradient of the denominators, both [B,T,H]."""
    factor, den_grad = torch.empty_like(den), torch.empty_like(den)
    width = p.v.shape[3]
    p.launch(
        delta_kernel,
        (-(-den.numel() // 32),),
        4,
        1,
        o=o,
        out_grad=out_grad,
        den=den,
        bounds=p.bounds,
        factor=factor,
        den_grad=den_grad,
        TOKENS=p.q.shape[0] * p.q.shape[1],
        H=p.q.shape[2],
        eps=p.eps,
        V=width,
        BV=max(16, triton.next_power_of_2(width)),
        C=32,
        N=p.sequences,
        PACKED=p.bounds is not None,
    )
    return factor, den_grad


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]
