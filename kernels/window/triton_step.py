"""The decode step of windowed attention in Triton: one token against the ring of the last W keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.window.state import WindowState
from fla_swap.kernels.window.torch_impl import Band
from fla_swap.kernels.window.triton_impl import pointers, run, static_sizes
from fla_swap.kernels.window.triton_kernels import tanh


@triton.jit(do_not_specialize=["T", "step", "count"])
def decode_kernel(
    q, k, v, sinks, alibi, valid, ring_k, ring_v, ring_valid, count, o, T, step, scale, softcap,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program: token `step` of one sequence and head against the ring; the first head of a group writes the slot.

    The slot of the new token is never read from the ring, so heads of a group need not wait for each other.
    `ring_valid` and `count` are updated by `advance_kernel` afterwards.
    """
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    kv_head = h // (H // HK)
    across_k, across_v = tl.arange(0, BK), tl.arange(0, BV)
    token = n * T + step
    query = tl.load(q + (token * H + h) * K + across_k, mask=across_k < K, other=0.0).to(tl.float32)
    new_k = tl.load(k + (token * HK + kv_head) * K + across_k, mask=across_k < K, other=0.0)
    new_v = tl.load(v + (token * HK + kv_head) * V + across_v, mask=across_v < V, other=0.0)
    seen_tokens = tl.load(count + n)
    slot = (seen_tokens % W).to(tl.int32)
    counts = True
    if HAS_VALID:
        counts = tl.load(valid + token) != 0
    top = -1.0e30
    total = 0.0
    if HAS_SINKS:
        top = tl.load(sinks + h).to(tl.float32)
        total = 1.0
    mixed = tl.zeros((BV,), tl.float32)
    row = n * HK + kv_head
    for begin in range(0, W, BN):
        slots = begin + tl.arange(0, BN)
        is_new = slots == slot
        old = (slots < W) & (slots != slot)
        offsets_k = (row * W + slots)[:, None] * K + across_k[None, :]
        key = tl.load(ring_k + offsets_k, mask=old[:, None] & (across_k < K)[None, :], other=0.0)
        key = tl.where(is_new[:, None], new_k[None, :].to(key.dtype), key).to(tl.float32)
        score = tl.sum(query[None, :] * key, 1) * scale
        if HAS_SOFTCAP:
            score = tanh(score / softcap) * softcap
        if HAS_ALIBI:
            age = (slot - slots + W) % W
            score -= tl.load(alibi + h).to(tl.float32) * age.to(tl.float32)
        live = tl.load(ring_valid + n * W + slots, mask=old, other=0) != 0
        score = tl.where((live | is_new) & counts, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp(score - new_top)
        shrink = tl.exp(top - new_top)
        offsets_v = (row * W + slots)[:, None] * V + across_v[None, :]
        value = tl.load(ring_v + offsets_v, mask=old[:, None] & (across_v < V)[None, :], other=0.0)
        value = tl.where(is_new[:, None], new_v[None, :].to(value.dtype), value).to(tl.float32)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = new_top
    out = mixed / tl.where(total == 0.0, 1.0, total)
    tl.store(o + (token * H + h) * V + across_v, out.to(o.dtype.element_ty), mask=across_v < V)
    if h % (H // HK) == 0:
        target = row * W + slot
        tl.store(ring_k + target * K + across_k, new_k.to(ring_k.dtype.element_ty), mask=across_k < K)
        tl.store(ring_v + target * V + across_v, new_v.to(ring_v.dtype.element_ty), mask=across_v < V)


@triton.jit(do_not_specialize=["T", "step", "count"])
def advance_kernel(valid, ring_valid, count, T, step, W: tl.constexpr, HAS_VALID: tl.constexpr):
    """One program: one sequence has seen token `step`."""
    n = tl.program_id(0).to(tl.int64)
    seen_tokens = tl.load(count + n)
    counts = tl.full((), 1, tl.int8)
    if HAS_VALID:
        counts = tl.load(valid + n * T + step).to(tl.int8)
    tl.store(ring_valid + n * W + seen_tokens % W, counts.to(ring_valid.dtype.element_ty))
    tl.store(count + n, seen_tokens + 1)


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
    sinks_, alibi, valid_ = pointers(q, sinks, band.alibi, valid)
    ring_valid = state.valid.view(torch.uint8)
    flags = {"HAS_SINKS": sinks is not None, "HAS_ALIBI": band.alibi is not None, "HAS_VALID": valid is not None}
    for number in range(steps):
        run(
            decode_kernel, sequences * heads,
            q, k, v, sinks_, alibi, valid_, state.k, state.v, ring_valid, state.count, o,
            steps, number, band.scale, band.softcap or 1.0,
            **static, **flags, HAS_SOFTCAP=band.softcap is not None, BN=64, num_warps=4,
        )  # fmt: skip
        run(
            advance_kernel, sequences,
            valid_, ring_valid, state.count, steps, number,
            W=static["W"], HAS_VALID=valid is not None, num_warps=1,
        )  # fmt: skip
    return o
