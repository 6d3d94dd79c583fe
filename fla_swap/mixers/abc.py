"""Attention with bounded-memory control (2110.02488): M slots per head, each a mean over time that learns its weights.

Slot m holds Σ_{j≤t} exp(s_jm) k_j / Σ_{j≤t} exp(s_jm), and the same of v; a query reads the slots by softmax.

Legend for shapes: B batch, T time, D hidden size, H heads, K key width, V value width, M slots, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.kernels.decay.slot_writes import slot_writes
from fla_swap.kernels.decay.slots import gsa, gsa_step
from fla_swap.mixers.base import State, wide
from fla_swap.mixers.gsa import SlotConfig, SlotMixer
from fla_swap.mixers.parted import Parts
from fla_swap.mixers.parts import Tokens

NEVER = -1e30
"""Logit of a token that is padding: a weight of zero beside any other."""


@dataclass(frozen=True, kw_only=True)
class ABCConfig(SlotConfig):
    """Options of ABC; see also `SlotConfig`. `ABCConfig.paper` is the paper's layer (ABC_MLP).

    Args:
        clamp: bound on |s|, or None.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"use_rope": False, "output_gate": None}

    clamp: float | None = 32.0


class ABC(SlotMixer):
    """ABC with s = s_proj(x), one logit per head and slot. State: also "lse" [N, H, M], the logsumexp of s so far, and
    "seen" bool [N], whether there was a token."""

    name = "abc"
    config_class = ABCConfig
    config: ABCConfig

    def __init__(self, config: ABCConfig):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        if config.clamp is not None and config.clamp <= 0:
            raise MixerError(f"abc: clamp must be positive or None, got {config.clamp}")
        self.s_proj = nn.Linear(config.hidden_size, self.heads * self.slots, bias=False)

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Random, because slots with equal weights would stay equal; the same each time."""
        weight, generator = self.s_proj.weight, torch.Generator().manual_seed(0)
        self.s_proj.weight.copy_(torch.randn(weight.shape, generator=generator) * (3 * weight.shape[1]) ** -0.5)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().memory_shapes() | {"lse": (self.heads, self.slots), "seen": ()}

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device=device, dtype=dtype)
        return state | {"seen": torch.zeros(batch_size, device=device, dtype=torch.bool)}

    def logits(self, x: Tensor) -> Tensor:
        """s [B, T, H, M] in fp32 or wider."""
        s, limit = wide(self.s_proj(x)), self.config.clamp
        return (s if limit is None else s.clamp(-limit, limit)).unflatten(-1, (self.heads, -1))

    def operate(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Parts | None]:
        s, v = self.logits(x), self.activated(v)
        if tokens.valid is not None:
            s = s.masked_fill(~tokens.valid[..., None, None], NEVER)
        running = pair = None
        if before is not None:
            keys, values, lse, seen = before
            pair, running = (keys, values), lse.masked_fill(~seen[:, None, None], -torch.inf)
        starts = None if tokens.cu_seqlens is not None else tokens.starts
        weights, g, last = slot_writes(s, running, starts=starts, cu_seqlens=tokens.cu_seqlens)
        if pair is not None and decode:
            o, pair = gsa_step(q, k, v, weights, g, state=pair, scale=self.scale), pair
        else:
            o, pair = gsa(
                q,
                k,
                v,
                weights,
                g,
                scale=self.scale,
                initial_state=pair,
                output_final_state=pair is not None,
                cu_seqlens=tokens.cu_seqlens,
            )
        if pair is None:
            return o, None
        seen = last.amax((1, 2)) > -torch.inf
        return o, (*pair, last.masked_fill(~seen[:, None, None], 0), seen)
