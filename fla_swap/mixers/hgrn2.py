"""HGRN2 (2404.07904): what a channel forgets is what it takes up, and it never forgets less than its layer may.

f_t = β + (1 − β) · sigmoid(z_t)        S_t = diag(f_t) S_{t−1} + (1 − f_t) v_tᵀ        o_t = S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, wide
from fla_swap.mixers.decay import DecayConfig, DecayMixer, Gated
from fla_swap.mixers.forget import bound_parameter, forget, forget_bias, lower_bound
from fla_swap.mixers.parts import activate
from fla_swap.mixers.stateful import share_heads
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class HGRN2Config(DecayConfig):
    """Options of HGRN2; see also `DecayConfig`.

    The paper's layer: keys are 1 − f and `k_proj` makes z; swish on q, an RMS norm over all heads, no gate but q. On a
    swap the site's keys stay, times 1 − f, and z comes from a low-rank map of its own.

    Args:
        tied: k = 1 − f, with z = k_proj(x).
        decay_rank: inner width of the low-rank map that makes z when not `tied`.
        lower_bound: β at the start, below 1; it is learned per channel, and 0 stays 0. None: layer / num_layers
            where both are known (what the paper's cumulative softmax over layers starts from), else 0, as on a swap.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "tied": True,
        "qk_activation": "silu",
        "qk_l2norm": False,
        "use_rope": False,
        "output_norm": True,
        "norm_groups": 1,
        "output_gate": None,
    }

    tied: bool = False
    decay_rank: int = 16
    lower_bound: float | None = None


class HGRN2(DecayMixer):
    """HGRN2: gated linear attention whose keys are what the gate forgets."""

    name = "hgrn2"
    config_class = HGRN2Config
    config: HGRN2Config

    def __init__(self, config: HGRN2Config):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        channels = self.heads * self.head_dim
        self.bound = lower_bound(config, config.lower_bound, self.name)
        self.bound_logit = bound_parameter(self.bound, channels)
        self.f_down = self.f_up = None
        if not config.tied:
            self.f_down = nn.Linear(config.hidden_size, config.decay_rank, bias=False)
            self.f_up = nn.Linear(config.decay_rank, channels)
            self.reset_gates()

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        if isinstance(config, HGRN2Config) and config.tied:
            raise MixerError(f"{site.fqn}: hgrn2: tied keys are gates and cannot take over the site's keys; tied=False")
        return super().complete(config, site)

    def default_scale(self) -> float:
        return 1.0

    @torch.no_grad()
    def reset_gates(self) -> None:
        if self.f_up is not None:
            self.f_up.weight.zero_()
            self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        """As in the base class; a half-life shorter than the lower bound allows becomes the shortest possible."""
        if self.f_up is None:
            raise MixerError("hgrn2: tied keys have no decay of their own that could be set")
        self.f_up.bias.copy_(forget_bias(tokens, self.bound).repeat_interleave(self.head_dim))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (activate(q, self.config.qk_activation), k) if self.config.tied else super().features(q, k)

    def decay(self, x: Tensor) -> Tensor:
        """Log decay log f [B, T, H, K] in fp32 or wider."""
        return self._forget(self._gate(x))[0]

    def gated(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gated:
        if self.config.tied:
            g, taken = self._forget(wide(k))
            return Gated(self.unit(q, q)[0], taken.to(v.dtype), v, g)
        q, k = self.unit(q, k)
        g, taken = self._forget(self._gate(x))
        return Gated(q, (wide(k) * taken).to(v.dtype), v, g)

    def _gate(self, x: Tensor) -> Tensor:
        """z [B, T, H, K] in fp32 or wider."""
        if self.f_down is None or self.f_up is None:
            z = share_heads(self.k_proj(x).unflatten(-1, (self.k_heads, -1)), self.heads)
        else:
            z = self.f_up(self.f_down(x)).unflatten(-1, (self.heads, -1))
        return wide(z)

    def _forget(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log f and 1 − f of z [B, T, H, K]."""
        logit = self.bound_logit
        return forget(z, None if logit is None else logit.view(self.heads, -1))
