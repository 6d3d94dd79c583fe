"""Heads as a site has them: projections, biases, norms, rotary, gate. Shared by the mixers.

Legend for shapes: B batch, T time, D hidden size, H query heads, HK key/value heads, K key width, V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    wide,
)
from fla_swap.types import AttentionSite, Gate, Norm, Temperature

GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "softplus": F.softplus}


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """What a site states about its heads. None: taken from the site on a swap, absent otherwise.

    `output_proj` False: the heads' outputs are returned side by side, [B, T, H·V] (None: True outside a swap). The
    other fields are as in `AttentionSite`.
    """

    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rope: bool | None = None
    q_bias: bool | None = None
    k_bias: bool | None = None
    v_bias: bool | None = None
    o_bias: bool | None = None
    v_norm: Norm | None = None
    o_norm: Norm | None = None
    clip: float | None = None
    temperature: Temperature | None = None
    gate: Gate | None = None
    output_proj: bool | None = None
    output_size: int | None = None
    v_scale: float | None = None


class HeadsMixer(TokenMixer):
    """A mixer with q_proj, k_proj, v_proj and o_proj, and everything between them and the heads.

    A site's own output gate is part of every mixer that replaces it (`gate_proj`). `kv_heads` is how many key/value
    heads the projections have: the site's, or as many as query heads when a subclass asks for `expand_kv` (each copy
    can then be trained apart). `qk_heads`: q and k have this many heads, each shared by several value heads.
    """

    config: HeadsConfig
    has_keys: ClassVar[bool] = True
    """Whether it has q_proj, k_proj, their norms and a rotary embedding."""

    def __init__(self, config: HeadsConfig, *, expand_kv: bool = False, qk_heads: int | None = None):
        super().__init__(config)
        config = self.config
        assert config.hidden_size and config.num_heads and config.head_dim
        kv_heads = config.num_kv_heads or config.num_heads
        check_heads(config, type(self).name)
        self.heads = config.num_heads
        self.kv_heads = config.num_heads if expand_kv else kv_heads
        self.q_heads, self.k_heads = qk_heads or self.heads, qk_heads or self.kv_heads
        self.head_dim, self.v_head_dim = config.head_dim, config.v_head_dim or config.head_dim
        self.rope = config.rope if self.has_keys else None
        hidden = config.hidden_size
        if self.has_keys:
            self.q_proj = nn.Linear(hidden, self.q_heads * self.head_dim, bias=bool(config.q_bias))
            self.k_proj = nn.Linear(hidden, self.k_heads * self.head_dim, bias=bool(config.k_bias))
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.v_head_dim, bias=bool(config.v_bias))
        width = self.heads * self.v_head_dim
        bare = config.output_proj is False
        outputs = config.output_size or hidden
        self.o_proj = nn.Identity() if bare else nn.Linear(width, outputs, bias=bool(config.o_bias))
        self.q_norm = HeadNorm(config.q_norm, self.q_heads, self.head_dim) if config.q_norm and self.has_keys else None
        self.k_norm = HeadNorm(config.k_norm, self.k_heads, self.head_dim) if config.k_norm and self.has_keys else None
        self.v_norm = HeadNorm(config.v_norm, self.kv_heads, self.v_head_dim) if config.v_norm else None
        self.o_norm = HeadNorm(config.o_norm, self.heads, self.v_head_dim) if config.o_norm else None
        gate = config.gate
        self.gate_proj = None
        if gate is not None:
            bias = gate.projection.bias is not None
            self.gate_proj = nn.Linear(hidden, self.heads if gate.per_head else width, bias=bias)

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        facts = cls.site_facts(site)
        config = dataclasses.replace(config, **{n: v for n, v in facts.items() if getattr(config, n) is None})
        check_heads(config, f"{site.fqn}: {cls.name}")
        return config

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
            "o_bias": site.o is not None and site.o.bias is not None,
            "v_norm": site.v_norm,
            "o_norm": site.o_norm,
            "clip": site.clip,
            "temperature": site.temperature,
            "gate": site.gate,
            "output_proj": site.o is not None,
            "output_size": site.output_size,
            "v_scale": site.v_scale,
        }

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        copies = [(self.v_proj, site.v)]
        if self.has_keys:
            copy_linear(self.q_proj, *read_projection(weights, site.q))
            copies.append((self.k_proj, site.k))
        if site.o is not None and isinstance(self.o_proj, nn.Linear):
            copy_linear(self.o_proj, *read_projection(weights, site.o))
        if site.gate is not None and self.gate_proj is not None:
            copy_linear(self.gate_proj, *read_projection(weights, site.gate.projection))
        repeats = self.kv_heads // site.kv_heads
        for own, projection in copies:
            weight, bias = read_projection(weights, projection)
            bias = None if bias is None else repeat_heads(bias, site.kv_heads, repeats)
            copy_linear(own, repeat_heads(weight, site.kv_heads, repeats), bias)
        for norm in (self.q_norm, self.o_norm):
            if norm is not None:
                norm.load(weights)
        for norm in (self.k_norm, self.v_norm):
            if norm is not None:
                norm.load(weights, site.kv_heads)

    def project(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H·K], k [B, S, HK·K], v [B, S, HK·V]; keys and values from `memory` [B, S, …], or x (then S = T)."""
        source = x if memory is None else memory
        return self.project_apart(x, source, source)

    def project_apart(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each of inputs of its own [B, ·, D]."""
        return self._clip(self.q_proj(q)), self._clip(self.k_proj(k)), self._clip(self.v_proj(v))

    def _clip(self, y: Tensor) -> Tensor:
        limit = self.config.clip
        return y if limit is None else y.clamp(-limit, limit)

    @property
    def counts(self) -> bool:
        """Whether the heads depend on the position, which then is part of a state."""
        return self.rope is not None or self.config.temperature is not None

    def to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, cos_sin: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k [B, T, HK, K], v [B, T, HK, V]: split, normed, rotated (positions default to 0, 1, …)."""
        q, k = q.unflatten(-1, (self.q_heads, -1)), k.unflatten(-1, (self.k_heads, -1))
        v = self.to_value_heads(v)
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
        if self.config.temperature is not None:
            q = q * temperature_of(self.config.temperature, positions_like(q) if positions is None else positions, q)
        return q, k, v

    def to_value_heads(self, v: Tensor) -> Tensor:
        """v [B, T, HK, V] of [B, T, HK·V]: split, normed and scaled."""
        v = v.unflatten(-1, (self.kv_heads, -1))
        v = v if self.v_norm is None else self.v_norm(v)
        return v if self.config.v_scale in (None, 1.0) else v * self.config.v_scale

    def finish(self, heads: Tensor, x: Tensor) -> Tensor:
        """The site's own norm and gate on the heads' outputs [B, T, H, V]; x [B, T, D] feeds the gate."""
        return self.open_gate(heads if self.o_norm is None else self.o_norm(heads), x)

    def open_gate(self, heads: Tensor, x: Tensor) -> Tensor:
        """The site's own gate on [B, T, H, V]."""
        gate = self.config.gate
        if gate is None or self.gate_proj is None:
            return heads
        opened = GATES[gate.activation](wide(self.gate_proj(x)))
        opened = opened[..., None] if gate.per_head else opened.unflatten(-1, (self.heads, self.v_head_dim))
        return (wide(heads) * opened).to(heads.dtype)

    def output_weight(self) -> Tensor:
        """W [D, H·V] of y = heads · Wᵀ: o_proj's weight, or the identity where there is none."""
        if isinstance(self.o_proj, nn.Linear):
            return self.o_proj.weight
        like = self.v_proj.weight
        return torch.eye(self.heads * self.v_head_dim, device=like.device, dtype=like.dtype)

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
    gate = config.gate if isinstance(config, HeadsConfig) else None
    if gate is not None and gate.activation not in GATES:
        raise MixerError(f"{where}: a gate's activation is one of {sorted(GATES)}, got {gate.activation!r}")
    if config.rope is not None and 2 * len(config.rope.inv_freq) > (config.head_dim or 0):
        raise MixerError(
            f"{where}: rotary embedding of {2 * len(config.rope.inv_freq)} channels in heads of {config.head_dim}"
        )


def temperature_of(temperature: Temperature, positions: Tensor, q: Tensor) -> Tensor:
    """Factor [B or 1, T, 1, 1] on q [B, T, H, K] at integer `positions` [B or 1, T]."""
    blocks = torch.floor((positions + temperature.offset).to(wide(q).dtype) / temperature.length)
    return (1 + temperature.scale * torch.log1p(blocks))[..., None, None].to(q.dtype)
