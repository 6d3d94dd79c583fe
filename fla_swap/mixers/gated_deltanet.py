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

from fla_swap.errors import MixerError
from fla_swap.kernels.delta.ops import gated_delta_rule, gated_delta_rule_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of
from fla_swap.mixers.recurrent import RecurrentConfig, RecurrentMixer


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(RecurrentConfig):
    """Options of Gated DeltaNet; see also `RecurrentConfig`.

    `GatedDeltaNetConfig.paper` is the paper's layer; the defaults are what a swap starts best from.

    Args:
        scale: None means 1: q and k have unit length, so that reading a key's own value gives it back.
        qk_l2norm: make q and k unit vectors; without it keys longer than 1 make the recurrence unstable.
        negative_eigenvalues: β up to 2 (2411.12537) instead of 1.
        init_beta: write strength at the start.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_k": 0.75,
        "expand_v": 1.5,
        "conv_activation": "silu",
        "output_norm": True,
        "output_gate": "swish",
        "use_rope": False,
    }

    conv_size: int | None = 4
    qk_l2norm: bool = True
    negative_eigenvalues: bool = False
    init_beta: float = 0.5


class GatedDeltaNet(RecurrentMixer):
    """Gated delta rule; g = −exp(A_log) · softplus(a_proj(x) + dt_bias), β = sigmoid(b_proj(x)), both per head."""

    name = "gated_deltanet"
    config_class = GatedDeltaNetConfig
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__(config)
        assert config.hidden_size
        limit = 2.0 if config.negative_eigenvalues else 1.0
        if not 0 < config.init_beta < limit:
            raise MixerError(f"init_beta must lie between 0 and {limit}, got {config.init_beta}")
        self.scale = 1.0 if config.scale is None else config.scale
        self.beta_limit = limit
        self.a_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.heads)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.a_proj.weight.zero_()
        self.b_proj.weight.zero_()
        self.A_log.zero_()
        self.set_half_life_(self.half_lives())
        self.set_beta_(torch.full((self.heads,), self.config.init_beta))

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens).to(self.A_log.device)) / wide(self.A_log).exp()
        self.dt_bias.copy_(inverse_softplus(rate))

    @torch.no_grad()
    def set_beta_(self, beta: Tensor) -> None:
        self.b_proj.bias.copy_(torch.logit(wide(beta) / self.beta_limit))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H] in fp32 or wider."""
        rate = F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))
        return -wide(self.A_log).exp() * rate

    def beta(self, x: Tensor) -> Tensor:
        """Write strength β [B, T, H] in fp32 or wider."""
        return self.beta_limit * wide(self.b_proj(x)).sigmoid()

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
