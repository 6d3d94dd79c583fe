"""Attention of one query per head over keys in a cache: the decode step of a softmax layer.

A query reads all keys and values once. They are split over many programs, each of which leaves its largest score, its
sum of weights and its weighted values; a second kernel joins them (flash-decoding). Blocks that the mask hides
altogether are not read.

Legend for shapes: B batch, H query heads, HK key/value heads, L keys, D width of a key, V width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.errors import KernelError
from fla_swap.kernels import flops
from fla_swap.kernels.common import check_shape, choose_implementation

MAX_WIDTH = 256


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v for a single query, which sees the keys where mask is True. No gradients.

    Args:
        q: [B, H, 1, D]. k: [B, HK, L, D]. v: [B, HK, L, V]. H is a multiple of HK: query head h reads head h // (H/HK).
        mask: bool [B or 1, 1, 1, L], or None for all. Every row must see a key.
        scale: None: D^-0.5.
    Returns:
        [B, H, 1, V] in q's dtype; scores and sums in fp32.
    Raises:
        KernelError: shapes that do not fit.
    """
    batch, heads, _, width = q.shape
    check_shape("q", q, (None, None, 1, None))
    check_shape("k", k, (batch, None, None, width))
    check_shape("v", v, (batch, k.shape[1], k.shape[2], None))
    if heads % k.shape[1] or max(width, v.shape[3]) > MAX_WIDTH:
        raise KernelError(
            f"{heads} query heads over {k.shape[1]} key heads of width {width}, {v.shape[3]}: a multiple, and at most "
            f"{MAX_WIDTH} wide"
        )
    if mask is not None:
        check_shape("mask", mask, (None, 1, 1, k.shape[2]))
        if mask.dtype != torch.bool or mask.shape[0] not in (1, batch):
            raise KernelError(f"mask must be bool, of 1 or {batch} rows; got {mask.dtype}, {tuple(mask.shape)}")
    scale = width**-0.5 if scale is None else scale
    return _attend_one_op(q, k, v, mask, scale, choose_implementation(implementation, q.device))


@torch.library.custom_op("fla_swap::attend_one", mutates_args=())
def _attend_one_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, implementation: str) -> Tensor:
    if implementation == "triton":
        from fla_swap.kernels.fused import attend_one_triton

        return attend_one_triton.attend_one(q, k, v, mask, scale)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped).contiguous()


@_attend_one_op.register_fake
def _attend_one_fake(q, k, v, mask, scale, implementation):
    return q.new_empty((*q.shape[:3], v.shape[3]))


flops.register()
