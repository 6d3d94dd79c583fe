"""Gated linear attention (2312.06635): a state that forgets by a gate per key channel, and per value channel if asked.

S_t = diag(exp g_t) S_{t−1} diag(exp gv_t) + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.mixers.base import wide
from fla_swap.mixers.decay import DecayConfig, DecayMixer, Gated
from fla_swap.mixers.parts import inverse_softplus, log_decay_of

OPEN = 8.0
"""Bias of a value gate that forgets next to nothing: a half-life of 33,000 tokens with the paper's normalizer."""


@dataclass(frozen=True, kw_only=True)
class GLAConfig(DecayConfig):
    """Options of gated linear attention; see also `DecayConfig`.

    `GLAConfig.paper` is the paper's layer; the defaults are what a swap learns fastest from.

    Args:
        decay_rank: inner width of the low-rank map that makes the decay.
        decay_normalizer: g = logsigmoid(·) / decay_normalizer, so that memories start long.
        clamp_min: lower bound of g, or None.
        value_decay: a second gate, made alike, on the value channels; open at the start.
        balanced: write k · (1 − exp g), which keeps the state's size the same for every decay (HGRN2, 2404.07904).
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_k": 0.5,
        "expand_kv": False,
        "qk_l2norm": False,
        "output_norm": True,
        "output_gate": "swish",
        "use_rope": False,
    }

    decay_rank: int = 16
    decay_normalizer: float = 16.0
    clamp_min: float | None = None
    value_decay: bool = False
    balanced: bool = False


class GLA(DecayMixer):
    """Gated linear attention; g = logsigmoid(low-rank map of x) / decay_normalizer per head and key channel."""

    name = "gla"
    config_class = GLAConfig
    config: GLAConfig

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        assert config.hidden_size
        if config.decay_normalizer <= 0 or (config.clamp_min is not None and config.clamp_min > 0):
            raise MixerError(
                f"decay_normalizer must be positive and clamp_min at most 0, got {config.decay_normalizer} and "
                f"{config.clamp_min}"
            )
        self.gk_down = nn.Linear(config.hidden_size, config.decay_rank, bias=False)
        self.gk_up = nn.Linear(config.decay_rank, self.heads * self.head_dim)
        self.gv_down = self.gv_up = None
        if config.value_decay:
            self.gv_down = nn.Linear(config.hidden_size, config.decay_rank, bias=False)
            self.gv_up = nn.Linear(config.decay_rank, self.heads * self.v_head_dim)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.gk_up.weight.zero_()
        if self.gv_up is not None:
            self.gv_up.weight.zero_()
            self.gv_up.bias.fill_(OPEN)
        self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens)) * self.config.decay_normalizer
        self.gk_up.bias.copy_((-inverse_softplus(rate)).repeat_interleave(self.head_dim))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H, K] in fp32 or wider."""
        return self._decay(self.gk_up(self.gk_down(x)))

    def _decay(self, z: Tensor) -> Tensor:
        g = F.logsigmoid(wide(z)) / self.config.decay_normalizer
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        return g.unflatten(-1, (self.heads, -1))

    def gated(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gated:
        g, gv = self.decay(x), None
        q, k = self.unit(q, k)
        if self.config.balanced:
            k = (wide(k) * -torch.expm1(g)).to(v.dtype)
        if self.gv_down is not None and self.gv_up is not None:
            gv = self._decay(self.gv_up(self.gv_down(x)))
        return Gated(q, k, v, g, gv)
