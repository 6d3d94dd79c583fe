"""Launches of the Triton scans, forward and backward. Imported only when Triton is chosen.

A program takes a block of channels of one sequence, or of one segment of it where there are too few channels to fill
the chip; then a first pass finds what every segment does to a state. Packed sequences are always cut into segments,
because their lengths are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.common import triton_interpreted
from fla_swap.kernels.scan.checks import CHUNK
from fla_swap.kernels.scan.triton_hgrn import (
    hgrn_backward_kernel,
    hgrn_ends_kernel,
    hgrn_forward_kernel,
    hgrn_step_kernel,
)
from fla_swap.kernels.scan.triton_selective import (
    selective_backward_kernel,
    selective_ends_back_kernel,
    selective_forward_kernel,
    selective_step_kernel,
)

ENOUGH, WANTED = 512, 1024
"""With fewer warps than the first, time is cut into segments, until there are about as many as the second."""
SHORTEST_SEGMENT = 128

Launch = Callable[..., None]


def launch_now(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
    """Run a kernel on a one-dimensional grid."""
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=1)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BT steps × BD channels a tile; VEC channels next to each other in a thread; loads STAGES tiles ahead; the
    states in NG groups, one after the other."""

    steps: int
    channels: int
    warps: int
    stages: int
    vector: int = 1
    groups: int = 1


