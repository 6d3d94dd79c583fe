"""A cache whose rows are independent requests: each row has its own length, and is filled and freed on its own.

Legend for shapes: S slots (rows), HK key/value heads, L tokens that a slot can hold, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer, StaticSlidingWindowLayer

from fla_swap.cache import StateLayer
from fla_swap.decoding import allocate
from fla_swap.errors import SwapError


class SlotLayer(CacheLayerMixin):
    """Keys and values [S, HK, L, K] of a layer that kept its attention; row s writes at its own length."""

    is_compileable = True

    def __init__(self, like: StaticLayer, lengths: Tensor):
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.keys, self.values, self.lengths = like.keys, like.values, lengths
        self.is_sliding = like.is_sliding
        self.is_initialized = True
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise SwapError("a slot layer is allocated when it is made")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One token per row."""
        assert self.keys is not None and self.values is not None
        index = self.lengths[:, None, None, None].expand(-1, key_states.shape[1], 1, key_states.shape[3])
        self.keys.scatter_(2, index, key_states)
        index = self.lengths[:, None, None, None].expand(-1, value_states.shape[1], 1, value_states.shape[3])
        self.values.scatter_(2, index, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]


class SlotCache(Cache):
    """The rows of a running server: states of the swapped layers, keys and values of the others.

    `lengths` int64 [S]: tokens that each row has seen, at a fixed address; `advance` after each step.
    """

    def __init__(self, model: nn.Module, slots: int, tokens: int):
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        stock = StaticCache(config=text, max_cache_len=tokens)
        sliding = [i for i, layer in enumerate(stock.layers) if isinstance(layer, StaticSlidingWindowLayer)]
        stock.layers = [StaticLayer(max_cache_len=tokens) if i in sliding else x for i, x in enumerate(stock.layers)]
        allocate(model, stock, slots)
        device = next(model.parameters()).device
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(self.lengths)
        layers: list[Any] = [self._layer(layer) for layer in stock.layers]
        super().__init__(layers=layers)
        self.tokens, self.rows = tokens, slots
        self.window = getattr(text, "sliding_window", None)
        all_alike = ("full_attention",) if self.window is None else ("sliding_attention",)
        self.kinds = tuple(dict.fromkeys(getattr(text, "layer_types", None) or all_alike))

    def _layer(self, layer: Any) -> Any:
        if isinstance(layer, StateLayer):
            layer.by_row = True
            return layer
        return SlotLayer(layer, self.lengths)

    @torch.no_grad()
    def fill(self, slot: int, prompt: Cache, tokens: int) -> None:
        """Put the state of a prompt of `tokens` tokens, computed alone (one row), into row `slot`."""
        for own, other in zip(self.layers, prompt.layers, strict=True):
            if isinstance(own, StateLayer):
                for name, tensor in own.state.items():
                    tensor[slot].copy_(other.state[name][0])  # type: ignore[union-attr]
            else:
                own.keys[slot, :, :tokens].copy_(other.keys[0, :, :tokens])  # type: ignore[union-attr, index]
                own.values[slot, :, :tokens].copy_(other.values[0, :, :tokens])  # type: ignore[union-attr, index]
        self.lengths[slot] = tokens

    def mask(self) -> Any:
        """bool [S, 1, 1, L] of the keys that each row's next token sees, itself included; one a kind of layer."""
        places = torch.arange(self.tokens, device=self.lengths.device)
        full = (places <= self.lengths[:, None])[:, None, None]
        near = full & (places > self.lengths[:, None] - (self.window or self.tokens))[:, None, None]
        masks = {kind: full if kind == "full_attention" else near for kind in self.kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def bytes_per_slot(self) -> int:
        """Memory of one row."""
        total = 0
        for layer in self.layers:
            own: Any = layer
            tensors = own.state.values() if isinstance(own, StateLayer) else (own.keys, own.values)
            total += sum(t.numel() * t.element_size() for t in tensors)
        return total // self.rows
