"""Query, key and value heads as a site has them: projections, biases, q/k norms, rotary. Shared by the mixers.

Legend for shapes: B batch, T time, D hidden size, H query heads, HK key/value heads, K key width, V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.mixers.base import (
    HeadNorm,
    MixerConfig,
    TokenMixer,
    apply_rope,
    copy_linear,
    positions_like,
    read_projection,
    repeat_heads,
    rope_tables,
)
from fla_swap.types import AttentionSite, Norm


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """What a site states about its heads. None: taken from the site on a swap, absent otherwise."""

    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rope: bool | None = None
    q_bias: bool | None = None
    k_bias: bool | None = None
    v_bias: bool | None = None
    o_bias: bool | None = None


class HeadsMixer(TokenMixer):
    """A mixer with q_proj, k_proj, v_proj and o_proj, and everything between them and the heads.

    `kv_heads` is how many key/value heads the projections have: the site's, or as many as query heads when a
    subclass asks for `expand_kv` (each copy can then be trained apart).
    """

    config: HeadsConfig

    def __init__(self, config: HeadsConfig, *, expand_kv: bool = False):
        super().__init__(config)
        assert config.hidden_size and config.num_heads and config.head_dim
        kv_heads = config.num_kv_heads or config.num_heads
        check_heads(config, type(self).name)
        self.heads = config.num_heads
        self.kv_heads = config.num_heads if expand_kv else kv_heads
        self.head_dim, self.v_head_dim = config.head_dim, config.v_head_dim or config.head_dim
        self.rope = config.rope
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=bool(config.q_bias))
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=bool(config.k_bias))
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.v_head_dim, bias=bool(config.v_bias))
        self.o_proj = nn.Linear(self.heads * self.v_head_dim, hidden, bias=bool(config.o_bias))
        self.q_norm = HeadNorm(config.q_norm, self.heads, self.head_dim) if config.q_norm else None
        self.k_norm = HeadNorm(config.k_norm, self.kv_heads, self.head_dim) if config.k_norm else None

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        check_heads(config, f"{site.fqn}: {cls.name}")
        facts = cls.site_facts(site)
        return dataclasses.replace(config, **{n: v for n, v in facts.items() if getattr(config, n) is None})

    @classmethod
    def site_facts(cls, site: AttentionSite) -> dict[str, Any]:
        """The options that are copied from the site where the config says None."""
        return {
            "q_norm": site.q_norm,
            "k_norm": site.k_norm,
            "norm_after_rope": site.norm_after_rope,
            "q_bias": site.q.bias is not None,
            "k_bias": site.k.bias is not None,
            "v_bias": site.v.bias is not None,
            "o_bias": site.o.bias is not None,
        }

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        copy_linear(self.q_proj, *read_projection(weights, site.q))
        copy_linear(self.o_proj, *read_projection(weights, site.o))
        repeats = self.kv_heads // site.kv_heads
        for own, projection in ((self.k_proj, site.k), (self.v_proj, site.v)):
            weight, bias = read_projection(weights, projection)
            bias = None if bias is None else repeat_heads(bias, site.kv_heads, repeats)
            copy_linear(own, repeat_heads(weight, site.kv_heads, repeats), bias)
        if self.q_norm is not None:
            self.q_norm.load(weights)
        if self.k_norm is not None:
            self.k_norm.load(weights, site.kv_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H·K], k [B, T, HK·K], v [B, T, HK·V]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k [B, T, HK, K], v [B, T, HK, V]: split, normed, rotated (positions default to 0, 1, …)."""
        q, k = q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.kv_heads, -1))
        v = v.unflatten(-1, (self.kv_heads, -1))
        if not self.config.norm_after_rope:
            q, k = self._norm(q, k)
        rope = self.rope
        if rope is not None:
            if cos_sin is None:
                dtype = torch.promote_types(q.dtype, torch.float32)
                cos_sin = rope_tables(rope, positions_like(q) if positions is None else positions, dtype)
            q, k = apply_rope(q, *cos_sin, rope.style), apply_rope(k, *cos_sin, rope.style)
        if self.config.norm_after_rope:
            q, k = self._norm(q, k)
        return q, k, v

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return q, k


def check_heads(config: MixerConfig, where: str) -> None:
    """MixerError, with `where` and the numbers, for head counts and widths that do not fit together."""
    heads, kv_heads = config.num_heads or 0, config.num_kv_heads or config.num_heads or 0
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise MixerError(
            f"{where}: {heads} query heads cannot share {kv_heads} key/value heads; "
            "num_heads must be a multiple of num_kv_heads"
        )
    if config.rope is not None and 2 * len(config.rope.inv_freq) > (config.head_dim or 0):
        raise MixerError(
            f"{where}: rotary embedding of {2 * len(config.rope.inv_freq)} channels in heads of {config.head_dim}"
        )