HGRN = Tile(steps=16, channels=128, warps=2, stages=3, vector=2)
SELECTIVE = Tile(steps=8, channels=32, warps=1, stages=3)
SELECTIVE_BACK = Tile(steps=4, channels=32, warps=2, stages=2)


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """How time is cut: `slots` stretches, `segment` rows each at most, `segments` a sequence (packed: by `table`)."""

    batch: int
    time: int
    channels: int
    sequences: int
    slots: int
    segment: int
    segments: int
    table: Tensor | None
    bounds: Tensor | None

    @property
    def cut(self) -> bool:
        return self.segments > 1 or self.table is not None

    def place(self, tile: Tile) -> dict[str, Any]:
        """What every kernel needs to find its rows."""
        return {
            "table": self.table,
            "bounds": self.bounds,
            "T": self.time,
            "D": self.channels,
            "SEGMENT": self.segment,
            "SEGMENTS": self.segments,
            "PACKED": self.table is not None,
            "BT": tile.steps,
            "BD": tile.channels,
            "STAGES": tile.stages,
        }

    def even(self, tile: Tile) -> bool:
        """Whether every tile is full."""
        aligned = self.time % self.segment == 0 and self.segment % tile.steps == 0
        return aligned and self.channels % tile.channels == 0 and self.table is None

    def programs(self, tile: Tile) -> int:
        return self.slots * -(-self.channels // tile.channels)

    def new(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous result, zero where no kernel may write."""
        make = torch.empty if self.table is None else torch.zeros
        return make(like.shape, dtype=dtype or like.dtype, device=like.device)

    def per_slot(self, like: Tensor, *shape: int) -> Tensor:
        """Parts that are summed over slots; unused slots stay zero."""
        make = torch.empty if self.table is None else torch.zeros
        return make((self.slots, *shape), dtype=torch.float32, device=like.device)


def stretches(x: Tensor, cu_seqlens: Tensor | None, tile: Tile, segment: int | None = None) -> Stretches:
    """The segments of x [B,T,D], of a given length or as many as fill the chip. No host sync."""
    batch, time, channels = x.shape
    warps = -(-channels // tile.channels) * tile.warps * (batch if cu_seqlens is None else 1)
    wanted = 1 if warps >= ENOUGH else -(-WANTED // warps)
    rounded: int = segment or max(SHORTEST_SEGMENT, _power_of_two(-(-time // wanted)))
    segments = -(-time // rounded)
    if cu_seqlens is None:
        return Stretches(
            batch=batch,
            time=time,
            channels=channels,
            sequences=batch,
            slots=batch * segments,
            segment=rounded if segments > 1 else time,
            segments=segments,
            table=None,
            bounds=None,
        )
    table = segment_table(cu_seqlens, time, rounded)
    return Stretches(
        batch=1,
        time=time,
        channels=channels,
        sequences=cu_seqlens.shape[0] - 1,
        slots=table.shape[0],
        segment=rounded,
        segments=1,
        table=table,
        bounds=cu_seqlens,
    )


def segment_table(cu_seqlens: Tensor, time: int, segment: int) -> Tensor:
    """int32 [slots, 3]: (sequence, which of its segments, which of the line's), −1 for unused slots.

    Segments begin at a sequence's start and at multiples of `segment` rows of the line.
    """
    bounds = cu_seqlens.to(torch.int64)
    sequences = bounds.shape[0] - 1
    first = bounds[:-1] // segment
    counts = torch.where(bounds[1:] > bounds[:-1], (bounds[1:] - 1) // segment - first + 1, 0)
    ends = counts.cumsum(0)
    slots = torch.arange(-(-time // segment) + sequences, device=bounds.device)
    sequence = torch.searchsorted(ends, slots, right=True)
    safe = sequence.clamp(max=sequences - 1)
    local = slots - (ends - counts)[safe]
    rows = torch.stack((sequence, local, first[safe] + local), dim=1)
    return torch.where((sequence < sequences)[:, None], rows, -1).to(torch.int32)


def _power_of_two(size: int) -> int:
    """The next one from `size` on."""
    return 1 << max(size - 1, 0).bit_length()


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _final(s: Stretches, initial: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    """The final state, to be written; that of an empty sequence is its initial one."""
    size = (s.sequences, *shape)
    if s.table is None:
        return torch.empty(size, dtype=torch.float32, device=like.device)
    if initial is None:
        return torch.zeros(size, dtype=torch.float32, device=like.device)
    return initial.to(torch.float32, copy=True)


def hgrn_forward(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, launch: Launch = launch_now
) -> tuple[Tensor, Tensor]:
    """h [B,T,D] in x's dtype and the final state [N,D] in fp32."""
    x, g, initial_state, cu_seqlens = _contiguous(x, g, initial_state, cu_seqlens)
    s, tile = stretches(x, cu_seqlens, HGRN), HGRN
    place = s.place(tile) | {"VEC": tile.vector}
    decays = ends = None
    if s.cut:
        decays, ends = s.per_slot(x, s.channels), s.per_slot(x, s.channels)
        launch(
            hgrn_ends_kernel, s.programs(tile), tile.warps, x=x, g=g, decays=decays, ends=ends, REVERSE=False, **place
        )
    out, final = s.new(x), _final(s, initial_state, x, s.channels)
    launch(
        hgrn_forward_kernel,
        s.programs(tile),
        tile.warps,
        x=x,
        g=g,
        initial=initial_state,
        out=out,
        final=final,
        decays=decays,
        ends=ends,
        **place,
    )
    return out, final


def hgrn_backward(
    g: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in h's dtype), g and the initial state."""
    g, h, initial_state, cu_seqlens = _contiguous(g, h, initial_state, cu_seqlens)
    out_grad, final_grad = _contiguous(out_grad.to(h.dtype), final_grad)
    s, tile = stretches(h, cu_seqlens, HGRN), HGRN
    place = s.place(tile) | {"VEC": tile.vector}
    decays = ends = None
    if s.cut:
        decays, ends = s.per_slot(h, s.channels), s.per_slot(h, s.channels)
        launch(
            hgrn_ends_kernel,
            s.programs(tile),
            tile.warps,
            x=out_grad,
            g=g,
            decays=decays,
            ends=ends,
            REVERSE=True,
            **place,
        )
    x_grad, g_grad = s.new(h), s.new(g)
    initial_grad = _final(s, final_grad, h, s.channels)
    launch(
        hgrn_backward_kernel,
        s.programs(tile),
        tile.warps,
        g=g,
        h=h,
        initial=initial_state,
        out_grad=out_grad,
        final_grad=final_grad,
        x_grad=x_grad,
        g_grad=g_grad,
        initial_grad=initial_grad,
        decays=decays,
        ends=ends,
        **place,
    )
    return x_grad, g_grad, initial_grad


def hgrn_step(x: Tensor, g: Tensor, state: Tensor, launch: Launch = launch_now) -> Tensor:
    """T steps, in place on `state` [B,D]. Returns [B,T,D] in x's dtype."""
    x, g = _contiguous(x, g)
    out = torch.empty_like(x)
    block = 256
    launch(
        hgrn_step_kernel,
        x.shape[0] * -(-x.shape[2] // block),
        4,
        x=x,
        g=g,
        state=state,
        out=out,
        T=x.shape[1],
        D=x.shape[2],
        BD=block,
    )
    return out


def _sizes(s: Stretches, tile: Tile, states: int) -> dict[str, Any]:
    """`place` with the number of states."""
    padded = _power_of_two(states)
    return s.place(tile) | {"N": states, "NP": padded, "EVEN": s.even(tile) and padded == states}


def _tile(tile: Tile, states: int) -> Tile:
    """More warps for more states than 16, so that a thread holds as many as with 16."""
    more = max(1, _power_of_two(states) // 16)
    return replace(tile, warps=min(tile.warps * more, 16), groups=min(tile.groups, _power_of_two(states)))


def selective_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    keep: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,D] in x's dtype, final state [S,D,N] in fp32, and the states [B,M,N,D] before every CHUNK-th row, flat."""
    x, dt, A, D, z, dt_bias, initial_state, cu_seqlens = _contiguous(x, dt, A, D, z, dt_bias, initial_state, cu_seqlens)
    B, C = B.float().contiguous(), C.float().contiguous()
    tile = _tile(SELECTIVE, A.shape[1])
    s, N = stretches(x, cu_seqlens, tile), A.shape[1]
    common = {"x": x, "dt": dt, "A": A, "B": B, "bias": dt_bias, "SOFTPLUS": dt_softplus} | _sizes(s, tile, N)
    totals = ends = None
    if s.cut:
        totals, ends = s.per_slot(x, s.channels), s.per_slot(x, s.channels, N)
        absent = dict.fromkeys(("C", "skip", "z", "initial", "out", "final", "saved", "coarse"))
        launch(
            selective_forward_kernel,
            s.programs(tile),
            tile.warps,
            totals=totals,
            ends=ends,
            SUMMARY=True,
            EVERY=1,
            **absent,
            **common,
        )
    out, final = s.new(x), _final(s, initial_state, x, s.channels, N)
    saved = _states(s, N, x, CHUNK) if keep else x.new_empty(0)
    launch(
        selective_forward_kernel,
        s.programs(tile),
        tile.warps,
        C=C,
        skip=D,
        z=z,
        initial=initial_state,
        out=out,
        final=final,
        saved=saved if keep else None,
        coarse=None,
        totals=totals,
        ends=ends,
        SUMMARY=False,
        EVERY=CHUNK,
        **common,
    )
    return out, final, saved


def _states(s: Stretches, states: int, x: Tensor, every: int) -> Tensor:
    """Room for the states before every `every`-th row."""
    return torch.empty(s.batch * -(-s.time // every) * states * s.channels, dtype=x.dtype, device=x.device)


def _replay(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    coarse: Tensor,
    dt_softplus: bool,
    launch: Launch,
) -> Tensor:
    """The states before every tile of the backward, from those before every CHUNK-th row, all chunks side by side."""
    tile = _tile(SELECTIVE, A.shape[1])
    s, N = stretches(x, cu_seqlens, tile, CHUNK), A.shape[1]
    saved = _states(s, N, x, SELECTIVE_BACK.steps)
    launch(
        selective_forward_kernel,
        s.programs(tile),
        tile.warps,
        x=x,
        dt=dt,
        A=A,
        B=B,
        bias=dt_bias,
        initial=initial_state,
        saved=saved,
        coarse=coarse,
        SOFTPLUS=dt_softplus,
        SUMMARY=False,
        EVERY=SELECTIVE_BACK.steps,
        **dict.fromkeys(("C", "skip", "z", "out", "final", "totals", "ends")),
        **_sizes(s, tile, N),
    )
    return saved


def selective_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    out_grad: Tensor,
    final_grad: Tensor | None,
    dt_softplus: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; None where the input is."""
    x, dt, A, D, z, dt_bias, initial_state, cu_seqlens = _contiguous(x, dt, A, D, z, dt_bias, initial_state, cu_seqlens)
    out_grad, final_grad = _contiguous(out_grad.to(x.dtype), final_grad)
    B, C = B.float().contiguous(), C.float().contiguous()
    saved = _replay(x, dt, A, B, dt_bias, initial_state, cu_seqlens, saved, dt_softplus, launch)
    tile = _tile(SELECTIVE_BACK, A.shape[1])
    s, N = stretches(x, cu_seqlens, tile), A.shape[1]
    common = {"dt": dt, "A": A, "C": C, "z": z, "bias": dt_bias, "out_grad": out_grad, "SOFTPLUS": dt_softplus}
    common |= _sizes(s, tile, N)
    totals = ends = None
    if s.cut:
        totals, ends = s.per_slot(x, s.channels), s.per_slot(x, s.channels, N)
        launch(selective_ends_back_kernel, s.programs(tile), tile.warps, totals=totals, ends=ends, **common)
    x_grad, dt_grad, z_grad = s.new(x), s.new(dt), None if z is None else s.new(z)
    make = torch.empty if s.table is None else torch.zeros
    blocks, rows = -(-s.channels // tile.channels), s.batch * s.time
    B_part, C_part = (make((blocks, rows, N), dtype=torch.float32, device=x.device) for _ in range(2))
    A_part = s.per_slot(x, s.channels, N)
    skip_part = None if D is None else s.per_slot(x, s.channels)
    bias_part = None if dt_bias is None else s.per_slot(x, s.channels)
    initial_grad = _final(s, final_grad, x, s.channels, N)
    launch(
        selective_backward_kernel,
        s.programs(tile),
        tile.warps,
        x=x,
        B=B,
        skip=D,
        initial=None if s.table is None else initial_state,
        saved=saved,
        final_grad=final_grad,
        x_grad=x_grad,
        dt_grad=dt_grad,
        z_grad=z_grad,
        A_part=A_part,
        B_part=B_part,
        C_part=C_part,
        skip_part=skip_part,
        bias_part=bias_part,
        initial_grad=initial_grad,
        totals=totals,
        ends=ends,
        ROWS=rows,
        NG=tile.groups,
        NARROW=x.dtype != torch.float32 and not triton_interpreted(),
        **common,
    )
    return (
        x_grad,
        dt_grad,
        A_part.sum(0),
        B_part.sum(0).view(B.shape),
        C_part.sum(0).view(C.shape),
        None if skip_part is None else skip_part.sum(0),
        z_grad,
        None if bias_part is None else bias_part.sum(0),
        initial_grad,
    )


def selective_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
    launch: Launch = launch_now,
) -> Tensor:
    """T steps, in place on `state` [B,D,N]. Returns [B,T,D] in x's dtype."""
    x, dt, A, B, C, D, z, dt_bias = _contiguous(x, dt, A, B, C, D, z, dt_bias)
    out = torch.empty_like(x)
    padded = _power_of_two(A.shape[1])
    block = max(8, 2048 // padded)
    launch(
        selective_step_kernel,
        x.shape[0] * -(-x.shape[2] // block),
        4,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        skip=D,
        z=z,
        bias=dt_bias,
        state=state,
        out=out,
        T=x.shape[1],
        D=x.shape[2],
        SOFTPLUS=dt_softplus,
        BD=block,
        N=A.shape[1],
        NP=padded,
    )
    return out


_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Kernels as shipped, bf16 and fp32: name, kernel, signature, constexprs, num_warps, num_stages."""
    found: dict[str, tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = {}

    def record(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
        signature, constexprs = _describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        found.setdefault(name, (name, kernel, signature, constexprs, num_warps, 1))

    for dtype in (torch.bfloat16, torch.float32):
        for packed, time in ((False, 256), (False, 4096), (True, 300)):
            _record_calls(dtype, packed, time, record)
    yield from found.values()


def _record_calls(dtype: torch.dtype, packed: bool, time: int, record: Launch) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, width, states, wide = (1, 2048, 16, torch.float32) if packed or time > 1000 else (8, 4096, 16, torch.float32)
    bounds = new(4, dtype=torch.int32) if packed else None
    x, h = new(batch, time, width), new(batch, time, width)
    g, state = new(batch, time, width, dtype=wide), new(3 if packed else batch, width, dtype=wide)
    hgrn_forward(x, g, state, bounds, launch=record)
    hgrn_backward(g, h, state, bounds, h, state, launch=record)
    hgrn_step(x, g, state, launch=record)
    A, skip, mixed = new(width, states, dtype=wide), new(width, dtype=wide), new(batch, time, states)
    state = new(3 if packed else batch, width, states, dtype=wide)
    inputs = (x, x, A, mixed, mixed, skip, x, skip)
    _, _, saved = selective_forward(*inputs, state, bounds, True, True, launch=record)
    selective_backward(*inputs, state, bounds, saved, h, state, True, launch=record)
    selective_step(*inputs, state[:batch], True, launch=record)


def _describe(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton's signature and constexprs for a launch with these arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constexprs
