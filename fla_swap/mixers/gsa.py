"""Gated Slot Attention (2409.07146): M slots per head that forget, read by softmax.

A_t = A_{t−1} diag(exp g_t) + k_t (1 − exp g_t)ᵀ        p_t = softmax(scale · A_tᵀ q_t)
B_t = diag(exp g_t) B_{t−1} + (1 − exp g_t) v_tᵀ        o_t = B_tᵀ p_t

Legend for shapes: B batch, T time, D hidden size, H heads, K key width, V value width, M slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.decay.slots import gsa, gsa_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.parted import PartedMixer, Parts
from fla_swap.mixers.parts import Tokens, inverse_softplus, log_decay_of, spread_half_lives
from fla_swap.mixers.recurrent import RecurrentConfig

SPREAD = 16.0
"""At the start the slots' half-lives spread over a range of this, squared."""


@dataclass(frozen=True, kw_only=True)
class SlotConfig(RecurrentConfig):
    """Options of the mixers with slots; see also `RecurrentConfig`.

    Args:
        num_slots: M.
        scale: factor on the slots' scores; None: the site's on a swap, K^-0.5 outside.
        v_activation: None or "silu".
        output_activation: None or "silu", on the heads' outputs before the norm.
    """

    num_slots: int = 64
    v_activation: str | None = None
    output_activation: str | None = None


class SlotMixer(PartedMixer):
    """A mixer whose memory is M keys and M values per head: "recurrent" [N, H, K, M] and "values" [N, H, M, V]."""

    config: SlotConfig

    def __init__(self, config: SlotConfig):
        super().__init__(config)
        config = self.config
        if config.num_slots < 1:
            raise MixerError(f"{self.name}: num_slots must be at least 1, got {config.num_slots}")
        for option in ("v_activation", "output_activation"):
            if getattr(config, option) not in (None, "silu"):
                raise MixerError(f"{self.name}: {option} must be None or 'silu', got {getattr(config, option)!r}")
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.slots = config.num_slots

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        heads, slots = self.heads, self.slots
        return {"recurrent": (heads, self.head_dim, slots), "values": (heads, slots, self.v_head_dim)}

    def activated(self, v: Tensor) -> Tensor:
        return F.silu(v) if self.config.v_activation else v

    def _finish(self, o: Tensor, x: Tensor, gate_input: Tensor) -> Tensor:
        return super()._finish(F.silu(o) if self.config.output_activation else o, x, gate_input)


@dataclass(frozen=True, kw_only=True)
class GSAConfig(SlotConfig):
    """Options of gated slot attention; see also `SlotConfig`.

    `GSAConfig.paper` is the paper's layer; the defaults are for a swap: slots with half-lives around the head's, which
    do not depend on the token at first.

    Args:
        decay_normalizer: g = logsigmoid(·) / decay_normalizer, so that memories start long.
        gate_bias: give the gate a bias, which holds the half-lives. Without it the gate starts random, around 11 tokens
            for a normalizer of 8.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "qk_activation": "silu",
        "v_activation": "silu",
        "output_activation": "silu",
        "gate_bias": False,
        "use_rope": False,
        "output_norm": True,
        "norm_groups": 1,
        "output_gate": None,
    }

    decay_normalizer: float = 8.0
    gate_bias: bool = True


class GSA(SlotMixer):
    """Gated slot attention; g = logsigmoid(f_proj(x)) / decay_normalizer per head and slot."""

    name = "gsa"
    config_class = GSAConfig
    config: GSAConfig

    def __init__(self, config: GSAConfig):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        if config.decay_normalizer <= 0:
            raise MixerError(f"gsa: decay_normalizer must be positive, got {config.decay_normalizer}")
        self.f_proj = nn.Linear(config.hidden_size, self.heads * self.slots, bias=config.gate_bias)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        if self.config.gate_bias:
            self.f_proj.weight.zero_()
            self.set_half_life_(self.half_lives())
        else:
            self.f_proj.reset_parameters()

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        """As in the base class; a head's slots spread around its half-life, at whose rate they forget on average."""
        if not self.config.gate_bias:
            raise MixerError("gsa: without gate_bias the gate has no decay of its own that could be set")
        rates = 1 / torch.tensor(spread_half_lives(self.slots, 1 / SPREAD, SPREAD)).to(tokens)
        rate = -log_decay_of(wide(tokens))[:, None] * (rates / rates.mean()) * self.config.decay_normalizer
        self.f_proj.bias.copy_((-inverse_softplus(rate)).flatten())

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H, M] in fp32 or wider."""
        return (F.logsigmoid(wide(self.f_proj(x))) / self.config.decay_normalizer).unflatten(-1, (self.heads, -1))

    def operate(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Parts | None]:
        g, v = self.decay(x), self.activated(v)
        s, g = -torch.expm1(g), tokens.decay(g)
        if before is not None and decode:
            return gsa_step(q, k, v, s, g, state=(before[0], before[1]), scale=self.scale), None
        return gsa(
            q,
            k,
            v,
            s,
            g,
            scale=self.scale,
            initial_state=None if before is None else (before[0], before[1]),
            output_final_state=before is not None,
            cu_seqlens=tokens.cu_seqlens,
        )
