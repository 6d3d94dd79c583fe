"""Gated DeltaNet (2412.06464): a state that forgets by a gate per head and corrects what it holds for a key.

S_t = (I − β_t k_t k_tᵀ) exp(g_t) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.kernels.delta.ops import gated_delta_rule, gated_delta_rule_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.delta import DeltaConfig, DeltaMixer
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaConfig):
    """Options of Gated DeltaNet; see `DeltaConfig`.

    `GatedDeltaNetConfig.paper` is the paper's layer; the defaults are what a swap starts best from.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_k": 0.75,
        "expand_v": 1.5,
        "conv_activation": "silu",
        "output_norm": True,
        "output_gate": "swish",
        "use_rope": False,
    }


class GatedDeltaNet(DeltaMixer):
    """Gated delta rule; g = −exp(A_log) · softplus(a_proj(x) + dt_bias), β = sigmoid(b_proj(x)), both per head."""

    name = "gated_deltanet"
    config_class = GatedDeltaNetConfig
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__(config)
        assert self.config.hidden_size
        self.a_proj = nn.Linear(self.config.hidden_size, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.reset_gates()

    @torch.no_grad()
    def reset_decay(self) -> None:
        self.a_proj.weight.zero_()
        self.A_log.zero_()
        self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens).to(self.A_log.device)) / wide(self.A_log).exp()
        self.dt_bias.copy_(inverse_softplus(rate))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H] in fp32 or wider."""
        rate = F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        return -wide(self.A_log).exp() * rate

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        g, beta = tokens.decay(self.decay(x)), tokens.keep(self.beta(x))
        options: dict[str, Any] = {"scale": self.scale, "qk_l2norm": self.config.qk_l2norm}
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return gated_delta_rule_step(q, k, v, g, beta, state=initial, **options), None
            options |= {"initial_state": initial, "output_final_state": initial is not None}
            return gated_delta_rule(q, k, v, g, beta, cu_seqlens=tokens.cu_seqlens, **options)
