"""Mamba2 (2405.21060): a state space with one decay per head and step; queries are C, keys B, values Δ·x.

S_t = exp(Δ_t A) S_{t−1} + B_t (Δ_t x_t)ᵀ        o_t = S_tᵀ C_t + D x_t        Δ_t = softplus(dt_proj(token) + dt_bias)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, wide
from fla_swap.mixers.decay import DecayConfig, DecayMixer, Gated
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(DecayConfig):
    """Options of Mamba2; see also `DecayConfig`. `head_dim` is the size of the state per channel, 128 in the paper.

    The paper's layer: twice as wide as the hidden states, B and C shared by all heads, convolution with swish on x, B
    and C, a D skip, and an RMS norm behind the swish gate. A swap takes q for C, k for B and v for x, with Δ = 1 at the
    start and no skip.

    Args:
        num_groups: heads of B and C; None: as many as heads (as on a swap).
        dt_range: Δ at the start, log-uniform in it; None: 1. A then starts uniform in `rate_range`; None: by
            `init_half_life`.
        init_skip: D at the start.
        step_limits: Δ is held between these two; None: it is not.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_v": 2.0,
        "head_dim": 128,
        "num_groups": 1,
        "conv_size": 4,
        "conv_bias": True,
        "conv_activation": "silu",
        "use_rope": False,
        "scale": 1.0,
        "qk_l2norm": False,
        "output_norm": True,
        "norm_groups": 1,
        "norm_after_gate": True,
        "output_gate": "swish",
        "dt_range": (0.001, 0.1),
        "rate_range": (1.0, 16.0),
        "init_skip": 1.0,
    }

    num_groups: int | None = None
    dt_range: tuple[float, float] | None = None
    rate_range: tuple[float, float] | None = None
    init_skip: float = 0.0
    step_limits: tuple[float, float] | None = None


class Mamba2(DecayMixer):
    """Mamba2: g = Δ·A with A = −exp(A_log) per head, Δ per head and token."""

    name = "mamba2"
    feed_forward = "none"
    config_class = Mamba2Config
    config: Mamba2Config

    def __init__(self, config: Mamba2Config):
        groups = config.num_groups
        if groups is not None and (groups < 1 or (config.num_heads or 0) % groups):
            raise MixerError(f"mamba2: {config.num_heads} heads do not divide into {groups} groups (num_groups)")
        super().__init__(config, qk_heads=groups)
        config = self.config
        assert config.hidden_size
        self.dt_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.zeros(self.heads))
        self.reset_gates()

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        if site.recurrence is not None:
            return super().complete(config, site)
        if isinstance(config, Mamba2Config) and config.num_groups not in (None, site.heads):
            raise MixerError(
                f"{site.fqn}: mamba2: the site has {site.heads} query heads, each a C of its own; num_groups="
                f"{config.num_groups} would drop some"
            )
        return super().complete(config, site)

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.dt_proj.weight.zero_()
        self.D.fill_(self.config.init_skip)
        steps = self._spread(self.config.dt_range or (1.0, 1.0), logarithmic=True)
        self.dt_bias.copy_(inverse_softplus(steps))
        if self.config.rate_range is None:
            self.set_half_life_(self.half_lives())
        else:
            self.A_log.copy_(self._spread(self.config.rate_range, logarithmic=False).log())

    def _spread(self, limits: tuple[float, float], *, logarithmic: bool) -> Tensor:
        """One number per head, drawn uniformly between two limits."""
        low, high = (math.log(x) for x in limits) if logarithmic else limits
        drawn = low + (high - low) * torch.rand(self.heads)
        return drawn.exp() if logarithmic else drawn

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        step = F.softplus(wide(self.dt_bias))
        self.A_log.copy_((-log_decay_of(wide(tokens).to(step)) / step).log())

    def steps(self, x: Tensor) -> Tensor:
        """Δ [B, T, H] in fp32 or wider."""
        steps, limits = F.softplus(wide(self.dt_proj(x)) + wide(self.dt_bias)), self.config.step_limits
        return steps if limits is None else steps.clamp(*limits)

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H] in fp32 or wider."""
        return -wide(self.A_log).exp() * self.steps(x)

    def gated(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gated:
        steps = self.steps(x)
        q, k = self.unit(q, k)
        return Gated(q, k, (wide(v) * steps[..., None]).to(v.dtype), -wide(self.A_log).exp() * steps)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        o, final = super().recur(x, q, k, v, tokens, initial, decode=decode)
        return o + (wide(v) * wide(self.D)[:, None]).to(o.dtype), final
