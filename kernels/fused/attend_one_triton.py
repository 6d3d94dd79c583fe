"""Triton kernels of `attend_one.py`. G query heads share a key head; S splits of the keys."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.launching import Configuration, Launch, Recorder, has_large_memory, launch_now

BLOCK = 64
PROGRAMS = 264
LOG2E = 1.4426950408889634


@triton.jit
def split_kernel(
    q, k, v, mask, part, most, weight, scale, length, span, mask_rows,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BL: tl.constexpr,
    kb, kh, kl, vb, vh, vl, qb, qh,
):  # fmt: skip
    """Keys from split · span on for `span` keys: part [B·H, S, V] fp32, most and weight [B·H, S]."""
    G: tl.constexpr = H // HK
    row, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    b, h = (row // HK).to(tl.int64), row % HK
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    c = tl.arange(0, BV)
    heads = h * G + g
    query = tl.load(q + b * qb + heads[:, None] * qh + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    mask_at = mask
    if mask is not None:
        mask_at = mask + (b % mask_rows) * length
    for start in range(split * span, tl.minimum(split * span + span, length), BL):
        at = start + tl.arange(0, BL)
        sees = at < length
        if mask is not None:
            sees = sees & (tl.load(mask_at + at, mask=sees, other=0) != 0)
        if tl.max(sees.to(tl.int32), 0) > 0:
            spot = at.to(tl.int64)
            key = tl.load(
                k + b * kb + h * kh + spot[None, :] * kl + d[:, None], mask=sees[None, :] & (d < D)[:, None], other=0.0
            )
            value = tl.load(
                v + b * vb + h * vh + spot[:, None] * vl + c[None, :], mask=sees[:, None] & (c < V)[None, :], other=0.0
            )
            score = tl.where(sees[None, :], tl.dot(query, key) * scale, float("-inf"))
            high = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - high[:, None])
            shrink = tl.exp2(top - high)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value)
            top = high
    place = (b * H + heads) * splits + split
    tl.store(most + place, top, mask=g < G)
    tl.store(weight + place, total, mask=g < G)
    tl.store(part + place[:, None] * V + c[None, :], acc, mask=(g < G)[:, None] & (c < V)[None, :])


@triton.jit
def join_kernel(part, most, weight, o, splits, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr):
    """o [B·H, V] of the splits."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    c = tl.arange(0, BV)
    top = tl.load(most + row * splits + s, mask=s < splits, other=float("-inf"))
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(weight + row * splits + s, mask=s < splits, other=0.0), 0)
    inside = (s < splits)[:, None] & (c < V)[None, :]
    values = tl.load(part + (row * splits + s)[:, None] * V + c[None, :], mask=inside, other=0.0)
    result = tl.sum(values * share[:, None], 0) / total
    tl.store(o + row * V + c, result.to(o.dtype.element_ty), mask=c < V)


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
    large: bool | None = None,
) -> Tensor:
    """As `attend_one.attend_one`, on checked arguments."""
    batch, heads, _, width = q.shape
    key_heads, length, values = k.shape[1], k.shape[2], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    large = has_large_memory(q.device) if large is None else large
    block = BLOCK if large else max(16, min(BLOCK, 16384 // (width * q.element_size())))
    blocks = -(-length // block)
    splits = max(1, min(blocks, 128, -(-PROGRAMS // (batch * key_heads))))
    span = -(-blocks // splits) * block
    splits = -(-length // span)
    part = q.new_empty((batch * heads, splits, values), dtype=torch.float32)
    most, weight = (q.new_empty((batch * heads, splits), dtype=torch.float32) for _ in range(2))
    o = q.new_empty((batch, heads, 1, values))
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    bits = {"H": heads, "HK": key_heads, "D": width, "V": values}
    launch(
        split_kernel, (batch * key_heads, splits), 4, 3,
        q=q, k=k, v=v, mask=mask, part=part, most=most, weight=weight, scale=scale * LOG2E, length=length, span=span,
        mask_rows=1 if mask is None else mask.shape[0], **bits, BD=_power(width), BV=_power(values),
        BG=max(16, _power(heads // key_heads)), BL=block,
        kb=k.stride(0), kh=k.stride(1), kl=k.stride(2), vb=v.stride(0), vh=v.stride(1), vl=v.stride(2),
        qb=q.stride(0), qh=q.stride(1),
    )  # fmt: skip
    launch(
        join_kernel, (batch * heads, 1), 4, 1,
        part=part, most=most, weight=weight, o=o, splits=splits, V=values, BV=_power(values), BS=_power(splits),
    )  # fmt: skip
    return o


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def configurations(large: bool = True) -> list[Configuration]:
    """What the shipped configurations compile."""
    record = Recorder()
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 256):
            q, k = torch.empty(2, 8, 1, width, dtype=dtype), torch.empty(2, 2, 4096, width, dtype=dtype)
            for mask in (None, torch.empty(1, 1, 1, 4096, dtype=torch.bool)):
                attend_one(q, k, k, mask, 1.0, record, large)
    return list(record.found.values())
