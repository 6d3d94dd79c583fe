"""Layers with a state of constant size in transformers' cache: how they run on it, and how `generate` prepares it."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fla_swap.cache import StateLayer, StateOwner, install_layer
from fla_swap.mixers import State


class StatefulLayer(nn.Module):
    """A layer of a model that may keep a state in the cache."""

    @property
    def state_owner(self) -> StateOwner | None:
        """What makes the state, or None when this layer keeps none."""
        raise NotImplementedError

    def cache_index(self) -> int:
        """The number of this layer in a cache."""
        raise NotImplementedError


def run_on_state(owner: StateOwner, layer: StateLayer | None, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run `owner` on hidden [B, T, D] and on the state that `layer` of a cache holds, which changes in place.

    A packed batch (`cu_seqlens` among the arguments) leaves no state behind.
    """
    if layer is None:
        return owner(hidden, **arguments)[0]
    if arguments["cu_seqlens"] is not None:
        layer.packed = True
        mixed, _ = owner(hidden, **arguments)
    else:
        mixed = _step(owner, layer, hidden, arguments)
    layer.advance(hidden.shape[1])
    return mixed


def _step(owner: StateOwner, layer: StateLayer, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    if layer.record_past:
        layer.record(hidden.shape[1], partial(_replay, owner, hidden, arguments))
    if not torch.is_grad_enabled():
        return owner(hidden, state=layer.state, **arguments)[0]
    # Backward needs the state as it was: work on a copy.
    before = None if layer.fresh else {n: t.clone() for n, t in layer.state.items()}
    mixed, after = owner(hidden, state=before, output_state=True, **arguments)
    assert after is not None
    for name, tensor in layer.state.items():
        tensor.copy_(after[name].detach())
    return mixed


@torch.no_grad()
def _replay(owner: StateOwner, hidden: Tensor, arguments: dict[str, Any], state: State, tokens: int) -> None:
    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        return value if value is None else value[:, :tokens]

    owner(cut(hidden), state=state, **{n: cut(v) for n, v in arguments.items()})


def prepare_cache(model: nn.Module, cache: Any, batch_size: int | None = None) -> None:
    """Put a state layer into `cache` for every layer that keeps a state; with `batch_size`, allocate it too."""
    for module in model.modules():
        owner = module.state_owner if isinstance(module, StatefulLayer) else None
        if owner is None:
            continue
        layer = install_layer(cache, cast(StatefulLayer, module).cache_index())
        if batch_size is not None:
            like = next(module.parameters())
            layer.prepare(owner, batch_size, like.device, like.dtype)


class GeneratesWithStates:
    """Mixed in before a model's own class: `generate` finds a cache that holds states."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        """`generate` has its cache: put the state layers in before anything asks the cache what it can do."""
        result = cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            prepare_cache(cast(nn.Module, self), cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return result
