"""Kimi delta attention (2510.26692): Gated DeltaNet with a gate per key channel.

S_t = (I − β_t k_t k_tᵀ) diag(exp g_t) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.kernels.delta.ops import kda, kda_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.delta import DeltaConfig, DeltaMixer
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of


@dataclass(frozen=True, kw_only=True)
class KDAConfig(DeltaConfig):
    """Options of KDA; see also `DeltaConfig`.

    `KDAConfig.paper` is the paper's layer (its gate's `gate_rank` is the width of a head, 128); the defaults are what a
    swap starts best from.

    Args:
        decay_rank: inner width of the low-rank map that makes the decay; None: the width of a key head.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "conv_activation": "silu",
        "output_norm": True,
        "output_gate": "sigmoid",
        "gate_rank": 128,
        "use_rope": False,
    }

    decay_rank: int | None = None


class KDA(DeltaMixer):
    """Gated delta rule; g = −exp(A_log) · softplus(low-rank map of x + dt_bias), A_log per head, g per channel."""

    name = "kda"
    config_class = KDAConfig
    config: KDAConfig

    def __init__(self, config: KDAConfig):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        width = self.heads * self.head_dim
        self.f_down = nn.Linear(config.hidden_size, config.decay_rank or self.head_dim, bias=False)
        self.f_up = nn.Linear(config.decay_rank or self.head_dim, width, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.reset_gates()

    @torch.no_grad()
    def reset_decay(self) -> None:
        self.f_up.weight.zero_()
        self.A_log.zero_()
        self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens).to(self.A_log.device)) / wide(self.A_log).exp()
        self.dt_bias.copy_(inverse_softplus(rate).repeat_interleave(self.head_dim))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H, K] in fp32 or wider."""
        rate = F.softplus(wide(self.f_up(self.f_down(x))) + wide(self.dt_bias))
        return rate.unflatten(-1, (self.heads, self.head_dim)) * -wide(self.A_log).exp()[:, None]

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        g, beta = tokens.decay(self.decay(x)), tokens.keep(self.beta(x))
        options: dict[str, Any] = {"scale": self.scale, "qk_l2norm": self.config.qk_l2norm}
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return kda_step(q, k, v, g, beta, state=initial, **options), None
            options |= {"initial_state": initial, "output_final_state": initial is not None}
            return kda(q, k, v, g, beta, cu_seqlens=tokens.cu_seqlens, **options)
