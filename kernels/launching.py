"""Running Triton kernels, and recording the runs instead, for the test that compiles them for other chips.

Imported only when Triton is chosen.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

Launch = Callable[..., None]
Configuration = tuple[str, Any, dict[str, str], dict[str, Any], int, int]
"""Name, kernel, signature, constexprs, num_warps, num_stages."""

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def launch_now(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run a kernel on a grid, whose first dimension is the one without a limit of 65,535."""
    if not all(grid):
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@functools.cache
def has_large_memory(device: torch.device) -> bool:
    """Whether a block of this GPU may use 200 KiB of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 200 << 10


class Recorder:
    """A `launch` that keeps what would have run: `found` by name."""

    def __init__(self) -> None:
        self.found: dict[str, Configuration] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any) -> None:
        signature, constexprs = describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        self.found.setdefault(name, (name, kernel, signature, constexprs, num_warps, num_stages))


def describe(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton's signature and constexprs for a launch with these arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constexprs


_compiled: set[tuple[Any, ...]] = set()


def compile_ahead(run: Callable[..., Any], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Compile side by side, in threads, the kernels that `run(*arguments, launch=…, **options)` is about to launch.

    Once for each kind of arguments (dtypes, widths, flags), and on a GPU only: one after the other, as launches come,
    they take two to three times as long. `run` is called with meta tensors, tuples of tensors included.
    """
    if device.type != "cuda":
        return
    kind = (run, device, *map(_kind, arguments), *sorted(options.items()))
    if kind in _compiled:
        return
    _compiled.add(kind)
    calls: dict[str, tuple[Any, ...]] = {}

    def record(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **given: Any) -> None:
        signature, constexprs = describe(kernel, given)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        calls.setdefault(name, (kernel, grid, num_warps, num_stages, given))

    run(*map(_meta, arguments), launch=record, **options)
    if len(calls) < 2:
        return
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1)) as pool:
        for done in [pool.submit(_compile, device, *call) for call in calls.values()]:
            done.result()


def _compile(
    device: torch.device, kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, given: dict[str, Any]
) -> None:
    with torch.cuda.device(device):
        compiled = kernel.warmup(**given, grid=grid, num_warps=num_warps, num_stages=num_stages)
        load = getattr(compiled, "_init_handles", None)  # otherwise loaded at the launch
        if load is not None:
            load()


def _kind(x: Any) -> Any:
    """What of an argument may choose a kernel; lengths do by whether a chunk is short, numbers by their type alone."""
    if isinstance(x, Tensor):
        return x.dtype, x.ndim, x.shape[1] % 64 == 0 if x.ndim > 1 else None, x.shape[2:]
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    return type(x) if isinstance(x, float) else x


def _meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if isinstance(x, tuple):
        parts = [_meta(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x
