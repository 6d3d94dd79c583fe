"""How a call to the Triton kernels is cut into programs: segments of time, tables of packed sequences, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.common import chunk_bound, chunk_table, triton_interpreted
from fla_swap.kernels.decay.triton_side import side_kernel
from fla_swap.kernels.decay.triton_stream import stream_kernel
from fla_swap.kernels.decay.triton_value import value_kernel
from fla_swap.kernels.launching import Launch, has_large_memory

CHUNK = 64
BLOCK = 64
PROGRAMS = 264  # enough to fill a large GPU; with fewer, time is cut into segments
SHORTEST = 8  # chunks of a segment at least
GROUP = 16  # chunks that one program looks through for those that forget too much


def blocks(width: int) -> int:
    return -(-width // BLOCK)


def narrow_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of stored states and scaled rows: fp16's range is too small, and Triton's interpreter truncates to bf16."""
    return torch.bfloat16 if dtype == torch.bfloat16 and not triton_interpreted() else torch.float32


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, tables and precision of one call, and how to launch (the cross-compile test records instead).

    A sequence has `chunks` chunks (at most, when packed) and is cut into `segments` of `segment` chunks. Tables of
    packed sequences hold first token, tokens and first slot: `whole` [N,3] with chunk slots, `marks` [N,3] with
    segment slots, `cut` [units,3] for the segments, with chunk slots. `places` [slots,2]: first token and
    tokens of the chunks. `large`: the chip gives a block 200 KiB of shared memory or more.
    """

    heads: int
    width: int
    value_width: int
    time: int
    chunks: int
    sequences: int
    slots: int
    segment: int
    segments: int
    units: int
    whole: Tensor | None
    marks: Tensor | None
    cut: Tensor | None
    places: Tensor | None
    dtype: torch.dtype
    device: torch.device
    launch: Launch
    large: bool

    @property
    def single(self) -> bool:
        """Whether one program sees a whole sequence."""
        return self.segments == 1

    @property
    def narrow(self) -> torch.dtype:
        """See `narrow_dtype`."""
        return narrow_dtype(self.dtype)

    @property
    def limit(self) -> float:
        """How much half a chunk may decay (natural log) on the fast path; bounds fp32 rounding for wide inputs."""
        return 60.0 if self.dtype == torch.bfloat16 else 16.0

    @property
    def precision(self) -> dict[str, Any]:
        """bf16 multiplies natively, fp16 in tf32 (the state may pass 65,504), fp32 as three tf32 products.

        Triton's interpreter cannot multiply bf16, and its AMD backend has no tf32x3: these work in fp32.
        """
        if self.dtype == torch.bfloat16 and not triton_interpreted():
            return {"DOT": tl.bfloat16, "PRECISION": "ieee", "GATE": "ieee"}
        if triton_interpreted() or torch.version.hip is not None:
            return {"DOT": tl.float32, "PRECISION": "ieee", "GATE": "ieee"}
        return {"DOT": tl.float32, "PRECISION": "tf32" if self.dtype == torch.float16 else "tf32x3", "GATE": "tf32x3"}

    def states(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((count, self.heads, self.width, self.value_width), dtype=dtype, device=self.device)

    def like(self, x: Tensor) -> Tensor:
        """For results: rows that belong to no sequence stay zero."""
        return torch.empty_like(x) if self.cut is None else torch.zeros_like(x)

    def run(self, kernel: Any, programs: int, **arguments: Any) -> None:
        known = {"T": self.time, "H": self.heads, "BY": BLOCK, "C": CHUNK, "GROUP": GROUP, **self.precision}
        arguments |= {name: value for name, value in known.items() if name in kernel.arg_names}
        self.launch(kernel, (programs,), *self.resources(kernel, arguments), **arguments)

    def resources(self, kernel: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """Warps and stages: eight warps where four would spill, two stages where two sets of tiles fit."""
        narrow = self.dtype == torch.bfloat16
        wide = arguments.get("BX", BLOCK) > 128
        if kernel is stream_kernel:
            return (4, 2) if narrow and self.large and not wide else (4 if narrow and not wide else 8, 1)
        heavy = kernel in (value_kernel, side_kernel) and (wide or not narrow or arguments.get("SLOW", False))
        return 8 if heavy else 4, 1


def make_problem(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, launch: Launch, large: bool | None) -> Problem:
    """Cut time into segments where sequences, heads and blocks are too few; build tables on the device."""
    batch, time, heads, width = q.shape
    chunks = -(-time // CHUNK)
    segment = max(SHORTEST, -(-batch * chunks * heads * blocks(v.shape[3]) // PROGRAMS))
    segment = min(segment, chunks)
    segments = -(-chunks // segment)
    sequences, slots, units = batch, batch * chunks, batch * segments
    whole = marks = cut = places = None
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        slots, units = chunk_bound(time, CHUNK, sequences), chunk_bound(time, segment * CHUNK, sequences)
        whole = _whole(cu_seqlens, CHUNK)
        places = _cut(whole, chunk_table(cu_seqlens, time, CHUNK), 1)[:, :2].contiguous()
        if segments == 1:
            cut, units = whole, sequences
        else:
            marks = _whole(cu_seqlens, segment * CHUNK)
            cut = _cut(whole, chunk_table(cu_seqlens, time, segment * CHUNK), segment)
    return Problem(
        heads=heads,
        width=width,
        value_width=v.shape[3],
        time=time,
        chunks=chunks,
        sequences=sequences,
        slots=slots,
        segment=segment,
        segments=segments,
        units=units,
        whole=whole,
        marks=marks,
        cut=cut,
        places=places,
        dtype=q.dtype,
        device=q.device,
        launch=launch,
        large=has_large_memory(q.device) if large is None else large,
    )


def _whole(cu_seqlens: Tensor, size: int) -> Tensor:
    """int64 [N,3]: first token, tokens and first slot of every sequence, where a slot holds `size` tokens."""
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds[1:] - bounds[:-1]
    counts = (lengths + size - 1) // size
    return torch.stack((bounds[:-1], lengths, counts.cumsum(0) - counts), 1)


def _cut(whole: Tensor, table: Tensor, segment: int) -> Tensor:
    """The same for every segment [units,3], with chunk slots; no tokens in an unused one."""
    sequence, local = table[:, 0].to(torch.int64), table[:, 1].to(torch.int64)
    owner = whole[sequence.clamp(min=0)]
    skipped = local * segment
    tokens = (owner[:, 1] - skipped * CHUNK).clamp(max=segment * CHUNK).masked_fill(sequence < 0, 0)
    return torch.stack((owner[:, 0] + skipped * CHUNK, tokens, owner[:, 2] + skipped), 1)
