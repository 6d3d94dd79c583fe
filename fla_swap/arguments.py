"""Calling a user's module: reading and replacing one argument by its `ArgPath`, and leaving the module as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.errors import SwapError
from fla_swap.types import ArgPath, AttentionSite, Mask
from fla_swap.wrappers import config_of

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How transformers passes the borders of packed sequences to an attention that can use them."""

HIDDEN = -1e4
"""A number added to a score hides the key when it is this small or smaller; fp16 and bf16 still hold it."""


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


def fetch(path: ArgPath | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str] = ()) -> Any:
    """The argument that `path` points to in a call, or None when it is not passed.

    `names` of the positional parameters: with them an argument is found by position or by keyword, however it comes.
    """
    if path is None:
        return None
    value = None
    position = path.position
    keyword = path.keyword
    if keyword is None and position is not None and position < len(names):
        keyword = names[position]
    elif keyword in names:
        position = names.index(keyword)
    if keyword is not None and keyword in kwargs:
        value = kwargs[keyword]
    elif position is not None and position < len(args):
        value = args[position]
    return value if value is None or path.item is None else value[path.item]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """What a forward takes: `names` of its positional parameters, its `keywords`, and whether it takes others."""

    names: tuple[str, ...]
    keywords: frozenset[str]
    any_position: bool
    any_keyword: bool

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Signature:
        parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return cls(
            names=tuple(p.name for p in parameters if p.kind in positional),
            keywords=frozenset(p.name for p in parameters if p.kind in named),
            any_position=any(p.kind is p.VAR_POSITIONAL for p in parameters),
            any_keyword=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    def name(self, path: ArgPath) -> str:
        """The parameter that `path` goes to; for one without a name its position."""
        if path.keyword is not None:
            return path.keyword
        position = path.position or 0
        return self.names[position] if position < len(self.names) else str(position)

    def tensors(self, args: Args, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a call by `name`, of a tuple the first."""
        given = [(self.names[i] if i < len(self.names) else str(i), value) for i, value in enumerate(args)]
        found = {}
        for name, value in (*given, *kwargs.items()):
            items = value if isinstance(value, tuple | list) else (value,)
            for item in items:
                if isinstance(item, Tensor):
                    found.setdefault(name, item)
        return found

    def check(self, where: str, args: Args, kwargs: Mapping[str, Any], seen: Collection[str] | None) -> None:
        """Refuse what the forward of `where` would have refused, and tensors of which nobody knows what it does.

        Raises TypeError for arguments that it does not take, SwapError for a tensor that is not among those `seen`.
        Nothing is checked where those were not noted (None).
        """
        if seen is None:
            return
        if len(args) > len(self.names) and not self.any_position:
            raise TypeError(f"{where} takes {len(self.names)} positional arguments, got {len(args)}")
        for name in kwargs:
            if not (self.any_keyword or name in self.keywords or name in seen or name in PACKED):
                raise TypeError(f"{where} got an unexpected keyword argument {name!r}")
        for name, value in self.tensors(args, kwargs).items():
            counts = value.dim() == 0  # what a trainer passes along (how many tokens a step has), no mask
            if not counts and name not in seen and name not in PACKED:
                raise SwapError(
                    f"{where} is called with a tensor {name} {list(value.shape)}; when the model was inspected that "
                    f"was absent or None (the tensors were {sorted(seen)}), so what it does is not known. Inspect the "
                    "model again with example_inputs that make it pass one (a mask: with padding)"
                )


def check_unmasked(site: AttentionSite, tokens: int) -> None:
    """Raises SwapError for a call without a mask in which the module that stood here hid something else."""
    inside = site.call.unmasked == "causal" and tokens <= (site.mask.window or tokens)
    if site.call.unmasked in (None, "own") or tokens == 1 or inside:
        return
    does = "hides what comes later alone" if site.call.unmasked == "causal" else "hides something else, or fails"
    raise SwapError(
        f"{site.fqn} is called without a mask, for {tokens} tokens; it was inspected under a {site.mask.kind} mask "
        f"that is an argument, and without it the module that stood here {does}: pass the mask, or inspect the model "
        "again with example_inputs as it is called"
    )


def check_zero(site: AttentionSite, name: str, value: Any) -> None:
    """Raises SwapError where an argument that was zero everywhere when the model was inspected is not.

    In compiled code that is an assertion on the device.
    """
    if not isinstance(value, Tensor):
        return
    message = (
        f"{site.fqn} is called with a tensor {name} {list(value.shape)} that is not zero; when the model was inspected "
        "it was zero everywhere, so what it does is not known. Inspect the model again with example_inputs in which it "
        "is not"
    )
    zero = ~value.any()
    if torch.compiler.is_compiling():
        torch._assert_async(zero, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(zero):
        raise SwapError(message)


def joined_masks(pairs: Tensor | None, padding: Tensor | None, *, hides: bool) -> Tensor | None:
    """One mask of truth values (True is seen) made of one over pairs of tokens, [T, S], and one over the keys, [B, S]
    or [B, 1, 1, S]; alone it may also be [B, 1, T, S].

    Both may be bool (true where a key is hidden if `hides`) or additive. Returns [B, S] for padding alone, else
    [B or 1, 1, T, S], where a token that would see nothing sees itself.
    """
    if pairs is None and padding is not None and padding.dim() == 4 and padding.shape[-2] > 1:
        return _seen(padding, hides)
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
    return mask > HIDDEN


def narrowed(mask: Tensor, own: Mask, tokens: int, seen: Any) -> Tensor:
    """A mask [B or 1, 1 or H, T or 1, S], bool (True is seen) or additive, without what `own` hides of the keys.

    `tokens` T new ones; they stand where `read_mask` says, after the `seen` ones.
    """
    if own.kind == "bidirectional":
        return mask
    room = mask.shape[-1] - tokens
    first = seen.clamp(max=room) if isinstance(seen, Tensor) else min(seen, room)
    i = torch.arange(tokens, device=mask.device)[:, None] + first
    j = torch.arange(mask.shape[-1], device=mask.device)[None]
    sees = (i - j).abs() < (own.window or mask.shape[-1]) if own.kind == "local" else j <= i
    if own.kind == "window" and own.window is not None:
        sees = sees & (i - j < own.window)
    if own.kind == "chunked" and own.window is not None:
        sees = sees & (i // own.window == j // own.window)
    return mask & sees if mask.dtype == torch.bool else mask.masked_fill(~sees, torch.finfo(mask.dtype).min)


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
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > HIDDEN
    valid = sees[:, query, key]
    starts = valid & (sees.sum(-1) == 1) & (key > 0)
    return valid.expand(batch, tokens), starts.expand(batch, tokens)


def _is_small(buffer: Tensor) -> bool:
    return buffer.numel() <= 2**24 and not buffer.is_inference()


@contextlib.contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Put the random number generators of the CPU and of the model's GPUs back to where they were."""
    gpus = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(g for g in gpus if g is not None)):
        yield


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, use_cache: bool) -> Iterator[None]:
    """Eval mode without gradients, and `config.use_cache` set where there is one (turned off: in the configs of the
    model's parts too); all of it is put back afterwards.

    So are attributes and buffers that a forward pass sets or writes (rotary frequencies that follow the length; of
    buffers with more than 2²⁴ entries only which they are), and the state of the random numbers. PyTorch's own
    attention modules take their spelled-out path meanwhile, not the fused one that hides what they do.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = {m: m.training for m in model.modules()}
    found = [config_of(model), *(getattr(m, "config", None) for m in model.modules() if not use_cache)]
    configs = {id(c): (c, c.use_cache) for c in found if getattr(c, "use_cache", None) is not None}
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    values = [(b, b._version, b.clone()) for b in model.buffers() if _is_small(b)]
    model.eval()
    try:
        for config, _ in configs.values():
            config.use_cache = use_cache
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), random_numbers_kept(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
        torch.backends.mha.set_fastpath_enabled(fused)
        for config, before in configs.values():
            config.use_cache = before
        for module, attributes, buffers in states:
            for name in set(vars(module)) - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, mode in modes.items():
            module.training = mode
