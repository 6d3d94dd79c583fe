"""Triton for `slot_writes`: one program walks a sequence of one head's slots in chunks, by associative scans.

Imported only when Triton is chosen.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.launching import Configuration, Launch, Recorder, launch_now

CHUNK = 64
LOWEST = -1e38
"""Stands for −inf in the running logsumexp: its differences are not NaN."""


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    return top + tl.log(1.0 + tl.exp(tl.minimum(a, b) - top))


@triton.jit
def _later_of_sums(flag_a, a, flag_b, b):
    """Logsumexp that restarts where the flag is set."""
    return tl.maximum(flag_a, flag_b), tl.where(flag_b > 0, b, _log_add(a, b))


@triton.jit
def _chain(factor_a, a, factor_b, b):
    """Compose x → a + factor_a · x with what comes after it (in the scan's direction)."""
    return factor_a * factor_b, b + factor_b * a


@triton.jit
def _bounds(sequence, bounds, T, PACKED: tl.constexpr):
    if PACKED:
        first = tl.load(bounds + sequence).to(tl.int64)
        stop = tl.load(bounds + sequence + 1).to(tl.int64)
    else:
        first = sequence * T
        stop = first + T
    return first, stop


@triton.jit(do_not_specialize=["T", "H"])
def slot_writes_kernel(
    s, initial, starts, bounds, weight, g, last, T, H,
    M: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Grid: N · H · BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, sequence = row % H, row // H
    first, stop = _bounds(sequence, bounds, T, PACKED)
    rows, columns = tl.arange(0, C), block * BLOCK + tl.arange(0, BLOCK)
    fits = columns < M
    place = (sequence * H + head) * M + columns
    carry = tl.full([BLOCK], LOW, tl.float32)
    if initial is not None:
        carry = tl.maximum(tl.load(initial + place, mask=fits, other=LOW).to(tl.float32), LOW)
    for start in range(first, stop, C):
        count = stop - start
        inside = (rows < count)[:, None] & fits[None, :]
        offsets = (start * H + head) * M + (rows[:, None] * (H * M) + columns[None, :])
        now = tl.load(s + offsets, mask=inside, other=LOW).to(tl.float32)
        shifted = inside & (rows > 0)[:, None]
        before = tl.load(s + offsets - H * M, mask=shifted, other=LOW).to(tl.float32)
        flag = tl.zeros([C, BLOCK], tl.int32)
        if starts is not None:
            flag += tl.load(starts + start + rows, mask=rows < count, other=0).to(tl.int32)[:, None]
        before = tl.where(flag > 0, LOW, before)
        seen, before = tl.associative_scan((flag, before), 0, _later_of_sums)
        before = tl.where(seen > 0, before, _log_add(before, carry[None, :]))
        ahead = now - before
        near = tl.exp(-tl.abs(ahead))
        drop = tl.maximum(ahead, 0.0) + tl.log(1.0 + near)
        tl.store(weight + offsets, tl.where(ahead > 0, 1.0, near) / (1.0 + near), mask=inside)
        tl.store(g + offsets, tl.maximum(-drop, RESET), mask=inside)
        running = _log_add(before, now)
        end = (rows == tl.minimum(count, C) - 1)[:, None]
        carry = tl.sum(tl.where(end, running, 0.0), 0)
    tl.store(last + place, tl.where(carry <= 0.99 * LOW, float("-inf"), carry), mask=fits)


@triton.jit(do_not_specialize=["T", "H"])
def slot_writes_grad_kernel(
    weight, g, starts, bounds, weight_grad, g_grad, last_grad, s_grad, initial_grad, T, H,
    M: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dz_{t-1} = −dd_t + exp(g_t) dz_t, ds_t = dd_t + weight_t dz_t."""
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, sequence = row % H, row // H
    first, stop = _bounds(sequence, bounds, T, PACKED)
    rows, columns = tl.arange(0, C), block * BLOCK + tl.arange(0, BLOCK)
    fits = columns < M
    place = (sequence * H + head) * M + columns
    carry = tl.zeros([BLOCK], tl.float32)
    if last_grad is not None:
        carry += tl.load(last_grad + place, mask=fits, other=0.0).to(tl.float32)
    chunks = tl.cdiv(stop - first, C)
    for chunk in range(0, chunks):
        start = first + (chunks - 1 - chunk) * C
        count = stop - start
        # Row r of the scan holds step r + 1: dz of row r comes from there. The last row of the chunk takes the carry.
        after = rows + 1
        inside = (rows < count)[:, None] & fits[None, :]
        later = ((after < count) & (after < C))[:, None] & fits[None, :]
        offsets = (start * H + head) * M + (rows[:, None] * (H * M) + columns[None, :])
        ahead, keep, w = _ahead(weight, g, weight_grad, g_grad, offsets, inside)
        next_ahead, factor, _ = _ahead(weight, g, weight_grad, g_grad, offsets + H * M, later)
        factor = tl.where(later, factor, 1.0)
        cut = tl.zeros([C, BLOCK], tl.int32)
        own_cut = tl.zeros([C, BLOCK], tl.int32)
        if starts is not None:
            cut += tl.load(starts + start + after, mask=(after < count) & (after < C), other=0).to(tl.int32)[:, None]
            own_cut += tl.load(starts + start + rows, mask=rows < count, other=0).to(tl.int32)[:, None]
        factor = tl.where(cut > 0, 0.0, factor)
        entering = tl.where(cut > 0, 0.0, -next_ahead)
        factor, total = tl.associative_scan((factor, entering), 0, _chain, reverse=True)
        total += factor * carry[None, :]
        tl.store(s_grad + offsets, ahead + w * total, mask=inside)
        leaving = tl.where(own_cut > 0, 0.0, keep * total - ahead)
        carry = tl.sum(tl.where((rows == 0)[:, None], leaving, 0.0), 0)
    tl.store(initial_grad + place, carry, mask=fits)


@triton.jit
def _ahead(weight, g, weight_grad, g_grad, offsets, inside):
    """(gradient of s − z_before, exp g, weight) at these rows."""
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    keep = tl.exp(tl.load(g + offsets, mask=inside, other=0.0))
    dw = tl.load(weight_grad + offsets, mask=inside, other=0.0).to(tl.float32)
    dg = tl.load(g_grad + offsets, mask=inside, other=0.0).to(tl.float32)
    return w * (dw * keep - dg), keep, w


def _place(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(programs, arguments): which rows a program walks."""
    batch, time, heads, slots = shape
    block = min(32, triton.next_power_of_2(slots))
    blocks = -(-slots // block)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    place = {"bounds": cu_seqlens, "T": time, "H": heads, "M": slots, "BLOCKS": blocks, "C": CHUNK, "BLOCK": block}
    programs: Any = sequences * heads * blocks
    return (programs,), place | {"PACKED": cu_seqlens is not None}


def _marks(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


def forward(
    s: Tensor, initial: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None, launch: Launch = launch_now
) -> tuple[Tensor, Tensor, Tensor]:
    from fla_swap.kernels.decay.slot_writes import RESET

    s = s.contiguous()
    initial = None if initial is None else initial.contiguous()
    programs, place = _place(s.shape, cu_seqlens)
    new = torch.empty if cu_seqlens is None else torch.zeros
    weight, g = (new(s.shape, dtype=torch.float32, device=s.device) for _ in range(2))
    sequences = s.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = s.new_empty((sequences, *s.shape[2:]), dtype=torch.float32)
    outputs = {"weight": weight, "g": g, "last": last, "LOW": LOWEST, "RESET": RESET}
    launch(slot_writes_kernel, programs, 4, 1, s=s, initial=initial, starts=_marks(starts), **outputs, **place)
    return weight, g, last


def backward(
    weight: Tensor,
    g: Tensor,
    starts: Tensor | None,
    cu_seqlens: Tensor | None,
    weight_grad: Tensor,
    g_grad: Tensor,
    last_grad: Tensor | None,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor]:
    programs, place = _place(g.shape, cu_seqlens)
    new = torch.empty_like if cu_seqlens is None else torch.zeros_like
    s_grad = new(g)
    sequences = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    initial_grad = g.new_empty((sequences, *g.shape[2:]))
    last_grad = None if last_grad is None else last_grad.contiguous()
    given = {"weight_grad": weight_grad.contiguous(), "g_grad": g_grad.contiguous(), "last_grad": last_grad}
    results = {"s_grad": s_grad, "initial_grad": initial_grad, "starts": _marks(starts)}
    launch(slot_writes_grad_kernel, programs, 4, 1, weight=weight, g=g, **given, **results, **place)
    return s_grad, initial_grad


def configurations() -> Iterator[Configuration]:
    """Kernels as shipped, for one sequence and for packed ones with all options."""
    record = Recorder()
    for dtype, packed in ((torch.float32, False), (torch.bfloat16, True)):
        s = torch.empty(1, 128, 2, 64, dtype=dtype, device="meta")
        g = torch.empty(s.shape, device="meta")
        bounds = torch.empty(4, dtype=torch.int32, device="meta") if packed else None
        last = torch.empty(3, 2, 64, device="meta") if packed else None
        starts = torch.empty(1, 128, dtype=torch.bool, device="meta") if packed else None
        forward(s, last, starts, bounds, launch=record)
        backward(g, g, starts, bounds, g, g, last, launch=record)
    yield from record.found.values()
