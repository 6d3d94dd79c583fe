"""How an owner module is called and what it returns: observed by hooks in eager calls, never guessed from names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.arguments import Args, Kwargs, leaves, undisturbed
from fla_swap.patterns.mask import expected
from fla_swap.types import ArgPath, AttentionSite, CallContract, Rope


@dataclass(kw_only=True)
class CallRecord:
    """One observed call of an owner: what it was given and what it returned."""

    args: Args
    kwargs: Kwargs
    output: Any = None


@dataclass(kw_only=True)
class CacheRecord:
    """Where an owner got the cache from, and the number with which it updated it."""

    path: ArgPath | None = None
    index: int | None = None


@dataclass(kw_only=True)
class _Stack:
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _watched(model: nn.Module, owners: Iterable[str], before: Any, after: Any, *, use_cache: bool) -> Iterator[None]:
    handles = []
    try:
        for name in owners:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        with undisturbed(model, use_cache=use_cache):
            yield
    finally:
        for handle in handles:
            handle.remove()


def record_calls(model: nn.Module, owners: Iterable[str], inputs: tuple[Args, Kwargs]) -> dict[str, CallRecord]:
    """Run the model once and keep what each owner was called with. An owner that was not called is missing."""
    records: dict[str, CallRecord] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            records.setdefault(name, CallRecord(args=args, kwargs=dict(kwargs)))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if records[name].output is None:
                records[name].output = output

        return hook

    with _watched(model, list(owners), before, after, use_cache=False):
        model(*inputs[0], **inputs[1])
    return records


def record_cache(model: nn.Module, owners: Iterable[str], inputs: tuple[Args, Kwargs]) -> dict[str, CacheRecord]:
    """Run the model once with a cache that notes who updates it, and under which number."""
    import transformers

    found: dict[str, CacheRecord] = {}
    stack = _Stack()

    class Sentinel(transformers.DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if stack.names:
                found.setdefault(stack.names[-1], CacheRecord()).index = layer_idx
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    config = getattr(model, "config", None)
    sentinel = Sentinel(config=config) if config is not None else Sentinel()

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stack.names.append(name)
            for path, value in leaves(args, kwargs):
                if value is sentinel:
                    found.setdefault(name, CacheRecord()).path = path

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stack.names.pop()

        return hook

    kwargs = {**inputs[1], "past_key_values": sentinel, "use_cache": True}
    with _watched(model, list(owners), before, after, use_cache=True):
        model(*inputs[0], **kwargs)
    return found


def derive_contract(
    site: AttentionSite, record: CallRecord, valid: Tensor, positions: Tensor | None, cache: CacheRecord | None
) -> CallContract | str:
    """The contract that the observed call shows, or a sentence saying what could not be told.

    `valid` bool [B, T] and `positions` int [B, T] are what the model was given; arguments are matched by value.
    """
    batch, length = valid.shape
    found = leaves(record.args, record.kwargs)
    size = (batch, length, site.hidden_size)
    hidden = [p for p, v in found if isinstance(v, Tensor) and v.is_floating_point() and tuple(v.shape) == size]
    if len(hidden) != 1:
        return f"{len(hidden)} arguments have the shape of the hidden state {size}"
    places = _outputs(record.output, size)
    if isinstance(places, str):
        return places
    outputs, index = places
    contract = CallContract(hidden=hidden[0], outputs=outputs, output_index=index)
    facts: dict[str, ArgPath] = {}
    for path, value in found:
        if isinstance(value, Tensor) and path != hidden[0]:
            name = _meaning(value, site, valid, positions)
            if name is not None:
                facts.setdefault(name, path)
            elif _looks_like_a_mask(value, length):
                where = path.keyword or f"number {path.position}"
                return (
                    f"argument {where} {tuple(value.shape)} is a mask, but not the site's own with the padding hidden"
                )
    if ("cos" in facts) != ("sin" in facts):
        facts.pop("cos", None)
        facts.pop("sin", None)
    contract = dataclasses.replace(contract, **facts)
    if cache is not None:
        contract = dataclasses.replace(contract, cache=cache.path, cache_index=cache.index)
    return contract


def _outputs(output: Any, size: tuple[int, ...]) -> tuple[int | None, int] | str:
    if isinstance(output, Tensor):
        return (None, 0) if tuple(output.shape) == size else f"it returns {tuple(output.shape)}, expected {size}"
    if not isinstance(output, tuple | list):
        return f"it returns a {type(output).__name__}, expected a tensor or a tuple"
    places = [i for i, v in enumerate(output) if isinstance(v, Tensor) and tuple(v.shape) == size]
    if len(places) != 1:
        return f"{len(places)} of its {len(output)} outputs have the shape {size}"
    return len(output), places[0]


def _meaning(value: Tensor, site: AttentionSite, valid: Tensor, positions: Tensor | None) -> str | None:
    if positions is not None and _are_positions(value, positions):
        return "positions"
    if site.rope is not None and value.is_floating_point() and positions is not None:
        name = _table(value, site.rope, positions)
        if name is not None:
            return name
    return "mask" if _is_mask(value, site, valid) else None


def _are_positions(value: Tensor, positions: Tensor) -> bool:
    if value.is_floating_point() or value.dtype == torch.bool or value.dim() > 2:
        return False
    if value.shape[-1:] != positions.shape[-1:] or (value.dim() == 2 and value.shape[0] not in (1, len(positions))):
        return False
    return torch.equal(value.expand(positions.shape).long(), positions.to(value.device))


def _looks_like_a_mask(value: Tensor, length: int) -> bool:
    if value.shape[-1:] != (length,) or value.dim() < 2:
        return False
    return value.dtype == torch.bool or (value.dim() == 4 and value.shape[-2] == length)


def _is_mask(value: Tensor, site: AttentionSite, valid: Tensor) -> bool:
    batch, length = valid.shape
    if value.is_complex() or value.shape[-1:] != (length,):
        return False
    seen = value if value.dtype == torch.bool else value > -1e4 if value.is_floating_point() else value > 0
    if value.dim() == 2:
        return not value.is_floating_point() and torch.equal(seen.expand(batch, length), valid)
    if value.dim() != 4 or value.shape[-2] != length:
        return False
    padding = valid.int().argmax(1).tolist()
    wanted = torch.stack([expected(site.mask, length, start) for start in padding])[:, None].to(valid.device)
    wanted = wanted & valid[:, None, None, :]
    rows = valid[:, None, :, None]
    return bool(((seen == wanted) | ~rows).all())


def _table(value: Tensor, rope: Rope, positions: Tensor) -> str | None:
    """ "cos" or "sin" when the value is that table of the site's own frequencies, laid out as the style says."""
    if value.dim() < 2 or value.shape[-1] != 2 * len(rope.inv_freq) or value.shape[-2] != positions.shape[1]:
        return None
    freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * freq
    angles = torch.cat((angles, angles), -1) if rope.style == "half" else angles.repeat_interleave(2, -1)
    tolerance = 1e-4 + 1e-6 * positions.shape[1] if value.dtype in (torch.float32, torch.float64) else 2e-2
    try:
        value = value.float().to(positions.device).expand(angles.shape)
    except RuntimeError:
        return None
    for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
        if float((value - table * rope.attention_scaling).abs().max()) < tolerance * rope.attention_scaling:
            return name
    return None
