"""Values on the way into a node that is run: half precision computed in fp32, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fla_swap.errors import NoValue

_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def levels_closed() -> Iterator[None]:
    """Close, after an error, the levels of `torch.vmap` that nodes of a graph have opened."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    before = functorch.maybe_current_level() or 0
    try:
        yield
    finally:
        while (functorch.maybe_current_level() or 0) > before:
            functorch._vmap_decrement_nesting()


def moved(target: Any, args: Any, kwargs: Any) -> Any:
    """A movement of numbered entries. They lie in memory otherwise than the model's values: a view may need a copy."""
    target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
    return target(*args, **kwargs)


def stand_in(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return torch.zeros(val.shape, dtype=val.dtype) if isinstance(val, Tensor) else val


def upcast(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        if value.is_meta or isinstance(value, FakeTensor):
            raise NoValue(name)
        value = value.detach().cpu()
        return value.float() if value.dtype in _HALF else value.clone()
    return value


def no_half(value: Any) -> Any:
    """Arguments with half-precision dtypes replaced by fp32, and devices by the CPU."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALF else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, dict):
        return {k: no_half(v) for k, v in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return type(value)(no_half(v) for v in value)
    return value
