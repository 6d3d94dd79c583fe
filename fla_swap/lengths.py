"""At which lengths a model is captured, and up to which its rotary frequencies hold (longrope, dynamic NTK)."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fla_swap.arguments import undisturbed
from fla_swap.model_inputs import Inputs

LONGEST = 2**18
_TRIED = 5


def rope_limit(model: nn.Module, inputs: Inputs, length: int) -> int | None:
    """The longest input for which the modules that turn positions into tables give what they give at `length`.

    Those are the modules without parameters that are called with the positions 0 … length − 1. None: they give the same
    up to 2¹⁸ tokens.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if any(_counts(t, length) for t in tree_leaves((args, kwargs))):
            calls.append((copy.deepcopy(module), args, kwargs))

    tables = [m for m in model.modules() if not any(True for _ in m.parameters())]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in tables]
    try:
        with undisturbed(model, use_cache=False):
            model(*inputs[0], **inputs[1])
    finally:
        for hook in hooks:
            hook.remove()
    found = [_limit_of(call, length) for call in calls]
    return min((f for f in found if f is not None), default=None)


def _counts(value: Any, length: int) -> bool:
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dim() > 0
    return whole and value.shape[-1] == length and bool((value == torch.arange(length, device=value.device)).all())


def _limit_of(call: tuple[nn.Module, Any, Any], length: int) -> int | None:
    wanted = _outputs(call, length, length)

    def same(tokens: int) -> bool:
        found = _outputs(call, length, tokens)
        return len(found) == len(wanted) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            for a, b in zip(found, wanted, strict=True)
        )

    if same(LONGEST):
        return None
    low, high = length, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same(middle) else (low, middle)
    return low


def _outputs(call: tuple[nn.Module, Any, Any], length: int, tokens: int) -> list[Tensor]:
    """What a copy of the module returns for `tokens` positions, cut to the first `length` of them."""
    module, args, kwargs = call

    def longer(value: Any) -> Any:
        if not _counts(value, length):
            return value
        return torch.arange(tokens, device=value.device, dtype=value.dtype).expand(*value.shape[:-1], tokens)

    fresh = copy.deepcopy(module)
    for hooks in (fresh._forward_pre_hooks, fresh._forward_hooks):
        hooks.clear()
    with torch.no_grad():
        returned = tree_leaves(fresh(*tree_map(longer, args), **tree_map(longer, kwargs)))
    found = [t for t in returned if isinstance(t, Tensor)]
    return [t.narrow(t.shape.index(tokens), 0, length) if tokens in t.shape else t for t in found]


def free_length(wanted: int, limit: int, taken: Collection[int]) -> int:
    """The first length from `wanted` on that is no size of the model; the last one up to `limit` if none is left."""
    up = wanted
    while up in taken:
        up += 1
    if up <= limit:
        return up
    down = min(wanted, limit)
    while down in taken and down > 2:
        down -= 1
    return down


def far_lengths(far: int, near: int, taken: Collection[int]) -> list[int]:
    """The lengths to capture at, best first, until the model takes one: `far`, below each of its sizes, `near`."""
    below = sorted({n - 1 for n in taken if near < n - 1 < far} - set(taken), reverse=True)
    halves = [n for n in (far // 2, far // 4, far // 8) if n > near and n not in taken]
    return [far, *sorted({*below[:_TRIED], *halves} - {far}, reverse=True), near]
