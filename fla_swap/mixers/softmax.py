"""Softmax attention rebuilt from an `AttentionSite` alone: the proof that a site was understood (1706.03762)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.mixers.base import State, read_ref, wide
from fla_swap.mixers.heads import HeadsConfig, HeadsMixer
from fla_swap.types import AttentionSite, Mask

KeyValueUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(HeadsConfig):
    """Softmax attention with everything that a site can state. All of it is taken from the site on a swap.

    `memory_size`: width of what keys and values are read from in a cross-attention; None: the hidden states.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"rope_base": 10000.0}

    scale: float | None = None
    mask: Mask | None = None
    softcap: float | None = None
    sinks: bool | None = None
    alibi: tuple[float, ...] | None = None
    memory_size: int | None = None


class Softmax(HeadsMixer):
    """Plain softmax attention; keys and values live in transformers' own cache."""

    name = "softmax"
    config_class = SoftmaxConfig
    mask_kinds = ("causal", "window", "chunked", "bidirectional", "local")
    uses_kv_cache = True
    config: SoftmaxConfig

    def __init__(self, config: SoftmaxConfig):
        super().__init__(config)
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.mask = config.mask or Mask(kind="causal")
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        if config.memory_size is not None:
            self.k_proj = nn.Linear(config.memory_size, self.k_proj.out_features, bias=self.k_proj.bias is not None)
            self.v_proj = nn.Linear(config.memory_size, self.v_proj.out_features, bias=self.v_proj.bias is not None)

    @classmethod
    def site_facts(cls, site: AttentionSite) -> dict[str, Any]:
        own = {
            "scale": site.scale,
            "mask": site.mask,
            "softcap": site.softcap,
            "sinks": site.sinks is not None,
            "alibi": site.alibi,
            "memory_size": site.memory_size if site.kind == "cross" else None,
        }
        return super().site_facts(site) | own

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        super().load_attention(site, weights)
        if self.sinks is not None and site.sinks is not None:
            self.sinks.copy_(read_ref(weights, site.sinks))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        output_state: bool = False,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        kv_update: KeyValueUpdate | None = None,
        memory: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """As `TokenMixer.forward`; keys and values go through `kv_update` (a cache), not through `state`.

        `attention_mask`: bool (True is seen) or additive [B or 1, 1 or H, T, S], when the model made one. Without it
        the mask is built from the config, `valid`, and the documents that `starts` or `cu_seqlens` tell apart.
        `memory` [B, S, memory_size]: keys and values come from it (cross-attention), all of it seen but where
        `memory_valid` [B, S] is False.
        """
        heads = self.to_heads(*self.project(hidden_states, memory), positions, cos_sin)
        q, k, v = (x.transpose(1, 2) for x in heads)
        if kv_update is not None:
            k, v = kv_update(k, v)
        if memory is not None and attention_mask is None:
            attention_mask = None if memory_valid is None else memory_valid[:, None, None, :]
        elif attention_mask is None:
            documents = document_numbers(hidden_states, starts, cu_seqlens)
            attention_mask = self._mask(q.shape[2], k.shape[2], q.device, valid, documents)
        else:
            attention_mask = attention_mask[..., : k.shape[2]]
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = self._attend(q, k, v, attention_mask)
        return self.o_proj(self.finish(mixed.transpose(1, 2), hidden_states).flatten(2)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        if config.softcap is None and config.alibi is None and self.sinks is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        scores = wide(q @ k.transpose(-1, -2)) * self.scale
        if config.softcap is not None:
            scores = torch.tanh(scores / config.softcap) * config.softcap
        if config.alibi is not None:
            slopes = torch.tensor(config.alibi, device=q.device, dtype=torch.float32)
            keys = torch.arange(k.shape[2], device=q.device)
            distance = keys[None, :] - (keys[-q.shape[2] :, None])
            scores = scores + slopes[:, None, None] * distance
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
            )
        if self.sinks is not None:
            sinks = wide(self.sinks)[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return weights.to(v.dtype) @ v

    def _mask(
        self, queries: int, keys: int, device: torch.device, valid: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        """bool [B or 1, 1, T, S]; a padded query sees itself, so that no row is empty."""
        j = torch.arange(keys, device=device)[None, :]
        i = torch.arange(keys - queries, keys, device=device)[:, None]
        seen = torch.ones_like(j <= i) if self.mask.kind in ("bidirectional", "local") else j <= i
        if self.mask.kind == "local" and self.mask.window is not None:
            seen = (i - j).abs() < self.mask.window
        if self.mask.kind == "window" and self.mask.window is not None:
            seen = seen & (i - j < self.mask.window)
        seen = seen[None, None]
        if self.mask.kind == "chunked" and self.mask.window is not None:
            # Chunks count from the first token that is no padding, as transformers' masks do.
            first = 0 if valid is None else valid.int().argmax(1)[:, None, None, None]
            size = self.mask.window
            seen = seen & ((i - first).div(size, rounding_mode="floor") == (j - first).div(size, rounding_mode="floor"))
        if documents is not None:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        if valid is not None:
            seen = (seen & valid[:, None, None, :]) | (i == j)
        return seen


def document_numbers(hidden: Tensor, starts: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """int [B, T]: which document each token belongs to, from start marks or packed borders; None for one document."""
    if cu_seqlens is not None:
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        return torch.searchsorted(cu_seqlens, tokens.to(cu_seqlens.dtype), right=True)[None]
    return None if starts is None else starts.cumsum(1)
