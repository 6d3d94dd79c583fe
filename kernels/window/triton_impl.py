"""Windowed softmax attention in Triton: forward with log-denominators, backward kernels limited to the band, decode.

Legend: B batch, Tq queries, Tk keys (query i stands at key index i + Tk − Tq), H query heads, HK key/value heads,
G = H / HK, K key width, V value width; tiles of BM queries and BN keys, widths padded to BK and BV.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import triton_interpreted
from fla_swap.kernels.window.torch_impl import Band, sink_gradient
from fla_swap.kernels.window.triton_kernels import backward_key_kernel, backward_query_kernel, forward_kernel

_MAX_WIDTH = 256
# (BM, BN, warps, stages, registers of a thread: None is the compiler's choice) by kernel and head width: the fastest on
# an H200 (bf16, window 512, 2k tokens) of those that fit every large chip and spill little. What counts is how many
# blocks share a multiprocessor: one waits for its tiles while another multiplies.
LARGE: dict[tuple[str, int], tuple[int, int, int, int, int | None]] = {
    ("forward", 64): (64, 64, 4, 2, None),
    ("forward", 128): (64, 64, 4, 1, 128),
    ("forward", 256): (64, 64, 4, 1, None),
    ("query", 64): (64, 64, 4, 2, 128),
    ("query", 128): (64, 64, 4, 1, 168),
    ("query", 256): (64, 64, 4, 1, None),
    ("key", 64): (64, 64, 4, 1, 168),
    ("key", 128): (64, 64, 4, 1, None),
    ("key", 256): (64, 64, 8, 1, None),
}


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, band: Band) -> tuple[Tensor, Tensor]:
    """As `torch_impl.forward`; inputs contiguous."""
    if band.scale < 0:  # the kernel takes the largest product for that of the largest score
        return forward(-q, k, v, sinks, dataclasses.replace(band, scale=-band.scale))
    batch, queries, heads, _ = q.shape
    o = q.new_empty(batch, queries, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    options = {**_launch(static_sizes(q, k, v), "forward", k, v), **_flags(band)}
    run(
        forward_kernel, _blocks(queries, options["BM"]) * batch * heads,
        q, *_streamed("BN", options, k, v), *pointers(q, sinks, band.alibi, band.valid, band.start), o, lse,
        queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0,
        HAS_SINKS=sinks is not None, **options,
    )  # fmt: skip
    return o, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    band: Band,
    lse_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `torch_impl.backward`; inputs contiguous."""
    batch, queries, heads, _ = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    exact = torch.empty_like(lse)
    lse_grad = None if lse_grad is None else lse_grad.contiguous()
    dalibi = None if band.alibi is None else torch.empty_like(lse)
    if o.numel() == 0:
        dsinks, dslopes = (None if x is None else x.new_zeros(heads) for x in (sinks, dalibi))
        return dq, dk.zero_(), dv.zero_(), dsinks, dslopes
    sizes = static_sizes(q, k, v)
    alibi, valid, start, stop = pointers(q, band.alibi, band.valid, band.start, band.stop)
    numbers = (queries, k.shape[1], band.window or 0, band.scale, band.softcap or 1.0)
    options = {**_launch(sizes, "query", k, v), **_flags(band)}
    run(
        backward_query_kernel, _blocks(queries, options["BM"]) * batch * heads,
        q, *_streamed("BN", options, k, v), o, grad, lse, lse_grad, alibi, valid, start,
        dq, exact, exact if dalibi is None else dalibi, *numbers, **options
    )  # fmt: skip
    exact = exact if lse_grad is None else exact - lse_grad
    options = {**_launch(sizes, "key", q, grad), **_flags(band)}
    queries_, grad_ = _streamed("BM", options, q, grad)
    run(
        backward_key_kernel, _blocks(k.shape[1], options["BN"]) * batch * k.shape[2],
        queries_, k, v, grad_, lse, exact, alibi, valid, start, stop, dk, dv, *numbers, **options
    )  # fmt: skip
    dsinks = None if sinks is None else sink_gradient(sinks, lse, exact)
    return dq, dk, dv, dsinks, None if dalibi is None else dalibi.sum((0, 2))


def _blocks(total: int, size: int) -> int:
    return (total + size - 1) // size


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
        kernel[(programs,)](*arguments, **options)


def tiles(dtype: torch.dtype, width: int, kind: str, large: bool) -> tuple[int, int, int, int, int | None]:
    """(BM, BN, warps, stages, registers) of a "forward", "query" or "key" (backward) kernel for a padded head width.

    `large`: the chip gives a block 200 KiB of shared memory or more (tuned on one of these); otherwise every kernel
    stays under 99 KiB. fp32 products run without tensor cores, whose code grows with the tile; small ones
    keep compilation in seconds.
    """
    if dtype == torch.float32:
        return (16, 16, 4, 1, None) if width > 128 else (32, 32, 4, 1, None)
    if large:
        return LARGE[kind, width]
    return (32, 32, 4, 1, None) if width > 128 else (64, 64, 4, 1, None)


