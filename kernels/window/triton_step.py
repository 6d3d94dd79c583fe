"""The decode step of windowed attention in Triton: one token against the ring of the last W keys and values."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.window.state import WindowState
from fla_swap.kernels.window.torch_impl import Band
from fla_swap.kernels.window.triton_impl import pointers, run, static_sizes
from fla_swap.kernels.window.triton_kernels import LOG2E, tanh

TILE = 64
"""Slots of the ring that a program holds at a time."""
WARPS = 4
PROGRAMS = 4096
MOST_PARTS = 64


@triton.jit(do_not_specialize=["T", "step", "count"])
def decode_kernel(
    q, k, v, alibi, valid, ring_k, ring_v, ring_valid, count, part, tops, totals, T, step, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program: token `step` of one sequence and head against a part of the ring; writes the token's slot.

    Gives the part's weighted sum of values (part [N·H, PARTS, V]), its largest score in units of log 2 and its sum of
    weights. The slot of the new token is never read from the ring, so programs need not wait for each other.
    `combine_kernel` does the rest.
    """
    piece = tl.program_id(0) % PARTS
    row = tl.program_id(0) // PARTS
    n, h = (row // H).to(tl.int64), row % H
    kv_head = h // (H // HK)
    across_k, across_v = tl.arange(0, BK), tl.arange(0, BV)
    token = n * T + step
    query = tl.load(q + (token * H + h) * K + across_k, mask=across_k < K, other=0.0).to(tl.float32)
    new_k = tl.load(k + (token * HK + kv_head) * K + across_k, mask=across_k < K, other=0.0)
    new_v = tl.load(v + (token * HK + kv_head) * V + across_v, mask=across_v < V, other=0.0)
    slot = (tl.load(count + n) % W).to(tl.int32)
    row_counts = piece >= 0
    if HAS_VALID:
        row_counts = tl.load(valid + token) != 0
    counts = row_counts & (piece == 0)  # the first part has the new token
    top = tl.sum(query * new_k.to(tl.float32), 0) * scale
    if HAS_SOFTCAP:
        top = tanh(top / softcap) * softcap
    top = tl.where(counts, top * LOG2E, -1.0e30)
    total = tl.where(counts, 1.0, 0.0)
    mixed = tl.where(counts, new_v.to(tl.float32), 0.0)
    ring = n * HK + kv_head
    for begin in range(piece * BN, W, PARTS * BN):
        slots = begin + tl.arange(0, BN)
        old = (slots < W) & (slots != slot)
        offsets_k = (ring * W + slots)[:, None] * K + across_k[None, :]
        offsets_v = (ring * W + slots)[:, None] * V + across_v[None, :]
        key = tl.load(ring_k + offsets_k, mask=old[:, None] & (across_k < K)[None, :], other=0.0)
        value = tl.load(ring_v + offsets_v, mask=old[:, None] & (across_v < V)[None, :], other=0.0)
        live = tl.load(ring_valid + n * W + slots, mask=old, other=0) != 0
        score = tl.sum(query[None, :] * key.to(tl.float32), 1) * scale
        if HAS_SOFTCAP:
            score = tanh(score / softcap) * softcap
        if HAS_ALIBI:
            age = (slot - slots + W) % W
            score -= tl.load(alibi + h).to(tl.float32) * age.to(tl.float32)
        score = tl.where(live & row_counts, score * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value.to(tl.float32), 0)
        top = new_top
    place = row.to(tl.int64) * PARTS + piece
    tl.store(part + place * V + across_v, mixed, mask=across_v < V)
    tl.store(tops + place, top)
    tl.store(totals + place, total)
    if (piece == 0) & (h % (H // HK) == 0):
        target = ring * W + slot
        tl.store(ring_k + target * K + across_k, new_k.to(ring_k.dtype.element_ty), mask=across_k < K)
        tl.store(ring_v + target * V + across_v, new_v.to(ring_v.dtype.element_ty), mask=across_v < V)


@triton.jit(do_not_specialize=["T", "step", "count"])
def combine_kernel(
    part, tops, totals, sinks, valid, ring_valid, count, o, T, step,
    H: tl.constexpr, V: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: the output of one sequence and head from its parts; the first head marks the token as seen."""
    row = tl.program_id(0).to(tl.int64)
    n, h = row // H, row % H
    pieces, across = tl.arange(0, BP), tl.arange(0, BV)
    inside = pieces < PARTS
    top = tl.load(tops + row * PARTS + pieces, mask=inside, other=-1.0e30)
    total = tl.load(totals + row * PARTS + pieces, mask=inside, other=0.0)
    place = part + (row * PARTS + pieces)[:, None] * V + across[None, :]
    mixed = tl.load(place, mask=inside[:, None] & (across < V)[None, :], other=0.0)
    highest = tl.max(top, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    weight = tl.exp2(top - highest)
    below = tl.sum(weight * total, 0)
    if HAS_SINKS:
        below += tl.exp2(sink - highest)
    out = tl.sum(weight[:, None] * mixed, 0) / tl.where(below == 0.0, 1.0, below)
    tl.store(o + ((n * T + step) * H + h) * V + across, out.to(o.dtype.element_ty), mask=across < V)
    if h == 0:
        seen_tokens = tl.load(count + n)
        counts = tl.full((), 1, tl.int8)
        if HAS_VALID:
            counts = tl.load(valid + n * T + step).to(tl.int8)
        tl.store(ring_valid + n * W + seen_tokens % W, counts.to(ring_valid.dtype.element_ty))
        tl.store(count + n, seen_tokens + 1)


def parts_of(window: int, rows: int) -> int:
    """How many programs share a ring: enough to fill a GPU, where tiles suffice. `rows`: sequences times heads."""
    return max(1, min((window + TILE - 1) // TILE, MOST_PARTS, (PROGRAMS + rows - 1) // rows))


def step(
    q: Tensor, k: Tensor, v: Tensor, state: WindowState, sinks: Tensor | None, valid: Tensor | None, band: Band
) -> Tensor:
    """As `torch_impl.step`; the tokens are taken one after another."""
    sequences, steps, heads, _ = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    for name, tensor in zip(WindowState._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise KernelError(f"state.{name} must be contiguous")
    o = q.new_empty(sequences, steps, heads, v.shape[-1])
    if o.numel() == 0:
        return o
    static = static_sizes(q, k, v) | {"W": state.valid.shape[1]}
    parts = parts_of(static["W"], sequences * heads)
    mixed = q.new_empty(sequences * heads, parts, static["V"], dtype=torch.float32)
    tops, totals = q.new_empty(2, sequences * heads, parts, dtype=torch.float32)
    sinks_, alibi, valid_ = pointers(q, sinks, band.alibi, valid)
    ring_valid = state.valid.view(torch.uint8)
    flags = {"HAS_ALIBI": band.alibi is not None, "HAS_SOFTCAP": band.softcap is not None}
    shared: dict[str, Any] = {"PARTS": parts, "HAS_VALID": valid is not None, "num_warps": WARPS}
    for number in range(steps):
        run(
            decode_kernel, sequences * heads * parts,
            q, k, v, alibi, valid_, state.k, state.v, ring_valid, state.count, mixed, tops, totals,
            steps, number, band.scale, band.softcap or 1.0, **static, **flags, **shared, BN=TILE,
        )  # fmt: skip
        run(
            combine_kernel, sequences * heads,
            mixed, tops, totals, sinks_, valid_, ring_valid, state.count, o, steps, number,
            **{name: static[name] for name in ("H", "V", "W", "BV")}, **shared,
            BP=1 << (parts - 1).bit_length(), HAS_SINKS=sinks is not None,
        )  # fmt: skip
    return o
