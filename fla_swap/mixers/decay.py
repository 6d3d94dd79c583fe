"""What the mixers with gated decay share: the call of the operator, and decays that are one number per head.

S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

Legend for shapes: B batch, T time, D hidden size, H heads, K key width, V value width, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.decay.ops import gla, gla_step
from fla_swap.kernels.decay.simple_ops import (
    retention,
    retention_decay,
    retention_step,
    simple_gla,
    simple_gla_step,
)
from fla_swap.mixers.base import wide
from fla_swap.mixers.parts import Tokens, log_decay_of
from fla_swap.mixers.recurrent import RecurrentConfig, RecurrentMixer


@dataclass(frozen=True, kw_only=True)
class DecayConfig(RecurrentConfig):
    """Options of the mixers with gated decay; see also `RecurrentConfig`.

    Args:
        qk_l2norm: make q and k unit vectors, which bounds the weights of old tokens.
    """

    qk_l2norm: bool = True


class Gated(NamedTuple):
    """What the recurrence takes: q, k [B, T, H, K], v [B, T, H, V], log decays g [B, T, H] or [B, T, H, K], and gv
    [B, T, H, V] on the value side or None; gates in fp32 or wider."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    gv: Tensor | None = None


class DecayMixer(RecurrentMixer):
    """A mixer whose state decays per head (g [B, T, H]) or per key channel. Subclasses implement `decay`."""

    config: DecayConfig

    def __init__(self, config: DecayConfig, *, qk_heads: int | None = None):
        super().__init__(config, qk_heads=qk_heads)
        self.scale = self.default_scale() if config.scale is None else config.scale

    def default_scale(self) -> float:
        """What `scale=None` means."""
        return self.head_dim**-0.5

    def decay(self, x: Tensor) -> Tensor:
        """Log decay [B, T, H] or [B, T, H, K] of tokens x [B, T, D], in fp32 or wider."""
        raise NotImplementedError

    def gated(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Gated:
        """q, k, v and the gates as the recurrence takes them."""
        return Gated(*self.unit(q, k), v, self.decay(x))

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k of unit length when that is asked for."""
        if not self.config.qk_l2norm:
            return q, k
        return _unit(q), _unit(k)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        gates = self.gated(x, q, k, v)
        gates = gates._replace(
            k=tokens.keep(gates.k), g=tokens.decay(gates.g), gv=None if gates.gv is None else tokens.decay(gates.gv)
        )
        with torch.autocast(x.device.type, enabled=False):
            return self.operate(gates, tokens, initial, decode=decode)

    def operate(
        self, gates: Gated, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The operator, or its step on the state `initial`."""
        q, k, v, g, gv = gates
        per_head = g.dim() == 3
        if decode and initial is not None:
            if per_head:
                return simple_gla_step(q, k, v, g, state=initial, scale=self.scale), None
            return gla_step(q, k, v, g, gv=gv, state=initial, scale=self.scale), None
        options = self.options(tokens, initial)
        if per_head:
            return simple_gla(q, k, v, g, **options)
        return gla(q, k, v, g, gv=gv, **options)

    def options(self, tokens: Tokens, initial: Tensor | None) -> dict[str, Any]:
        """What every operator takes besides its tensors."""
        return {
            "scale": self.scale,
            "initial_state": initial,
            "output_final_state": initial is not None,
            "cu_seqlens": tokens.cu_seqlens,
        }


DECAYS = ("spread", "retnet", "alibi")


@dataclass(frozen=True, kw_only=True)
class HeadDecayConfig(DecayConfig):
    """Options of the mixers whose decay is one number per head; see also `DecayConfig`.

    Args:
        init_decay: "spread": by `init_half_life`. "retnet": 1 − 2^(−5−h) (2307.08621). "alibi": exp(−s) with ALiBi's
            slopes s = 2^(−8(h+1)/H), less in later layers, s · (1 − layer / (num_layers − 1)) (2401.04658).
        train_decay: learn them; the papers do not.
    """

    init_decay: str = "spread"
    train_decay: bool = True


class HeadDecayMixer(DecayMixer):
    """g = −exp(log_rate), one number per head, the same for every token."""

    config: HeadDecayConfig

    def __init__(self, config: HeadDecayConfig):
        super().__init__(config)
        if config.init_decay not in DECAYS:
            raise MixerError(f"{self.name}: init_decay must be one of {DECAYS}, got {config.init_decay!r}")
        rate = torch.zeros(self.heads)
        if config.train_decay:
            self.log_rate = nn.Parameter(rate)
        else:
            self.register_buffer("log_rate", rate)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        kind = self.config.init_decay
        if kind == "spread":
            self.set_half_life_(self.half_lives())
        else:
            rates = -retention_decay(self.heads, "cpu") if kind == "retnet" else self._slopes()
            self.log_rate.copy_(rates.log())

    def _slopes(self) -> Tensor:
        layer, layers = self.config.layer, self.config.num_layers
        share = 1.0 if layer is None or layers is None else 1 - layer / max(layers - 1, 1) + 1e-5
        return share * torch.exp2(-8.0 * torch.arange(1, self.heads + 1) / self.heads)

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        self.log_rate.copy_((-log_decay_of(wide(tokens))).log())

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H] in fp32 or wider."""
        return -wide(self.log_rate).exp().expand(*x.shape[:2], self.heads)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        if tokens.valid is not None or (tokens.starts is not None and tokens.cu_seqlens is None):
            return super().recur(x, q, k, v, tokens, initial, decode=decode)
        q, k = self.unit(q, k)
        decay = -wide(self.log_rate).exp()
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return retention_step(q, k, v, state=initial, decay=decay, scale=self.scale), None
            return retention(q, k, v, decay=decay, **self.options(tokens, initial))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(wide(x), dim=-1, eps=1e-6).to(x.dtype)
