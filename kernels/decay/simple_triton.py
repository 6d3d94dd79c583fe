"""Triton for one decay per head: linear attention, retention, simple_gla. Imported only when Triton is chosen.

One pass per head keeps the state in registers and streams the tokens past it; the same kernel with its arguments in
other roles gives dq (`whole_kernel`), another dk and dv (`keys_values_kernel`). States too large for one program are
cut into blocks of columns, and one kernel gives the output and, in three more passes, the gradients (`stream_kernel`).
Few heads: the sequence is cut into segments, a first pass finds what each adds to the state, a second carries. Packed
sequences are read where they lie; nothing is copied to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.common import chunk_bound, chunk_table, triton_interpreted
from fla_swap.kernels.decay.simple_triton_kernels import (
    carry_kernel,
    cumulate_kernel,
    gate_grad_kernel,
    segment_kernel,
    step_kernel,
    stream_kernel,
    tail_kernel,
)
from fla_swap.kernels.decay.simple_triton_whole import keys_values_kernel, whole_kernel
from fla_swap.kernels.launching import Configuration, describe, has_large_memory

CHUNK = 64
RESET_TOKENS = 256  # the most after which gate gradients start anew from a stored state
PROGRAMS = 264  # two for each multiprocessor of the largest chips: with fewer, sequences are cut
Launch = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Columns of the state in one program, warps, stages; `early` and `defer`: see `stream_kernel`."""

    block: int
    warps: int
    stages: int
    early: bool = True
    defer: bool = False


def choose_tiles(kind: str, contracted: int, width: int, gate: int, reverse: bool, large: bool) -> Tiles:
    """The configuration for a pass (`stream`, `segment`) over a state of [contracted, width] (padded).

    `large`: see `has_large_memory`; other chips get smaller tiles where they must.
    Measured on an H200.
    """
    block = min(width, 64)
    if kind == "segment":
        return Tiles(block=block, warps=4, stages=2)
    if contracted > 128:
        return Tiles(block=block, warps=8, stages=2) if large else Tiles(block=min(width, 32), warps=8, stages=1)
    stages = 3 if large and contracted <= 64 else 2
    return Tiles(block=block, warps=4, stages=stages, early=gate != 1, defer=gate < 2 or not reverse)


SMALL = Tiles(block=64, warps=4, stages=1)
WHOLE = Tiles(block=128, warps=8, stages=3)


