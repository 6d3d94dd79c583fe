"""Constant-size state inside transformers' Cache: one `StateLayer` stands where a key/value layer stood.

To the model around it a `StateLayer` looks like the layer that it replaced (lengths, mask sizes, sliding or not), so
masks and positions come out as before; what it holds is the mixer's state, whose size does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from fla_swap.errors import SwapError
from fla_swap.mixers import State

Replay = Callable[[State, int], None]


class StateOwner(Protocol):
    """What a state belongs to: a mixer, or a block that has more state than its mixer."""

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State: ...

    def __call__(self, hidden_states: Tensor, /, **arguments: Any) -> tuple[Tensor, State | None]: ...


@dataclass(frozen=True)
class Call:
    """A forward call that may have to be undone: its length, and how to run its first n tokens again on a state."""

    length: int
    replay: Replay


class StateLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state of one mixer (named tensors, batch first) and the number of tokens it has seen.

    `count` is a tensor in a static cache (so that a compiled step does not depend on it) and an int elsewhere.
    `shared`: the model has a linear layer of its own beside the attention, whose states this layer keeps as the stock
    layer did (Falcon-H1); such a layer cannot roll back. In the place of a linear layer of the model's own (`alone`) it
    says, as that did, whether there is a state. `by_row`: the rows are requests of their own with lengths of
    their own, and a mask says nothing about this layer.
    """

    def __init__(self, stock: CacheLayerMixin | LinearAttentionLayer):
        LinearAttentionLayer.__init__(self, number_of_states=getattr(stock, "number_of_states", 1))
        CacheLayerMixin.__init__(self)
        self.stock = stock
        linear = isinstance(stock, LinearAttentionLayer)
        self.shared = linear and isinstance(stock, CacheLayerMixin)
        self.alone = linear and not self.shared
        self.is_sliding: bool = getattr(stock, "is_sliding", False)
        self.is_compileable = stock.is_compileable
        self.state: State = {}
        self.counts_on_device = isinstance(stock, StaticLayer) and not isinstance(stock, StaticSlidingWindowLayer)
        self.count: Any = 0
        self.fresh = True
        self.packed = self.by_row = False
        self.counting = True
        self.calls: list[Call] = []
        self.snapshot: State = {}
        self.settled = True

    def prepare(self, owner: StateOwner, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate the zero state, at addresses that stay the same from then on. Does nothing the second time."""
        if self.is_initialized:
            return
        self.state = owner.init_state(batch_size, device=device, dtype=dtype)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        if self.counts_on_device:
            self.count = torch.zeros((), dtype=torch.long, device=device)
        if not torch.compiler.is_dynamo_compiling():
            for tensor in (*self.state.values(), *([self.count] if self.counts_on_device else [])):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count `tokens` more (negative: fewer)."""
        if not self.counting:
            return
        if self.counts_on_device:
            self.count.add_(tokens)
        else:
            self.count = self.count + tokens
        self.fresh = False
        if self.alone:
            self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    # What transformers asks of every layer.

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if self.shared and not args:
            return LinearAttentionLayer.lazy_initialization(self, **kwargs)
        raise SwapError("this layer holds a mixer's state, not keys and values; `prepare` allocates it")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.shared:
            raise SwapError(
                "keys and values reached a layer that holds a mixer's state: the model keeps its attention and its "
                "linear layer in one cache layer, and only the linear one was swapped: leave it out, or use no cache"
            )
        raise SwapError(
            "keys and values reached a layer that holds a mixer's state: this cache was filled by a swapped model "
            "and is now used with another one; start a new cache"
        )

    def get_seq_length(self) -> Any:
        return self.count if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.stock.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask would cover had the stock layer stayed here."""
        if isinstance(self.stock, StaticSlidingWindowLayer):
            self.stock.cumulative_length_int = self.count
            return self.stock.get_mask_sizes(query_length)
        if isinstance(self.stock, DynamicSlidingWindowLayer):
            self.stock.cumulative_length = self.count
            return self.stock.get_mask_sizes(query_length)
        if isinstance(self.stock, StaticLayer):
            return self.stock.get_mask_sizes(query_length)
        return self.count + query_length, 0

    def reset(self) -> None:
        """Back to zero, in place."""
        if self.shared:
            LinearAttentionLayer.reset(self)
        for tensor in self.state.values():
            tensor.zero_()
        if self.counts_on_device and self.is_initialized:
            self.count.zero_()
        else:
            self.count = 0
        self.fresh, self.packed = True, False
        if self.alone:
            self.has_previous_state = dict.fromkeys(self.has_previous_state, False)
        self.forget_calls()

    def offload(self) -> None:
        self.state = {n: t.to("cpu", non_blocking=True) for n, t in self.state.items()}

    def prefetch(self) -> None:
        self.state = {n: t.to(self.device, non_blocking=True) for n, t in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b becomes the old row beam_idx[b], at the same addresses."""
        if self.shared:
            LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        for tensor in self.state.values():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        self.forget_calls()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda t: t[indices])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = {n: change(t) for n, t in self.state.items()}
        if self.state:
            self.batch_size = next(iter(self.state.values())).shape[0]
        for own in (self.conv_states, self.recurrent_states):
            own.update({n: change(t) for n, t in own.items() if t is not None})
        self.forget_calls()

    # Rollback: after `activate_past_recording`, the state at some moment and the calls since then are kept. The moment
    # moves on with the first call after a `crop`, so that two crops in a row also work.

    @property
    def is_croppable(self) -> bool:
        return not self.shared

    def record(self, length: int, replay: Replay) -> None:
        """Before a call that will change the state: remember the state and how to repeat the call."""
        if self.settled:
            self.calls = []
            self.snapshot = {n: t.clone() for n, t in self.state.items()}
            self.settled = False
        self.calls.append(Call(length, replay))

    def forget_calls(self) -> None:
        self.calls, self.snapshot, self.settled = [], {}, True

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last tokens: restore the remembered state and run the tokens that stay again.

        `tokens_to_remove` is negative (transformers' convention; a positive number is a length to crop to), and 0
        accepts everything so far. SwapError when those tokens were not recorded.
        """
        if self.shared:
            raise SwapError("a cache layer that also holds the state of the model's own linear layer cannot be cropped")
        tokens_to_remove = int(tokens_to_remove)  # generate may pass a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - int(self.count), 0)
        self.settled = True
        if tokens_to_remove == 0:
            return
        recorded = sum(call.length for call in self.calls)
        left = recorded + tokens_to_remove
        if left < 0:
            raise SwapError(
                f"crop({tokens_to_remove}): a linear layer can undo only what was recorded since "
                f"`activate_past_recording` or the last crop, {recorded} tokens; run the shorter sequence anew"
            )
        for name, tensor in self.snapshot.items():
            self.state[name].copy_(tensor)
        staying = []
        for call in self.calls:
            length = min(call.length, left - sum(c.length for c in staying))
            if length:
                call.replay(self.state, length)
                staying.append(Call(length, call.replay))
        self.calls = staying
        self.advance(tokens_to_remove)


def state_layer(cache: Any, index: int, owner: StateOwner, hidden_states: Tensor) -> StateLayer:
    """The state of layer `index` in `cache`, put there and allocated the first time.

    Raises:
        SwapError: the cache is of a kind that cannot hold states, or this layer already holds keys and values.
    """
    layer = install_layer(cache, index)
    layer.prepare(owner, hidden_states.shape[0], hidden_states.device, hidden_states.dtype)
    if layer.packed:
        raise SwapError(
            f"layer {index}: the cache was filled by a packed batch (cu_seq_lens_q), which leaves no state to go on "
            "from; pass use_cache=False there, or prefill without packing"
        )
    return layer


def install_layer(cache: Any, index: int) -> StateLayer:
    """Put a `StateLayer` at `index` of `cache` (or find it there); its state is allocated by the first call."""
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, Cache):
        raise SwapError(f"a swapped layer needs a transformers Cache, got {type(cache).__name__}")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[abstract]
    layer = cache.layers[index]
    if not isinstance(layer, StateLayer):
        layer = _replacement(layer, index)
        cache.layers[index] = layer
    return layer


def _replacement(stock: Any, index: int) -> StateLayer:
    if type(stock) is LinearAttentionLayer:
        if any(stock.has_previous_state.values()):
            raise SwapError(
                f"cache layer {index} already holds a state of the model before the swap; start a new cache"
            )
        return StateLayer(stock)
    if not isinstance(stock, (DynamicLayer, StaticLayer)):
        raise SwapError(
            f"cache layer {index} is a {type(stock).__name__}; states can replace only dynamic and static layers, and "
            "linear ones"
        )
    if stock.is_initialized and int(stock.get_seq_length()) > 0:
        raise SwapError(
            f"cache layer {index} already holds keys and values of the model before the swap; start a new cache"
        )
    stock.keys = stock.values = None
    stock.is_initialized = False
    return StateLayer(stock)


def state_bytes(cache: Cache) -> int:
    """Bytes that the mixers' states take in `cache`: independent of the sequence length."""
    layers = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
    return sum(t.numel() * t.element_size() for layer in layers for t in layer.state.values())