@functools.cache
def has_large_memory(device: torch.device) -> bool:
    """Whether a block of this GPU may use 200 KiB of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 200 << 10


def static_sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Compile-time sizes of a call. Raises KernelError for a dtype or a width that these kernels do not take."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise KernelError(
            f"Triton window attention takes fp32, bf16 or fp16, got {q.dtype}; use implementation='torch'"
        )
    if max(q.shape[-1], v.shape[-1]) > _MAX_WIDTH:
        raise KernelError(f"head widths above {_MAX_WIDTH} are not supported, got K={q.shape[-1]}, V={v.shape[-1]}")
    return _sizes(q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _sizes(heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Widths are padded to at least 64, so that no product has a narrow operand."""
    padded_k, padded_v = (max(64, 1 << (width - 1).bit_length()) for width in (key_dim, value_dim))
    return {"H": heads, "HK": kv_heads, "K": key_dim, "V": value_dim, "BK": padded_k, "BV": padded_v}


def _flags(band: Band) -> dict[str, bool]:
    return {
        "HAS_ALIBI": band.alibi is not None,
        "HAS_VALID": band.valid is not None,
        "HAS_START": band.start is not None,
        "HAS_WINDOW": band.window is not None,
        "HAS_SOFTCAP": band.softcap is not None,
    }


def _launch(static: dict[str, int], kind: str, first: Tensor, second: Tensor) -> dict[str, Any]:
    """Tile sizes, warps, stages, the products' precision, and whether first and second, [B, T, heads, ·], whose tiles
    the kernel goes through, are loaded by descriptor."""
    width, large = max(static["BK"], static["BV"]), has_large_memory(first.device)
    rows, keys, warps, stages, registers = tiles(first.dtype, width, kind, large)
    wide = first.dtype == torch.bfloat16 and triton_interpreted()
    sizes = {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages}
    sizes |= {} if registers is None else {"maxnreg": registers}
    by_descriptor = large and _describable(first) and _describable(second)
    return {**static, **sizes, "TMA": by_descriptor, "PRECISION": precision(first.dtype), "WIDE": wide}


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator takes a contiguous x: 16-bit, addresses and strides of whole 16 bytes."""
    return x.element_size() == 2 and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


def _streamed(rows: str, options: dict[str, Any], *tensors: Tensor) -> list[Any]:
    """The tensors, [B, T, heads, ·], or their descriptors for tiles of options[rows] tokens of one head."""
    if not options["TMA"]:
        return list(tensors)
    found = []
    for x in tensors:
        _, time, heads, width = x.shape
        block = [1, options[rows], 1, max(64, 1 << (width - 1).bit_length())]
        strides = [time * heads * width, heads * width, width, 1]
        found.append(TensorDescriptor(x, list(x.shape), strides, block))
    return found


def precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied in full precision; 16-bit operands ignore this."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous tensors for the kernels (bool as bytes); an absent one is replaced by one that is never read."""
    ready = [stand_in if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t.dtype == torch.bool else t for t in ready]


_KINDS = ((forward_kernel, "forward"), (backward_query_kernel, "query"), (backward_key_kernel, "key"))
_POINTERS = {"start": "*i64", "stop": "*i64", "valid": "*u8", "ring_valid": "*u8", "count": "*i64"}
_FP32_POINTERS = ("lse", "lse_grad", "delta", "exact", "dalibi", "sinks", "alibi", "part", "tops", "totals")
_INTEGERS = ("Tq", "Tk", "T", "window", "step")


def configurations(
    large: bool = False,
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int, int | None]]:
    """Every shipped configuration: name, kernel, signature, constants, warps, stages, registers (see `tiles`)."""
    from fla_swap.kernels.window.triton_step import combine_kernel, decode_kernel

    for dtype, code in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for width in (64, 128, 256):
            sizes = _sizes(8, 4, width, width)
            for kernel, kind in _KINDS:
                rows, keys, warps, stages, registers = tiles(dtype, width, kind, large)
                for plain in (True, False):
                    constants: dict[str, Any] = {**sizes, "BM": rows, "BN": keys}
                    constants |= {name: not plain for name in kernel.arg_names if name.startswith("HAS_")}
                    constants |= {"HAS_WINDOW": True, "PRECISION": precision(dtype), "WIDE": False}
                    constants["TMA"] = large and code != "fp32"
                    if plain and kernel is backward_query_kernel:
                        constants["lse_grad"] = None
                    name = f"{kernel.__name__}-{code}-{width}-{'plain' if plain else 'everything'}"
                    yield name, kernel, _signature(kernel, code, constants), constants, warps, stages, registers
            for kernel in (decode_kernel, combine_kernel):
                constants = {**sizes, "W": 1000, "PARTS": 16, "BP": 16, "BN": 64}
                constants |= {name: True for name in kernel.arg_names if name.startswith("HAS_")}
                constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                signature = _signature(kernel, code, constants)
                yield f"{kernel.__name__}-{code}-{width}", kernel, signature, constants, 4, 1, None


def _signature(kernel: Any, code: str, constants: dict[str, Any]) -> dict[str, str]:
    streamed, rows = (("q", "grad"), "BM") if kernel is backward_key_kernel else (("k", "v"), "BN")
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in _INTEGERS:
            types[name] = "i32"
        elif name in ("scale", "softcap"):
            types[name] = "fp32"
        elif constants.get("TMA") and name in streamed:
            width = constants["BK" if name in "qk" else "BV"]
            types[name] = f"tensordesc<{code}[1,{constants[rows]},1,{width}]>"
        else:
            types[name] = _POINTERS.get(name, "*fp32" if name in _FP32_POINTERS else f"*{code}")
    return types