def launch_now(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Run a kernel on a one-dimensional grid (the first grid dimension is the one without a 65,535 limit)."""
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=tiles.warps)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, spans of tokens and precision of one call, and how to launch (the cross-compile test records instead)."""

    time: int
    tokens: int
    heads: int
    value_heads: int
    width: int
    value_width: int
    sequences: int
    slots: int
    split: bool
    pieces: int
    length: int
    bounds: Tensor | None
    table: Tensor | None
    first_slots: Tensor | None
    gate: int
    exact: bool
    dot: Any
    precision: str
    large: bool
    launch: Launch

    @property
    def place(self) -> dict[str, Any]:
        place = {"bounds": self.bounds, "table": self.table, "T": self.time, "tokens": self.tokens}
        return {**place, "PIECES": self.pieces, "LENGTH": self.length, "slots": self.chunk_slots}

    @property
    def common(self) -> dict[str, Any]:
        heads = {"H": self.heads, "HV": self.value_heads}
        return {**heads, "GATE": self.gate, "DOT": self.dot, "PRECISION": self.precision}

    def padded(self, width: int) -> int:
        """Hopper needs matrix operands 64 wide."""
        return max(16 if triton_interpreted() else 64, 1 << (width - 1).bit_length())

    @property
    def chunk_slots(self) -> int:
        """Places for the sums of a head's chunks: chunk c of sequence n stands at ⌊first token / CHUNK⌋ + n."""
        return self.tokens // CHUNK + self.sequences

    @property
    def whole(self) -> bool:
        """Whether the registers of one program hold a head's state: see `simple_triton_whole`."""
        return self.large and max(self.padded(self.width), self.padded(self.value_width)) <= 128

    @property
    def reset(self) -> int:
        """Gate gradients start anew from a stored state after so many tokens."""
        return RESET_TOKENS if self.whole else RESET_TOKENS // 2

    def tiles(self, kind: str, contracted: int, width: int, reverse: bool = False) -> Tiles:
        return choose_tiles(kind, self.padded(contracted), self.padded(width), self.gate, reverse, self.large)

    def blocks(self, contracted: int, width: int) -> int:
        """Programs that share a head in a pass of `stream_kernel`."""
        return -(-width // self.tiles("stream", contracted, width).block)


def make_problem(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, launch: Launch, large: bool | None
) -> Problem:
    """Decide how tokens are cut into spans.

    bf16 multiplies natively. Triton's interpreter cannot: it works in fp32, and takes fp32 inputs to show small errors.
    """
    batch, time, heads, width = q.shape
    value_heads, value_width = v.shape[2], v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    programs = value_heads * (batch if cu_seqlens is None else 1) * -(-min(width, value_width) // 64)
    wanted = PROGRAMS // programs if 3 * programs <= PROGRAMS else 1  # two pieces would not pay
    length = -(-time // (wanted * RESET_TOKENS)) * RESET_TOKENS
    split = length < time
    table = first_slots = None
    pieces, slots = (-(-time // length), batch * -(-time // length)) if split else (1, sequences)
    if split and cu_seqlens is not None:
        table, slots = chunk_table(cu_seqlens, time, length), chunk_bound(time, length, sequences)
        counts = (cu_seqlens.diff().to(torch.int64) + length - 1) // length
        first_slots = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Problem(
        time=time,
        tokens=batch * time,
        heads=heads,
        value_heads=value_heads,
        width=width,
        value_width=value_width,
        sequences=sequences,
        slots=slots,
        split=split,
        pieces=pieces,
        length=length if split else time,
        bounds=cu_seqlens,
        table=table,
        first_slots=first_slots,
        gate=0 if g is None else 1 if g.ndim == 1 else 2,
        exact=q.dtype == torch.float32,
        dot=tl.bfloat16 if q.dtype == torch.bfloat16 and not triton_interpreted() else tl.float32,
        precision="ieee",
        large=has_large_memory(q.device) if large is None else large,
        launch=launch,
    )


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The states at one end of every span, and where the ones at the other end go (None: known already)."""

    initial: Tensor | None
    final: Tensor | None
    start_scale: float = 1.0
    end_scale: float = 1.0


def _ends(
    p: Problem,
    y: Tensor,
    z: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    scales: tuple[float, float],
    *,
    reverse: bool,
    keep: bool,
) -> tuple[Ends, Tensor | None]:
    """Carry the state over the segments, if there are any. Returns what a pass reads, and the final state if kept."""
    size = (p.value_heads, p.width, p.value_width)
    final = y.new_empty((p.sequences, *size), dtype=torch.float32) if keep else None
    if not p.split:
        return Ends(initial=initial, final=final, start_scale=scales[0], end_scale=scales[1]), final
    own = y.new_empty((p.slots, *size), dtype=torch.float32)
    decay = y.new_empty((p.slots, p.value_heads), dtype=torch.float32)
    tiles = p.tiles("segment", p.width, p.value_width)
    key_block = min(tiles.block, p.padded(p.width))
    key_blocks, value_blocks = -(-p.width // key_block), -(-p.value_width // tiles.block)
    p.launch(
        segment_kernel,
        p.slots * p.value_heads * key_blocks * value_blocks,
        tiles,
        y=y,
        z=z,
        g=g,
        own=own,
        decay=decay,
        X=p.width,
        Z=p.value_width,
        BX=key_block,
        BZ=tiles.block,
        X_BLOCKS=key_blocks,
        Z_BLOCKS=value_blocks,
        C=CHUNK,
        STAGES=tiles.stages,
        REVERSE=reverse,
        **p.place,
        **p.common,
    )
    entries = p.width * p.value_width
    p.launch(
        carry_kernel,
        p.sequences * p.value_heads * -(-entries // 1024),
        SMALL,
        own=own,
        decay=decay,
        initial=initial,
        final=final,
        first_slots=p.first_slots,
        PIECES=p.pieces,
        HV=p.value_heads,
        SIZE=entries,
        start_scale=scales[0],
        end_scale=scales[1],
        BLOCKS=-(-entries // 1024),
        BLOCK=1024,
        GATED=g is not None,
        REVERSE=reverse,
    )
    return Ends(initial=own, final=None), final


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What a pass does for the gate gradient; see `stream_kernel` and `whole_kernel`."""

    partner: Tensor | None = None
    flow: Tensor | None = None
    states: Tensor | None = None
    boundary: Tensor | None = None


NO_FLOW = Flow()


def _stream(
    p: Problem,
    xyz: tuple[Tensor, Tensor, Tensor],
    g: Tensor | None,
    ends: Ends,
    scale: float,
    *,
    reverse: bool = False,
    transposed: bool = False,
    flow: Flow = NO_FLOW,
) -> Tensor:
    """One pass of `stream_kernel` or `whole_kernel`: [B,T,HV,Z] in the inputs' dtype."""
    x, y, z = xyz
    x_width, z_width = x.shape[3], z.shape[3]
    out = x.new_empty((*x.shape[:2], p.value_heads, z_width))
    arguments: dict[str, Any] = {
        "x": x,
        "y": y,
        "z": z,
        "g": g,
        "partner": flow.partner,
        "initial": ends.initial,
        "final": ends.final,
        "out": out,
        "flow": flow.flow,
        "states": flow.states,
        "boundary": flow.boundary,
        "scale": scale,
        "start_scale": ends.start_scale,
        "end_scale": ends.end_scale,
        "X": x_width,
        "Z": z_width,
        "BX": p.padded(x_width),
        "C": CHUNK,
        "RESET": p.reset // CHUNK,
        "TRANSPOSED": transposed,
        **p.place,
        **p.common,
    }
    if p.whole:
        width = p.padded(z_width)
        p.launch(whole_kernel, p.slots * p.value_heads, WHOLE, BZ=width, STAGES=WHOLE.stages, **arguments)
        return out
    tiles = p.tiles("stream", x_width, z_width, reverse)
    blocks = -(-z_width // tiles.block)
    p.launch(
        stream_kernel,
        p.slots * p.value_heads * blocks,
        tiles,
        BZ=tiles.block,
        BLOCKS=blocks,
        REVERSE=reverse,
        EARLY=tiles.early,
        DEFER=tiles.defer,
        STAGES=tiles.stages,
        **arguments,
    )
    return out


def _keys_values(
    p: Problem,
    qkv: tuple[Tensor, Tensor, Tensor],
    g: Tensor | None,
    out_grad: Tensor,
    ends: Ends,
    scale: float,
    flows: tuple[Flow, Flow],
) -> tuple[Tensor, Tensor]:
    """dk [B,T,HV,K] and dv [B,T,HV,V]."""
    q, k, v = qkv
    if not p.whole:
        dv = _stream(p, (k, q, out_grad), g, ends, scale, reverse=True, flow=flows[0])
        again = Ends(initial=ends.initial, final=None, start_scale=ends.start_scale)
        return _stream(p, (v, out_grad, q), g, again, scale, reverse=True, transposed=True, flow=flows[1]), dv
    dk, dv = q.new_empty((*q.shape[:2], p.value_heads, p.width)), torch.empty_like(v)
    p.launch(
        keys_values_kernel,
        p.slots * p.value_heads,
        WHOLE,
        q=q,
        k=k,
        v=v,
        g=g,
        out_grad=out_grad,
        initial=ends.initial,
        final=ends.final,
        k_grad=dk,
        v_grad=dv,
        flow=flows[0].flow,
        states=flows[1].states,
        scale=scale,
        start_scale=ends.start_scale,
        end_scale=ends.end_scale,
        K=p.width,
        V=p.value_width,
        BK=p.padded(p.width),
        BV=p.padded(p.value_width),
        C=CHUNK,
        RESET=p.reset // CHUNK,
        STAGES=WHOLE.stages,
        **p.place,
        **p.common,
    )
    return dk, dv


def _zero_tail(p: Problem, *tensors: Tensor) -> None:
    """Zero the rows after the last packed sequence in up to four [1,T,...] tensors."""
    if p.bounds is None or not tensors:
        return
    padded = [*tensors, None, None, None][:4]
    sizes = [0 if x is None else x[0, 0].numel() for x in padded]
    a, b, c, d = padded
    p.launch(
        tail_kernel,
        -(-p.time // 64),
        SMALL,
        a=a,
        b=b,
        c=c,
        d=d,
        bounds=p.bounds,
        N=p.sequences,
        T=p.time,
        SIZE_A=sizes[0],
        SIZE_B=sizes[1],
        SIZE_C=sizes[2],
        SIZE_D=sizes[3],
        ROWS=64,
        BLOCK=1024,
    )


def _stretches(p: Problem, length: int) -> tuple[int, dict[str, Any]]:
    """How many stretches of so many tokens there are, and where they lie."""
    pieces = -(-p.time // length)
    count, table = p.sequences * pieces, None
    if p.bounds is not None:
        count, table = chunk_bound(p.time, length, p.sequences), chunk_table(p.bounds, p.time, length)
    place = {"table": table, "bounds": p.bounds, "T": p.time, "PIECES": pieces}
    return count, {**place, "HV": p.value_heads, "C": length, "BH": 16}


def _cumulate(p: Problem, g: Tensor | None) -> Tensor | None:
    """Gates as the passes read them: a constant as it is, others as `cumulate_kernel` gives them.

    Sums are float64 for fp32 inputs, whose differences would otherwise lose their last digits.
    """
    if g is None or g.ndim == 1:
        return g
    dtype = torch.float64 if p.exact else torch.float32
    sums = g.new_empty((p.value_heads, p.chunk_slots, CHUNK, 4), dtype=dtype)
    chunks, place = _stretches(p, CHUNK)
    p.launch(cumulate_kernel, chunks * -(-p.value_heads // 16), SMALL, g=g, sums=sums, slots=p.chunk_slots, **place)
    return sums


def _gate_grad(p: Problem, g: Tensor, gained: Tensor | None, lost: Flow, like: Tensor) -> Tensor:
    """dg, shaped like g: [B,T,HV], or summed over batch and time for a constant gate [HV]."""
    per_step = like.new_empty((*like.shape[:2], p.value_heads), dtype=g.dtype if g.ndim == 3 else torch.float32)
    stretches, place = _stretches(p, p.reset)
    assert gained is not None and lost.flow is not None and lost.boundary is not None
    p.launch(
        gate_grad_kernel,
        stretches * -(-p.value_heads // 16),
        SMALL,
        gained=gained,
        lost=lost.flow,
        boundary=lost.boundary,
        grad=per_step,
        GAINED=gained.shape[0],
        LOST=lost.flow.shape[0],
        BX=lost.boundary.shape[3],
        tokens=p.tokens,
        **place,
    )
    _zero_tail(p, per_step)
    return per_step if g.ndim == 3 else per_step.sum((0, 1)).to(g.dtype)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B,T,HV,V] in q's dtype and final state [N,HV,K,V] in fp32, empty unless asked for."""
    q, k, v, g, initial_state, cu_seqlens = _contiguous(q, k, v, g, initial_state, cu_seqlens)
    p = make_problem(q, v, g, cu_seqlens, launch, large)
    g = _cumulate(p, g)
    ends, final = _ends(p, k, v, g, initial_state, (1.0, 1.0), reverse=False, keep=output_final_state)
    o = _stream(p, (q, k, v), g, ends, scale)
    _zero_tail(p, o)
    return o, q.new_empty(0, dtype=torch.float32) if final is None else final


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    gate_grad: bool,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, g (None unless asked for) and the initial state (None without one); states are remade."""
    q, k, v, g, initial_state, cu_seqlens = _contiguous(q, k, v, g, initial_state, cu_seqlens)
    out_grad, final_grad = _contiguous(out_grad.to(q.dtype), final_grad)
    p = make_problem(q, v, g, cu_seqlens, launch, large)
    gates = _cumulate(p, g)
    before = Ends(initial=initial_state, final=None)
    if p.split:
        before, _ = _ends(p, k, v, gates, initial_state, (1.0, 1.0), reverse=False, keep=False)
    keep = initial_state is not None
    after, initial_grad = _ends(p, q, out_grad, gates, final_grad, (1.0 / scale, scale), reverse=True, keep=keep)
    flows = _flows(p, q, v) if gate_grad else (NO_FLOW, NO_FLOW, NO_FLOW)
    dk, dv = _keys_values(p, (q, k, v), gates, out_grad, after, scale, flows[:2])
    dq = _stream(p, (out_grad, v, k), gates, before, scale, transposed=True, flow=flows[2])
    _zero_tail(p, dq, dk, dv)
    dg = _gate_grad(p, g, flows[0].flow, flows[2], q) if g is not None and gate_grad else None
    return sum_over_groups(dq, p.heads), sum_over_groups(dk, p.heads), dv, dg, initial_grad


def _flows(p: Problem, q: Tensor, v: Tensor) -> tuple[Flow, Flow, Flow]:
    """Fresh memory for what the passes for dv, dk and dq note: dk keeps states that dq reads."""
    resets = p.tokens // p.reset + p.sequences
    gained_blocks = 1 if p.whole else p.blocks(p.width, p.value_width)
    lost_blocks = 1 if p.whole else p.blocks(p.value_width, p.width)
    states = q.new_empty((resets, p.value_heads, p.value_width * p.width))
    gained = q.new_empty((gained_blocks, p.value_heads, p.tokens), dtype=torch.float32)
    lost = q.new_empty((lost_blocks, p.value_heads, p.tokens), dtype=torch.float32)
    rows = 1 if p.whole else p.padded(p.value_width)
    boundary = q.new_empty((resets, p.value_heads, lost_blocks, rows), dtype=torch.float32)
    return (
        Flow(partner=v, flow=gained),
        Flow(states=states),
        Flow(partner=q, flow=lost, states=states, boundary=boundary),
    )


def sum_over_groups(x: Tensor, heads: int) -> Tensor:
    """Sum the gradients of value heads that share a query and key head: [B,T,HV,K] → [B,T,H,K]."""
    if x.shape[2] == heads:
        return x
    return x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(x.dtype)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float, launch: Launch = launch_now
) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,HV,K,V] (contiguous). Returns [B,T,HV,V] in q's dtype."""
    q, k, v, g = _contiguous(q, k, v, g)
    batch, time, heads, width = q.shape
    value_heads, value_width = v.shape[2], v.shape[3]
    padded = max(16, triton.next_power_of_2(width))
    tile = 16 if padded > 128 else 32
    blocks = -(-value_width // tile)
    out = torch.empty_like(v)
    launch(
        step_kernel,
        batch * value_heads * blocks,
        SMALL,
        q=q,
        k=k,
        v=v,
        g=g,
        state=state,
        out=out,
        T=time,
        H=heads,
        HV=value_heads,
        scale=scale,
        K=width,
        V=value_width,
        BK=padded,
        BV=tile,
        V_BLOCKS=blocks,
        GATE=0 if g is None else 1 if g.ndim == 1 else 2,
    )
    return out


def configurations(large: bool = False) -> Iterator[Configuration]:
    """Kernels as shipped: name, kernel, signature, constexprs, num_warps, num_stages (of other loops than ours)."""
    found: dict[str, Configuration] = {}

    def record(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
        signature, constexprs = describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        found.setdefault(name, (name, kernel, signature, constexprs, tiles.warps, 1))

    for width in (64, 128, 256):
        for gate in (0, 1, 2):
            for packed in (False, True):
                _record_calls(width, gate, packed, large, record)
    yield from found.values()


def _record_calls(width: int, gate: int, packed: bool, large: bool, record: Launch) -> None:
    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    time, heads = (1024, 2) if packed else (128, PROGRAMS)
    q, k, v, o = (new(1, time, heads, width) for _ in range(4))
    bounds = new(4, dtype=torch.int32) if packed else None
    state = new(3 if packed else 1, heads, width, width, dtype=torch.float32)
    g = (None, new(heads, dtype=torch.float32), new(1, time, heads, dtype=torch.float32))[gate]
    forward(q, k, v, g, state, bounds, 0.5, True, launch=record, large=large)
    backward(q, k, v, g, state, bounds, o, state, 0.5, gate > 0, launch=record, large=large)
    step(q, k, v, g, state[:1], 0.5, launch=record)
