"""Triton for the gated decay recurrence, forward and backward. Imported only when Triton is chosen.

Seven kernels; `README.md` says which tensors they get in each role:

    prepare   rows scaled by the decay inside their chunk
    pairs     the weights inside a chunk, for chunks that forget too much for that
    stream    one pass over time, gates on the contracted side: o, dv, chunk states (with value gates: dk, dq)
    value     one pass over time, gates on the output side: o with value gates
    side      dq, dk, dg (with value gates: dv, dgv), chunk by chunk
    carry     states alone: where a pass is cut into segments, and where both sides have gates
    step      decoding
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fla_swap.kernels.common import chunk_bound
from fla_swap.kernels.decay.triton_carry import carry_kernel, step_kernel
from fla_swap.kernels.decay.triton_plan import BLOCK, CHUNK, GROUP, Problem, blocks, make_problem, narrow_dtype
from fla_swap.kernels.decay.triton_prepare import pairs_kernel, prepare_kernel
from fla_swap.kernels.decay.triton_side import side_kernel
from fla_swap.kernels.decay.triton_stream import stream_kernel
from fla_swap.kernels.decay.triton_value import value_kernel
from fla_swap.kernels.launching import Configuration, Launch, Recorder, compile_ahead, has_large_memory, launch_now

LEVELS = 6


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _carry(
    p: Problem,
    b: Tensor,
    y: Tensor,
    gates: tuple[Tensor | None, Tensor | None],
    initial: Tensor | None,
    scale: float,
    *,
    every: int,
    reverse: bool = False,
    before: bool = False,
    stored_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """States before every `every`-th chunk (reverse: gradients after them) [·,H,K,V], and the last one [N,H,K,V].

    stored_scale: in place of `scale`, for the former.
    """
    stored = p.states(p.slots if every == 1 else p.units, p.narrow if every == 1 else torch.float32)
    final = p.states(p.sequences)
    x_blocks, y_blocks = blocks(b.shape[3]), blocks(y.shape[3])
    p.run(
        carry_kernel,
        p.sequences * p.heads * x_blocks * y_blocks,
        b=b,
        y=y,
        gx=gates[0],
        gy=gates[1],
        initial=initial,
        stored=stored,
        final=final,
        units=p.whole if every == 1 else p.marks,
        STRIDE=p.chunks if every == 1 else p.segments,
        EVERY=every,
        scale=scale,
        stored_scale=scale if stored_scale is None else stored_scale,
        X=b.shape[3],
        Y=y.shape[3],
        X_BLOCKS=x_blocks,
        Y_BLOCKS=y_blocks,
        REVERSE=reverse,
        BEFORE=before,
    )
    return stored, final


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side's gates and the rows scaled by them; what `prepare_kernel` and `pairs_kernel` write."""

    gates: Tensor
    readers: Tensor | None
    writers: Tensor
    shifts: Tensor
    slow: Tensor
    own: Tensor | None
    pairs: Tensor | None


def _prepare(p: Problem, z: Tensor | None, y: Tensor, g: Tensor, u: Tensor | None = None) -> Side:
    """Scale readers z (or None) and writers y; with readers, also the pairs of chunks that forget too much."""
    width, count = y.shape[3], blocks(y.shape[3])
    readers, writers = (None if x is None else torch.empty_like(x, dtype=p.narrow) for x in (z, y))
    assert writers is not None
    shifts = y.new_empty(p.slots * p.heads * 3 * width, dtype=torch.float32)
    slow = y.new_empty(p.slots * p.heads * count, dtype=torch.int32)
    tokens = y.shape[0] * y.shape[1]
    own = None if u is None else y.new_empty((count, tokens * p.heads), dtype=torch.float32)
    place = {"places": p.places, "CHUNKS": p.chunks, "D": width, "BLOCKS": count, "BEFORE": u is not None}
    p.run(
        prepare_kernel,
        p.slots * p.heads * count,
        z=z,
        y=y,
        g=g,
        u=u,
        readers=readers,
        writers=writers,
        shifts=shifts,
        slow=slow,
        own=own,
        TOKENS=tokens,
        LIMIT=p.limit,
        **place,
    )
    if own is not None:
        own = own.flatten() if count == 1 else own.sum(0)
    pairs = None if z is None else _pairs(p, z, y, g, slow, before=u is not None)
    return Side(gates=g, readers=readers, writers=writers, shifts=shifts, slow=slow, own=own, pairs=pairs)


