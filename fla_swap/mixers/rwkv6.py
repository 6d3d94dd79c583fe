"""RWKV6 (Eagle and Finch, 2404.05892): tokens mixed with the one before, a decay per key channel, a bonus for now.

S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ        o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ q_t        g_t = −exp(w_t)

Legend for shapes: B batch, T time, D hidden size, H heads, K key width, N sequences, R rank of the map for the mixing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.kernels.decay.rwkv6 import rwkv6, rwkv6_step
from fla_swap.mixers.base import State, wide
from fla_swap.mixers.decay import DecayConfig, DecayMixer, Gated
from fla_swap.mixers.parts import Tokens, log_decay_of, shift_tokens
from fla_swap.mixers.recurrent import Inputs
from fla_swap.mixers.stateful import store


@dataclass(frozen=True, kw_only=True)
class RWKV6Config(DecayConfig):
    """Options of RWKV6; see also `DecayConfig`. q is the paper's receptance r.

    The paper's layer: a group norm of each head with a bias, behind it a swish gate; mixing, decay and bonus start as
    in the published code, from the number of the layer. On a swap tokens start unmixed, with bonus 1.

    Args:
        mix_rank: R. How much each of q, k, v, decay and gate reads of the token before is learned, μ + tanh(x A) B.
        decay_rank: inner width of the low-rank map that makes the decay, w = w₀ + tanh(x A) B.
        paper_start: where mixing, decay and bonus start.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "scale": 1.0,
        "qk_l2norm": False,
        "use_rope": False,
        "output_norm": True,
        "norm_kind": "layer",
        "norm_eps": 64e-5,
        "norm_bias": True,
        "output_gate": "swish",
        "paper_start": True,
    }

    mix_rank: int = 32
    decay_rank: int = 64
    paper_start: bool = False


class RWKV6(DecayMixer):
    """RWKV6's time mixing. State as of `RecurrentMixer`, and "shift" [N, 1, D], the last token."""

    name = "rwkv6"
    feed_forward = "channel_mixing"
    config_class = RWKV6Config
    config: RWKV6Config

    def __init__(self, config: RWKV6Config):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        hidden = self.hidden_size = config.hidden_size
        self.mix_first = nn.Parameter(torch.zeros(hidden))
        self.mix = nn.Parameter(torch.zeros(len(Inputs._fields), hidden))
        self.mix_down = nn.Linear(hidden, len(Inputs._fields) * config.mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(len(Inputs._fields), config.mix_rank, hidden).uniform_(-0.01, 0.01))
        self.decay_down = nn.Linear(hidden, config.decay_rank, bias=False)
        self.decay_up = nn.Linear(config.decay_rank, self.heads * self.head_dim)
        self.bonus = nn.Parameter(torch.ones(self.heads, self.head_dim))
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.mix_down.weight.zero_()
        self.decay_up.weight.zero_()
        if self.config.paper_start:
            self._start_as_published()
        else:
            self.mix_first.zero_()
            self.mix.zero_()
            self.bonus.fill_(1)
            self.set_half_life_(self.half_lives())

    def _start_as_published(self) -> None:
        layer, layers = self.config.layer or 0, self.config.num_layers or 1
        depth, left = layer / max(layers - 1, 1), 1 - layer / layers
        at = torch.arange(self.hidden_size) / self.hidden_size
        even, half = 1 - at**left, 1 - at ** (0.5 * left)
        self.mix_first.copy_(even)
        starts = Inputs(q=half, k=even, v=even - 0.3 * depth, decay=even, gate=half)
        self.mix.copy_(torch.stack(starts))
        channels = torch.arange(self.bonus.numel())
        across = channels / max(self.bonus.numel() - 1, 1)
        self.decay_up.bias.copy_(-6 + 5 * across ** (0.7 + 1.3 * depth))
        zigzag = ((channels + 1) % 3 - 1) * 0.1
        self.bonus.copy_((depth * (1 - across) + zigzag).view_as(self.bonus))

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        rate = -log_decay_of(wide(tokens))
        self.decay_up.bias.copy_(rate.log().repeat_interleave(self.head_dim))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device=device, dtype=dtype)
        state["shift"] = torch.zeros((batch_size, 1, self.hidden_size), device=device, dtype=dtype)
        return state

    def inputs(self, x: Tensor, tokens: Tokens, state: State | None) -> Inputs:
        """The tokens, each channel moved towards the token before by a learned share that depends on both."""
        before, last = shift_tokens(x, tokens, None if state is None else state["shift"])
        if last is not None:
            store(state, "shift", last)
        change = before - x
        ranks = torch.tanh(self.mix_down(x + change * self.mix_first)).unflatten(-1, (len(Inputs._fields), -1))
        shares = self.mix + torch.einsum("btnr,nrd->btnd", ranks, self.mix_up.to(ranks.dtype))
        mixed = x[:, :, None] + change[:, :, None] * shares
        return Inputs(*mixed.to(x.dtype).unbind(2))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay g [B, T, H, K] in fp32 or wider."""
        w = wide(self.decay_up(torch.tanh(self.decay_down(x))))
        return -w.exp().unflatten(-1, (self.heads, -1))

    def operate(
        self, gates: Gated, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, _ = gates
        first = tokens.starts if tokens.cu_seqlens is None else None
        reads = q
        if first is not None:  # the first token of a document would read the state of the one before: u alone counts
            first = first[..., None, None]
            reads = q.masked_fill(first, 0)
        if decode and initial is not None:
            o, final = rwkv6_step(reads, k, v, g, self.bonus, state=initial, scale=self.scale), None
        else:
            o, final = rwkv6(reads, k, v, g, self.bonus, **self.options(tokens, initial))
        if first is not None:
            own = self.scale * (wide(q) * wide(k) * wide(self.bonus)).sum(-1, keepdim=True) * wide(v)
            o = torch.where(first, own.to(o.dtype), o)
        return o, final
