"""What every kernel folder shares: argument checks, the choice of an implementation, packed-sequence tables.

Legend for shapes: B batch, T time, H query/key heads, HV value heads, K key width, V value width, N sequences.
Nothing here imports Triton or initialises CUDA at import time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError

IMPLEMENTATIONS = ("reference", "torch", "triton")


def choose_implementation(requested: str | None, device: torch.device) -> str:
    """Return the implementation to run: the requested one, or Triton on a GPU and chunked PyTorch on a CPU.

    An explicit request never falls back: asking for `"triton"` on a CPU without `TRITON_INTERPRET=1` raises.
    """
    if requested is None:
        return "triton" if device.type == "cuda" else "torch"
    if requested not in IMPLEMENTATIONS:
        raise KernelError(f"implementation must be one of {IMPLEMENTATIONS} or None, got {requested!r}")
    if requested == "triton" and device.type != "cuda" and not triton_interpreted():
        raise KernelError(
            f"implementation='triton' needs a CUDA tensor, got one on {device}; "
            "use implementation='torch', or set TRITON_INTERPRET=1 before the process starts to debug"
        )
    return requested


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (`TRITON_INTERPRET=1`), where CPU tensors are allowed."""
    import triton.knobs

    return bool(triton.knobs.runtime.interpret)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless `tensor` has the expected shape; `None` allows any size in that place."""
    got = tuple(tensor.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise KernelError(f"{name} must have shape ({wanted}), got {got}")


def check_cu_seqlens(cu_seqlens: Tensor | None, batch: int, device: torch.device) -> None:
    """Check what can be checked without a host sync: rank, dtype, device, and that packed input has B = 1."""
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise KernelError(f"cu_seqlens must have shape (N+1,) with N >= 1, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise KernelError(f"cu_seqlens must be on {device}, got {cu_seqlens.device}")
    if batch != 1:
        raise KernelError(f"packed input (cu_seqlens) needs batch size 1, got {batch}")


def chunk_bound(total: int, chunk: int, sequences: int) -> int:
    """The most chunks that `sequences` sequences of `total` tokens together can need. No device access."""
    return (total + chunk - 1) // chunk + sequences


def chunk_table(cu_seqlens: Tensor, total: int, chunk: int) -> Tensor:
    """Map chunk slots to packed sequences, on the device and without a host sync.

    Args:
        cu_seqlens: [N+1], int32 or int64.
        total: T, the packed length (rows after `cu_seqlens[-1]` are padding and get no chunk).
        chunk: tokens per chunk.
    Returns:
        int32 [chunk_bound(total, chunk, N), 2]: (sequence, chunk number inside it); unused slots hold (-1, 0).
    """
    sequences = cu_seqlens.shape[0] - 1
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    counts = (lengths + chunk - 1) // chunk
    ends = counts.cumsum(0)
    slots = torch.arange(chunk_bound(total, chunk, sequences), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, slots, right=True)
    inside = sequence < sequences
    safe = sequence.clamp(max=sequences - 1)
    local = slots - (ends - counts)[safe]
    return torch.stack((torch.where(inside, sequence, -1), torch.where(inside, local, 0)), dim=1).to(torch.int32)