def _pairs(p: Problem, z: Tensor, y: Tensor, g: Tensor, slow: Tensor, *, before: bool) -> Tensor:
    """The weights between the rows of a chunk, where it forgets too much; nothing elsewhere."""
    pairs = y.new_empty((p.slots, p.heads, CHUNK, CHUNK), dtype=p.narrow)
    p.run(
        pairs_kernel,
        -(-p.slots * p.heads // GROUP),
        z=z,
        y=y,
        g=g,
        slow=slow,
        pairs=pairs,
        places=p.places,
        CHUNKS=p.chunks,
        COUNT=p.slots * p.heads,
        D=y.shape[3],
        BLOCKS=blocks(y.shape[3]),
        LEVELS=LEVELS,
        BEFORE=before,
    )
    return pairs


class Kept(NamedTuple):
    """What forward can hand to backward: scaled rows and the state before every chunk. Flat, for any number of chunks.

    Rows and what goes with them as in `Side`, or None without key gates; all None: backward computes them again.
    """

    readers: Tensor | None = None
    writers: Tensor | None = None
    shifts: Tensor | None = None
    slow: Tensor | None = None
    own: Tensor | None = None
    starts: Tensor | None = None


def empty_kept(
    q: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, u: Tensor | None, cu_seqlens: Tensor | None
) -> Kept:
    """Tensors shaped as `forward` with `save` returns them."""
    if gv is not None:
        return Kept()
    (batch, time, heads, width), value_width = q.shape, v.shape[3]
    narrow = narrow_dtype(q.dtype)
    slots = batch * -(-time // CHUNK) if cu_seqlens is None else chunk_bound(time, CHUNK, cu_seqlens.shape[0] - 1)
    starts = q.new_empty(slots * heads * width * value_width, dtype=narrow)
    if g is None:
        return Kept(starts=starts)
    return Kept(
        readers=torch.empty(q.shape, dtype=narrow, device=q.device),
        writers=torch.empty(q.shape, dtype=narrow, device=q.device),
        shifts=q.new_empty(slots * heads * 3 * width, dtype=torch.float32),
        slow=q.new_empty(slots * heads * blocks(width), dtype=torch.int32),
        own=None if u is None else q.new_empty(batch * time * heads, dtype=torch.float32),
        starts=starts,
    )


def _kept_side(p: Problem, kept: Kept, q: Tensor, k: Tensor, g: Tensor, u: Tensor | None) -> Side:
    """The key side as forward left it, or anew."""
    if kept.readers is None or kept.writers is None or kept.shifts is None or kept.slow is None:
        return _prepare(p, q, k, g, u)
    pairs = _pairs(p, q, k, g, kept.slow, before=u is not None)
    return Side(
        gates=g,
        readers=kept.readers,
        writers=kept.writers,
        shifts=kept.shifts,
        slow=kept.slow,
        own=kept.own,
        pairs=pairs,
    )


def _passed(p: Problem, x: Tensor, y: Tensor, *, flipped: bool) -> dict[str, Any]:
    """What the stream and the value kernel have in common."""
    return {
        "units": p.cut,
        "SEGMENTS": p.segments,
        "SEGMENT": p.segment,
        "STRIDE": p.chunks,
        "X": x.shape[3],
        "Y": y.shape[3],
        "BX": max(BLOCK, triton.next_power_of_2(x.shape[3])),
        "X_BLOCKS": blocks(x.shape[3]),
        "Y_BLOCKS": blocks(y.shape[3]),
        "FLIPPED": flipped,
    }


def _stream(
    p: Problem,
    a: Tensor | None,
    b: Tensor,
    y: Tensor,
    side: Side | None,
    initial: Tensor | None,
    scale: float,
    *,
    flipped: bool = False,
    reverse: bool = False,
    stored: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor | None:
    """The rows that y's are mixed into; a and b are already scaled by the side's gates. Without a: only the states."""
    out = None if a is None else p.like(y)
    p.run(
        stream_kernel,
        p.units * p.heads * blocks(y.shape[3]),
        a=a,
        b=b,
        y=y,
        shifts=side and side.shifts,
        slow=side and side.slow,
        slow_pairs=side and side.pairs,
        own=side and side.own,
        initial=initial,
        out=out,
        stored=stored,
        final=final,
        scale=scale,
        REVERSE=reverse,
        **_passed(p, b, y, flipped=flipped),
    )
    return out


def _value(
    p: Problem,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    sides: tuple[Side | None, Side],
    initial: Tensor | None,
    scale: float,
    final: Tensor | None,
) -> Tensor:
    """The rows that y's are mixed into, with gates on y and maybe on a and b. Sides: contracted, output."""
    out = p.like(y)
    contracted, side = sides
    passed = _passed(p, a, y, flipped=False)
    del passed["FLIPPED"]
    p.run(
        value_kernel,
        p.units * p.heads * blocks(y.shape[3]),
        a=a,
        b=b,
        y=y,
        gy=side.gates,
        writers=side.writers,
        shifts=side.shifts,
        slow=side.slow,
        initial=initial,
        out=out,
        final=final,
        scale=scale,
        LEVELS=LEVELS,
        x_shifts=contracted and contracted.shifts,
        x_slow=contracted and contracted.slow,
        slow_pairs=contracted and contracted.pairs,
        **passed,
    )
    return out


def _side(
    p: Problem,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    y: Tensor,
    sides: tuple[Side | None, Side | None],
    states: tuple[Tensor, Tensor],
    scale: float,
    *,
    flipped: bool = False,
    z_grad: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of y, of its gates and of u; fills `z_grad`. Sides: contracted, output. States: starts, ends."""
    x_side, side = sides
    y_grad = p.like(y)
    gate_grad = None if side is None else p.like(side.gates)
    u_grad = None if u is None else y.new_empty((p.slots, p.heads, y.shape[3]), dtype=torch.float32)
    width = a.shape[3]
    for slow in (False, True):
        if slow and side is None:
            continue
        programs = p.slots * p.heads * blocks(y.shape[3])
        p.run(
            side_kernel,
            -(-programs // GROUP) if slow else programs,
            COUNT=programs,
            a=a,
            b=b,
            y=y,
            z=z,
            gy=side and side.gates,
            readers=side.readers if side else z,
            writers=side.writers if side else y,
            shifts=side and side.shifts,
            slow=side and side.slow,
            x_shifts=x_side and x_side.shifts,
            x_slow=x_side and x_side.slow,
            slow_pairs=x_side and x_side.pairs,
            u=u,
            starts=states[0],
            ends=states[1],
            z_grad=z_grad,
            y_grad=y_grad,
            gate_grad=gate_grad,
            u_grad=u_grad,
            places=p.places,
            CHUNKS=p.chunks,
            scale=scale,
            X=width,
            Y=y.shape[3],
            BX=max(BLOCK, triton.next_power_of_2(width)),
            X_BLOCKS=blocks(width),
            Y_BLOCKS=blocks(y.shape[3]),
            LEVELS=LEVELS,
            BEFORE=u is not None,
            FLIPPED=flipped,
            SLOW=slow,
        )
    return y_grad, gate_grad, None if u_grad is None else u_grad.sum(0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
    large: bool | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Kept]:
    """Output [B,T,H,V] in q's dtype, final state [N,H,K,V] in fp32, and with `save` what helps backward."""
    if launch is launch_now:
        given = (q, k, v, g, gv, u, initial_state, cu_seqlens, scale)
        compile_ahead(both, q.device, *given, large=has_large_memory(q.device), save=save)
    q, k, v, g, gv, u, initial_state, cu_seqlens = _contiguous(q, k, v, g, gv, u, initial_state, cu_seqlens)
    p = make_problem(q, v, cu_seqlens, launch, large)
    start, final = initial_state, None
    if p.single:
        final = last = p.states(p.sequences)
    else:
        start, last = _carry(p, k, v, (g, gv), initial_state, 1.0, every=p.segment)
    keys = None if g is None else _prepare(p, q, k, g, u)
    if keys is not None:
        assert keys.readers is not None
        q, k = keys.readers, keys.writers
    if gv is not None:
        return _value(p, q, k, v, (keys, _prepare(p, None, v, gv)), start, scale, final), last, Kept()
    starts = p.states(p.slots, p.narrow) if save else None
    o = _stream(p, q, k, v, keys, start, scale, stored=starts, final=final)
    assert o is not None
    if starts is None:
        return o, last, Kept()
    if keys is None:
        return o, last, Kept(starts=starts.flatten())
    return o, last, Kept(keys.readers, keys.writers, keys.shifts, keys.slow, keys.own, starts.flatten())


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
    large: bool | None = None,
    kept: Kept = Kept(),  # noqa: B008 (immutable)
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, g, gv, u and the initial state; those of absent gates and bonus are None."""
    if launch is launch_now:
        given = (kept, q, k, v, g, gv, u, initial_state, cu_seqlens, out_grad, final_grad, scale)
        compile_ahead(_backward_from, q.device, *given, large=has_large_memory(q.device))
    q, k, v, g, gv, u, initial_state, cu_seqlens = _contiguous(q, k, v, g, gv, u, initial_state, cu_seqlens)
    do, final_grad = _contiguous(out_grad.to(q.dtype), final_grad)
    p = make_problem(q, v, cu_seqlens, launch, large)
    keys = None if g is None else _kept_side(p, kept, q, k, g, u)
    values = None if gv is None else _prepare(p, do, v, gv)
    qs, ks = (q, k) if keys is None else (keys.readers, keys.writers)
    os, vs = (do, v) if values is None else (values.readers, values.writers)
    assert qs is not None and os is not None
    if keys is not None and values is not None:
        ends, initial_grad = _carry(p, q, do, (g, gv), final_grad, scale, every=1, reverse=True, stored_scale=1.0)
        starts, _ = _carry(p, k, v, (g, gv), initial_state, 1.0, every=1)
        dq = p.like(q)
        dk, dg, _ = _side(p, os, vs, q, k, (values, keys), (starts, ends), scale, flipped=True, z_grad=dq)
        dv, dgv, _ = _side(p, qs, ks, do, v, (keys, values), (starts, ends), scale)
        return dq, dk, dv, dg, dgv, None, initial_grad
    start, end, first_grad = initial_state, final_grad, None
    if p.single:
        first_grad = initial_grad = p.states(p.sequences)
    else:
        if kept.starts is None:
            start, _ = _carry(p, k, v, (g, gv), initial_state, 1.0, every=p.segment)
        end, initial_grad = _carry(
            p, q, do, (g, gv), final_grad, scale, every=p.segment, reverse=True, before=u is not None
        )
    starts = p.states(p.slots, p.narrow) if kept.starts is None else kept.starts
    ends = p.states(p.slots, p.narrow)
    onward = {"reverse": True, "stored": ends, "final": first_grad}
    if values is None:
        if kept.starts is None:
            _stream(p, None, ks, v, keys, start, scale, stored=starts)
        dv = _stream(p, ks, qs, do, keys, end, scale, **onward)
        dq = p.like(q)
        dk, dg, du = _side(p, do, v, q, k, (None, keys), (starts, ends), scale, flipped=True, z_grad=dq, u=u)
        assert dv is not None
        return dq, dk, dv, dg, None, None if u is None or du is None else du.to(u.dtype), initial_grad
    dk = _stream(p, vs, os, q, values, end, scale, flipped=True, **onward)
    dq = _stream(p, os, vs, k, values, start, scale, flipped=True, stored=starts)
    dv, dgv, _ = _side(p, q, k, do, v, (None, values), (starts, ends), scale)
    assert dk is not None and dq is not None
    return dq, dk, dv, None, dgv, None, initial_grad


def both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *,
    launch: Launch,
    large: bool,
    save: bool,
) -> None:
    """`forward` and, with `save`, the `backward` that will follow: what the first call compiles at once."""
    inputs = (q, k, v, g, gv, u, initial_state, cu_seqlens)
    o, _, kept = forward(*inputs, scale, launch=launch, large=large, save=save)
    if save:
        backward(*inputs, o, None, scale, launch=launch, large=large, kept=kept)


def _backward_from(kept: Kept, *given: Any, launch: Launch, large: bool) -> None:
    backward(*given, launch=launch, large=large, kept=kept)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    state: Tensor,
    scale: float,
    launch: Launch = launch_now,
) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,H,K,V] (contiguous). Returns [B,T,H,V] in q's dtype."""
    q, k, v, g, gv, u = _contiguous(q, k, v, g, gv, u)
    batch, time, heads, width = q.shape
    value_width = v.shape[3]
    padded = max(16, triton.next_power_of_2(width))
    tile = 16 if padded > 128 else 32
    count = -(-value_width // tile)
    out = torch.empty_like(v)
    launch(
        step_kernel,
        (batch * heads * count,),
        4,
        1,
        q=q,
        k=k,
        v=v,
        g=g,
        gv=gv,
        u=u,
        state=state,
        out=out,
        T=time,
        H=heads,
        scale=scale,
        K=width,
        V=value_width,
        BK=padded,
        BV=tile,
        V_BLOCKS=count,
    )
    return out


def configurations(large: bool = False) -> Iterator[Configuration]:
    """Kernels as shipped, bf16 and fp32, D 64 and 128. `large`: see `triton_plan.Problem`."""
    record = Recorder()
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128):
            for gates, packed in (("g", False), ("gu", False), ("v", False), ("gv", True), ("", False), ("g", True)):
                _record_calls(dtype, width, gates, packed, {"launch": record, "large": large})
    yield from record.found.values()


def _record_calls(dtype: torch.dtype, width: int, gates: str, packed: bool, options: dict[str, Any]) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v, o = (new(1, 128, 2, width) for _ in range(4))
    bounds = new(4, dtype=torch.int32) if packed else None
    state = new(3 if packed else 1, 2, width, width, dtype=torch.float32)
    g, gv = (new(1, 128, 2, width) if name in gates else None for name in "gv")
    u = new(2, width, dtype=torch.float32) if "u" in gates else None
    *_, kept = forward(q, k, v, g, gv, u, state, bounds, 1.0, **options, save=True)
    forward(q, k, v, g, gv, u, state, bounds, 1.0, **options)
    backward(q, k, v, g, gv, u, state, bounds, o, state, 1.0, **options, kept=kept)
    if packed:
        backward(q, k, v, g, gv, u, state, bounds, o, state, 1.0, **options)
    step(q, k, v, g, gv, u, state[:1], 1.0, launch=options["launch"])
