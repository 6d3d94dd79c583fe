"""Tensors [B,T,H,D], packed or not, as chunks [G,M,C,D] for `torch_impl`, and back. Legend there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_swap.kernels.common import chunk_table

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How [B,T,H,D] becomes chunks [G,M,C,D]. Packed: `index` [M,C] (T where unused), `sequence`, `local` [M]."""

    batch: int
    time: int
    chunk: int
    chunks: int
    dtype: torch.dtype
    index: Tensor | None = None
    sequence: Tensor | None = None
    first: Tensor | None = None
    sequences: int = 0

    def split(self, x: Tensor) -> Tensor:
        """[B,T,H,D] → [G,M,C,D] in the computing dtype, zeros where there is no token."""
        heads, width = x.shape[2], x.shape[3]
        if self.index is None:
            padded = self.chunks * self.chunk
            out = x.new_empty((self.batch, heads, padded, width), dtype=self.dtype)
            out[:, :, : self.time] = x.transpose(1, 2)
            out[:, :, self.time :] = 0
            return out.view(self.batch * heads, self.chunks, self.chunk, width)
        padded_x = torch.cat([x[0].to(self.dtype), x.new_zeros((1, heads, width), dtype=self.dtype)])
        return padded_x[self.index].permute(2, 0, 1, 3).contiguous()

    def join(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """[G,M,C,D] → [B,T,H,D], contiguous; tokens of no sequence get zero."""
        rows, _, _, width = y.shape
        heads = rows // self.batch
        if self.index is None:
            out = y.new_empty((self.batch, self.time, heads, width), dtype=dtype)
            out.copy_(y.view(self.batch, heads, -1, width)[:, :, : self.time].transpose(1, 2))
            return out
        out = y.new_zeros((self.time + 1, heads, width), dtype=dtype)
        out[self.index] = y.permute(1, 2, 0, 3).to(dtype)
        return out[: self.time].unsqueeze(0).contiguous()


def make_layout(q: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Choose the chunk length and, for packed input, build the token table on the device."""
    batch, time = q.shape[:2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    chunk = min(CHUNK, 1 << max(time - 1, 0).bit_length())
    if cu_seqlens is None:
        return Layout(batch=batch, time=time, chunk=chunk, chunks=-(-time // chunk), dtype=dtype)
    table = chunk_table(cu_seqlens, time, chunk).to(torch.int64)
    sequences = cu_seqlens.shape[0] - 1
    used = table[:, 0] >= 0
    sequence = torch.where(used, table[:, 0], sequences)
    bounds = torch.cat([cu_seqlens.to(torch.int64), cu_seqlens.new_zeros(1, dtype=torch.int64)])
    token = bounds[sequence][:, None] + table[:, 1:] * chunk + torch.arange(chunk, device=q.device)
    inside = used[:, None] & (token < bounds[(sequence + 1).clamp(max=sequences)][:, None])
    return Layout(
        batch=batch,
        time=time,
        chunk=chunk,
        chunks=table.shape[0],
        dtype=dtype,
        index=torch.where(inside, token, time),
        sequence=sequence,
        first=table[:, 1] == 0,
        sequences=sequences,
    )
