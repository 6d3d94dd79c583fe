"""Triton for `based` and `rebased`, forward and backward. Imported only when Triton is chosen.

state           what the segments before each segment hold; backwards in time: the gradient of that
forward         o and the denominators, one program per block of queries
delta           1 / denominator and the denominators' gradient
query_grad      dq, one program per block of queries
key_value_grad  dk and dv, one program per block of keys
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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
from fla_swap.kernels.launching import Configuration, Launch, Recorder, has_large_memory, launch_now

MAX_VALUE_WIDTH = 256
SEGMENT = 512
TILE = 64
KEY_PAD = 16

States = tuple[Tensor | None, Tensor | None]


class Blocks(NamedTuple):
    """Tile sizes and how to run a kernel: BQ queries, BK keys (tokens at a time in the state kernel)."""

    queries: int
    keys: int
    warps: int
    stages: int


LARGE = {
    "forward": Blocks(128, 64, 8, 2),
    "query": Blocks(128, 64, 8, 2),
    "key": Blocks(64, 128, 8, 2),
    "state": Blocks(64, 64, 8, 2),
}
"""For bf16 and fp16 on chips that give a block 200 KiB of shared memory, by measurement on an H100."""


def blocks_for(kind: str, dtype: torch.dtype, value_block: int, large: bool) -> Blocks:
    """How to run a kernel. fp32 products run without tensor cores, whose code grows with the tile."""
    if dtype == torch.float32:
        small = kind == "key" and value_block > 128 and not large  # 106 KiB of shared memory with 32
        return Blocks(32, 16 if small else 32, 8 if value_block > 128 else 4, 1)
    if value_block > 128:
        return Blocks(64, 64 if kind == "key" else 32, 8, 1)
    return LARGE[kind] if large else Blocks(64, 32, 4, 1)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: shapes, packed bounds, precision, and how to launch (the cross-compile test records instead)."""

    q: Tensor
    v: Tensor
    bounds: Tensor | None
    valid: Tensor | None
    scale: float
    eps: float
    taylor: bool
    launch: Launch
    large: bool

    @property
    def value_block(self) -> int:
        """V padded; at least 64, so that no product has a narrow operand on that side."""
        return max(64, 1 << (self.v.shape[3] - 1).bit_length())

    def run(self, kernel: Any, kind: str, programs: tuple[int, ...] | None = None, **arguments: Any) -> None:
        """Launch a kernel; without `programs`, over blocks of queries (of keys for "key")."""
        blocks = blocks_for(kind, self.q.dtype, self.value_block, self.large)
        if programs is None:
            slots, place = self.blocks(blocks.keys if kind == "key" else blocks.queries)
            arguments |= place | {"BQ": blocks.queries, "BK": blocks.keys}
            programs = (slots, self.q.shape[2])
        else:
            arguments["C"] = blocks.keys
        self.launch(kernel, programs, blocks.warps, blocks.stages, **arguments)

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
            "valid": None if self.valid is None else self.valid.view(torch.uint8),
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
            "BV": self.value_block,
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
    p: Problem,
    x: Tensor,
    y: Tensor,
    initial: States,
    factor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    whole: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """States before each segment and after the last; with `factor` and `weight`, gradients after each and before all.

    The last is right only if `whole`. The states that only the kernels read are rounded to q's dtype if that is bf16,
    as the products would.
    """
    slots = p.segments if p.bounds is not None else p.segments * p.sequences
    states, sums = p.state(slots, torch.bfloat16 if p.q.dtype == torch.bfloat16 else torch.float32)
    final, final_sum = p.state(p.sequences, torch.float32)
    shared = p.shared
    p.run(
        state_kernel,
        "state",
        (p.sequences * p.q.shape[2] * shared["TILES"],),
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
        REVERSE=factor is not None,
        WHOLE=whole,
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
    valid: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    output_final_state: bool,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o, the denominators [B,T,H], and the final state if asked for."""
    q, k, v, initial, initial_sum, cu_seqlens, valid = _contiguous(q, k, v, initial, initial_sum, cu_seqlens, valid)
    large = has_large_memory(q.device) if large is None else large
    p = Problem(
        q=q, v=v, bounds=cu_seqlens, valid=valid, scale=scale, eps=eps, taylor=taylor, launch=launch, large=large
    )
    states: States = (None, None)
    final: States = (None, None)
    if output_final_state or initial is not None or q.shape[1] > SEGMENT:
        states, final = walk(p, k, v, (initial, initial_sum), whole=output_final_state)
    o, den = p.new(v.shape, v.dtype), p.new(q.shape[:3], torch.float32)
    p.run(
        forward_kernel,
        "forward",
        q=q,
        k=k,
        v=v,
        states=states[0],
        sums=states[1],
        o=o,
        den_out=den,
        eps=eps,
        FROM_START=initial is not None,
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
    valid: Tensor | None,
    o: Tensor,
    den: Tensor,
    out_grad: Tensor,
    den_out_grad: Tensor | None,
    final_grad: Tensor | None,
    final_sum_grad: Tensor | None,
    scale: float,
    eps: float,
    taylor: bool,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and, if there is one, of the initial state."""
    q, k, v, initial, initial_sum, cu_seqlens, valid = _contiguous(q, k, v, initial, initial_sum, cu_seqlens, valid)
    out_grad, final_grad, final_sum_grad = _contiguous(out_grad.to(q.dtype), final_grad, final_sum_grad)
    large = has_large_memory(q.device) if large is None else large
    p = Problem(
        q=q, v=v, bounds=cu_seqlens, valid=valid, scale=scale, eps=eps, taylor=taylor, launch=launch, large=large
    )
    factor, den_grad = _delta(p, o, out_grad, den)
    if den_out_grad is not None:
        den_grad += den_out_grad
    given = {"q": q, "k": k, "v": v, "out_grad": out_grad, "factor": factor, "den_grad": den_grad, **p.shared}
    long = q.shape[1] > SEGMENT
    states: States = (None, None)
    if initial is not None or long:
        states, _ = walk(p, k, v, (initial, initial_sum), whole=False)
    dq = p.new(q.shape, q.dtype)
    p.run(
        query_grad_kernel,
        "query",
        states=states[0],
        sums=states[1],
        dq=dq,
        FROM_START=initial is not None,
        **given,
    )
    states, start_grad = (None, None), (None, None)
    if initial is not None or final_grad is not None or long:
        states, start_grad = walk(
            p, q, out_grad, (final_grad, final_sum_grad), factor, den_grad, whole=initial is not None
        )
    dk, dv = p.new(k.shape, k.dtype), p.new(v.shape, v.dtype)
    p.run(
        key_value_grad_kernel,
        "key",
        states=states[0],
        sums=states[1],
        dk=dk,
        dv=dv,
        FROM_END=final_grad is not None,
        **given,
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
        BV=p.value_block,
        C=32,
        N=p.sequences,
        PACKED=p.bounds is not None,
    )
    return factor, den_grad


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def configurations(large: bool = False) -> Iterator[Configuration]:
    """Kernels as shipped, bf16 and fp32, V 64, 128 and 256. `large`: see `blocks_for`."""
    record = Recorder()
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 256):
            for taylor, packed in ((True, False), (False, True)):
                _record_calls(dtype, width, taylor, packed, large, record)
    yield from record.found.values()


def _record_calls(dtype: torch.dtype, width: int, taylor: bool, packed: bool, large: bool, record: Recorder) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = new(1, 128, 2, 16), new(1, 128, 2, 16), new(1, 128, 2, width)
    bounds = new(4, dtype=torch.int32) if packed else None
    valid = new(1, 128, dtype=torch.bool) if packed else None
    lead = (3 if packed else 1, 2, feature_count(16, taylor=taylor))
    state, sums = new(*lead, width, dtype=torch.float32), new(*lead, dtype=torch.float32)
    den = new(1, 128, 2, dtype=torch.float32)
    options = {"launch": record, "large": large}
    forward(q, k, v, state, sums, bounds, valid, 0.25, 1e-6, taylor, True, **options)
    backward(q, k, v, state, sums, bounds, valid, v, den, v, den, state, sums, 0.25, 1e-6, taylor, **options)
