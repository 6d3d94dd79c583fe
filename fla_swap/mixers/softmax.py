"""Softmax attention rebuilt from an `AttentionSite` alone: the proof that a site was understood (1706.03762)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.mixers.base import (
    HeadNorm,
    MixerConfig,
    State,
    TokenMixer,
    apply_rope,
    copy_linear,
    positions_like,
    read_projection,
    read_ref,
    rope_tables,
)
from fla_swap.types import AttentionSite, Mask, Norm

KeyValueUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MixerConfig):
    """Softmax attention with everything that a site can state. All of it is taken from the site on a swap."""

    scale: float | None = None
    mask: Mask | None = None
    softcap: float | None = None
    sinks: bool | None = None
    alibi: tuple[float, ...] | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rope: bool | None = None
    q_bias: bool | None = None
    k_bias: bool | None = None
    v_bias: bool | None = None
    o_bias: bool | None = None


class Softmax(TokenMixer):
    """Plain softmax attention; keys and values live in transformers' own cache."""

    name = "softmax"
    config_class = SoftmaxConfig
    mask_kinds = ("causal", "window", "chunked", "prefix", "bidirectional")
    uses_kv_cache = True
    config: SoftmaxConfig

    def __init__(self, config: SoftmaxConfig):
        super().__init__(config)
        assert config.hidden_size and config.num_heads and config.head_dim
        kv_heads = config.num_kv_heads or config.num_heads
        v_head_dim = config.v_head_dim or config.head_dim
        self.heads, self.kv_heads = config.num_heads, kv_heads
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        self.mask = config.mask or Mask(kind="causal")
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_heads * config.head_dim, bias=bool(config.q_bias))
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=bool(config.k_bias))
        self.v_proj = nn.Linear(hidden, kv_heads * v_head_dim, bias=bool(config.v_bias))
        self.o_proj = nn.Linear(config.num_heads * v_head_dim, hidden, bias=bool(config.o_bias))
        self.q_norm = HeadNorm(config.q_norm, config.num_heads, config.head_dim) if config.q_norm else None
        self.k_norm = HeadNorm(config.k_norm, kv_heads, config.head_dim) if config.k_norm else None
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        facts: dict[str, Any] = {
            "scale": site.scale,
            "mask": site.mask,
            "softcap": site.softcap,
            "sinks": site.sinks is not None,
            "alibi": site.alibi,
            "q_norm": site.q_norm,
            "k_norm": site.k_norm,
            "norm_after_rope": site.norm_after_rope,
            "q_bias": site.q.bias is not None,
            "k_bias": site.k.bias is not None,
            "v_bias": site.v.bias is not None,
            "o_bias": site.o.bias is not None,
        }
        return dataclasses.replace(config, **{n: v for n, v in facts.items() if getattr(config, n) is None})

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        for own, projection in (
            (self.q_proj, site.q),
            (self.k_proj, site.k),
            (self.v_proj, site.v),
            (self.o_proj, site.o),
        ):
            copy_linear(own, *read_projection(weights, projection))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.load(weights)
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
    ) -> tuple[Tensor, State | None]:
        """As `TokenMixer.forward`; keys and values go through `kv_update` (a cache), not through `state`.

        `attention_mask`: bool (True is seen) or additive [B or 1, 1 or H, T, S], when the model made one. Without it the mask is
        built from the config, `valid`, and the documents that `starts` or `cu_seqlens` tell apart.
        """
        q, k, v = self._heads(hidden_states, positions, cos_sin)
        if kv_update is not None:
            k, v = kv_update(k, v)
        if attention_mask is None:
            documents = document_numbers(hidden_states, starts, cu_seqlens)
            attention_mask = self._mask(q.shape[2], k.shape[2], q.device, valid, documents)
        else:
            attention_mask = attention_mask[..., : k.shape[2]]
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = self._attend(q, k, v, attention_mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, positions: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None):
        """q [B, H, T, K], k [B, HK, T, K], v [B, HK, T, V]: projected, normed, rotated."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if not self.config.norm_after_rope:
            q, k = self._norm(q, k)
        rope = self.config.rope
        if rope is not None:
            if cos_sin is None:
                where = positions_like(x) if positions is None else positions
                cos_sin = rope_tables(rope, where, torch.float32)
            q, k = apply_rope(q, *cos_sin, rope.style), apply_rope(k, *cos_sin, rope.style)
        if self.config.norm_after_rope:
            q, k = self._norm(q, k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        if config.softcap is None and config.alibi is None and self.sinks is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        if config.softcap is not None:
            scores = torch.tanh(scores / config.softcap) * config.softcap
        if config.alibi is not None:
            slopes = torch.tensor(config.alibi, device=q.device, dtype=torch.float32)
            keys = torch.arange(k.shape[2], device=q.device)
            distance = keys[None, :] - (keys[-q.shape[2] :, None])
            scores = scores + slopes[:, None, None] * distance
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        if self.sinks is not None:
            sinks = self.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
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
        seen = (j <= i) if self.mask.kind != "bidirectional" else torch.ones_like(j <= i)
        if self.mask.kind == "window" and self.mask.window is not None:
            seen = seen & (i - j < self.mask.window)
        if self.mask.kind == "chunked" and self.mask.window is not None:
            seen = seen & (i // self.mask.window == j // self.mask.window)
        seen = seen[None, None]
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
