"""Calling a user's module: reading and replacing one argument by its `ArgPath`, and leaving the module as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.errors import SwapError
from fla_swap.types import ArgPath

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def leaves(args: Args, kwargs: Kwargs) -> list[tuple[ArgPath, Any]]:
    """Every argument, and instead of a tuple argument every item of it, with its place."""
    named: list[tuple[ArgPath, Any]] = [(ArgPath(position=i), v) for i, v in enumerate(args)]
    named += [(ArgPath(keyword=k), v) for k, v in kwargs.items()]
    found: list[tuple[ArgPath, Any]] = []
    for path, value in named:
        if isinstance(value, tuple | list):
            found += [(dataclasses.replace(path, item=i), item) for i, item in enumerate(value)]
        else:
            found.append((path, value))
    return found


def get_argument(path: ArgPath, args: Args, kwargs: Kwargs) -> Any:
    """The argument at `path`; KeyError or IndexError when the call has none there."""
    value = kwargs[path.keyword] if path.keyword is not None else args[path.position or 0]
    return value if path.item is None else value[path.item]


def set_argument(path: ArgPath, value: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The call with the argument at `path` replaced; the originals are not changed."""
    if path.item is not None:
        whole = dataclasses.replace(path, item=None)
        holder = list(get_argument(whole, args, kwargs))
        holder[path.item] = value
        return set_argument(whole, tuple(holder), args, kwargs)
    if path.keyword is not None:
        return args, {**kwargs, path.keyword: value}
    position = path.position or 0
    return (*args[:position], value, *args[position + 1 :]), dict(kwargs)


def fetch(path: ArgPath | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument that `path` points to in a call, or None when it is not passed."""
    if path is None:
        return None
    value = None
    if path.keyword is not None and path.keyword in kwargs:
        value = kwargs[path.keyword]
    elif path.position is not None and path.position < len(args):
        value = args[path.position]
    return value if value is None or path.item is None else value[path.item]


def joined_masks(pairs: Tensor | None, padding: Tensor | None, *, hides: bool) -> Tensor | None:
    """One mask of truth values (True is seen) made of one over pairs of tokens, [T, S], and one over the keys, [B, S]
    or [B, 1, 1, S].

    Both may be bool (true where a key is hidden if `hides`) or additive. Returns [B, S] for padding alone, else
    [B or 1, 1, T, S], where a token that would see nothing sees itself.
    """
    padding = padding if padding is None else padding.flatten(1)
    if pairs is None:
        return None if padding is None else _seen(padding, hides)
    seen = _seen(pairs, hides)[None, None]
    if padding is None:
        return seen
    seen = seen & _seen(padding, hides)[:, None, None, :]
    own = torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return seen | (own & ~seen.any(-1, keepdim=True))


def _seen(mask: Tensor, hides: bool) -> Tensor:
    """A mask as truth values, true where a key is seen."""
    if mask.dtype == torch.bool:
        return ~mask if hides else mask
    return mask > torch.finfo(mask.dtype).min / 2


def read_mask(mask: Any, hidden: Tensor, seen: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a model's attention mask says about the new tokens, as (valid, starts), bool [B, T] each, or None.

    Args:
        mask: None; [B, S], nonzero for tokens; or [B or 1, 1 or H, T, S], bool (True is seen) or additive. A token that
            does not see itself is padding; one that sees itself alone starts a document. (The first token after padding
            still sees what came before the padding; under a window no longer than the padding it sees itself alone.)
        hidden: [B, T, D].
        seen: tokens already in the state, an int or a tensor: query t stands at key min(seen, S − T) + t.
    """
    if mask is None:
        return None, None
    batch, tokens = hidden.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise SwapError(f"a swapped layer reads masks of 2 or 4 dimensions, got {type(mask).__name__}")
    room = mask.shape[-1] - tokens
    query = torch.arange(tokens, device=mask.device)
    key = query + (seen.clamp(max=room) if isinstance(seen, Tensor) else min(seen, room))
    if mask.dim() == 2:
        return (mask[:, key] != 0).expand(batch, tokens), None
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    valid = sees[:, query, key]
    starts = valid & (sees.sum(-1) == 1) & (key > 0)
    return valid.expand(batch, tokens), starts.expand(batch, tokens)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, use_cache: bool) -> Iterator[None]:
    """Eval mode without gradients, and `config.use_cache` set where there is one; all of it is put back afterwards.

    So are attributes and buffers that a forward pass sets (rotary frequencies that follow the length). PyTorch's own
    attention modules take their spelled-out path meanwhile, not the fused one that hides what they do.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = {m: m.training for m in model.modules()}
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    model.eval()
    try:
        if before is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]
        for module, attributes, buffers in states:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, mode in modes.items():
            module.training = mode
