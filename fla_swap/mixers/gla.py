"""Gated linear attention (2312.06635): a state that forgets by a gate per key channel.

S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.decay.ops import gla, gla_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of
from fla_swap.mixers.recurrent import RecurrentConfig, RecurrentMixer


@dataclass(frozen=True, kw_only=True)
class GLAConfig(RecurrentConfig):
    """Options of gated linear attention; see also `RecurrentConfig`.

    `GLAConfig.paper` is the paper's layer; the defaults are what a swap learns fastest from.

    Args:
        scale: None means K^-0.5.
        decay_rank: inner width of the low-rank map that makes the decay.
        decay_normalizer: g = logsigmoid(·) / decay_normalizer, so that memories start long.
        clamp_min: lower bound of g, or None.
        qk_l2norm: make q and k unit vectors, which bounds the weights of old tokens.
        balanced: write k · (1 − exp g), which keeps the state's size the same for every decay (HGRN2, 2404.07904).
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_k": 0.5,
        "qk_l2norm": False,
        "output_norm": True,
        "output_gate": "swish",
        "use_rope": False,
    }

    decay_rank: int = 16
    decay_normalizer: float = 16.0
    clamp_min: float | None = None
    qk_l2norm: bool = True
    balanced: bool = False


class GLA(RecurrentMixer):
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
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.gk_down = nn.Linear(config.hidden_size, config.decay_rank, bias=False)
        self.gk_up = nn.Linear(config.decay_rank, self.heads * self.head_dim)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.gk_up.weight.zero_()
        self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens)) * self.config.decay_normalizer
        self.gk_up.bias.copy_((-inverse_softplus(rate)).repeat_interleave(self.head_dim))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H, K] in fp32 or wider."""
        g = F.logsigmoid(wide(self.gk_up(self.gk_down(x)))) / self.config.decay_normalizer
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        return g.unflatten(-1, (self.heads, self.head_dim))

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        g = self.decay(x)
        if self.config.qk_l2norm:
            q, k = (F.normalize(wide(y), dim=-1, eps=1e-6).to(v.dtype) for y in (q, k))
        if self.config.balanced:
            k = (wide(k) * -torch.expm1(g)).to(v.dtype)
        g = tokens.decay(g)
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return gla_step(q, k, v, g, state=initial, scale=self.scale), None
            return gla(
                q,
                k,
                v,
                g,
                scale=self.scale,
                initial_state=initial,
                output_final_state=initial is not None,
                cu_seqlens=tokens.cu_seqlens,
            )
