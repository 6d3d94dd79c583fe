"""Mamba (2312.00752), the state space layer of Samba (2406.07522): N states for every channel, read and written by all.

Δ_t = softplus(dt_proj(·) + bias)     h_t = exp(Δ_t A) h_{t−1} + Δ_t v_t B_tᵀ     o_t = h_t C_t + D v_t     [H·V, N]

The input of Δ, B and C is made from the values by `x_proj`, after the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.scan.ops import selective_scan, selective_scan_step
from fla_swap.mixers.base import wide
from fla_swap.mixers.channels import ChannelConfig, ChannelMixer
from fla_swap.mixers.parts import RESET, Tokens, inverse_softplus, log_decay_of


@dataclass(frozen=True, kw_only=True)
class MambaConfig(ChannelConfig):
    """Options of Mamba; see also `ChannelConfig`.

    The paper's layer: twice as wide as the hidden states, a convolution with swish, a D skip and a swish gate (`v_proj`
    and the gate are its input projection). On a swap B and C start as constants: then each channel is a mean of the
    site's values over N time scales.

    Args:
        state_size: N.
        dt_rank: inner width of the low-rank map that makes Δ; None: hidden_size / 16, rounded up.
        dt_range: Δ at the start, log-uniform in it; None: by `init_half_life`, of the slowest of a channel's states.
        constant_start: B and C have biases, and start as those alone.
        init_skip: D at the start.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_v": 2.0,
        "conv_size": 4,
        "conv_bias": True,
        "conv_activation": "silu",
        "output_gate": "swish",
        "dt_range": (0.001, 0.1),
        "constant_start": False,
        "init_skip": 1.0,
    }

    state_size: int = 16
    dt_rank: int | None = None
    dt_range: tuple[float, float] | None = None
    constant_start: bool = True
    init_skip: float = 0.0


class Mamba(ChannelMixer):
    """Mamba: A = −exp(A_log) starts as −1 … −N in every channel (S4D-real)."""

    name = "mamba"
    config_class = MambaConfig
    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        self.states = config.state_size
        self.rank = -(-config.hidden_size // 16) if config.dt_rank is None else config.dt_rank
        limits = config.dt_range or (1.0, 1.0)
        if self.states < 1 or self.rank < 1 or not 0 < limits[0] <= limits[1]:
            raise MixerError(
                f"mamba: state_size and dt_rank must be at least 1 and dt_range positive and in order, got "
                f"{self.states}, {self.rank} and {config.dt_range}"
            )
        self.x_proj = nn.Linear(self.channels, self.rank + 2 * self.states, bias=config.constant_start)
        self.dt_proj = nn.Linear(self.rank, self.channels)
        self.A_log = nn.Parameter(torch.zeros(self.channels, self.states))
        self.D = nn.Parameter(torch.zeros(self.channels))
        self.reset_gates()

    def memory_shape(self) -> tuple[int, ...]:
        return (self.channels, self.states)

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.A_log.copy_(torch.arange(1, self.states + 1, dtype=torch.float32).log().expand_as(self.A_log))
        self.D.fill_(self.config.init_skip)
        if self.config.dt_range is None:
            self.dt_proj.weight.zero_()
            self.set_half_life_(self.half_lives())
        else:
            low, high = (math.log(x) for x in self.config.dt_range)
            steps = (low + (high - low) * torch.rand(self.channels)).exp()
            self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
            self.dt_proj.bias.copy_(inverse_softplus(steps))
        if self.config.constant_start:
            self.x_proj.weight[self.rank :] = 0
            gain = sum(1 / n for n in range(1, self.states + 1))
            for part, value in zip(self._parts(self.x_proj.bias), (0.0, 1.0, 1 / gain), strict=True):
                part.fill_(value)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """The inputs of Δ, B and C in the last dimension."""
        return x.split((self.rank, self.states, self.states), -1)

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        """As in the base class, for the slowest state of every channel."""
        lives = wide(tokens).to(self.A_log.device).repeat_interleave(self.v_head_dim)
        self.dt_proj.bias.copy_(inverse_softplus(-log_decay_of(lives) / self._slowest()))

    def _slowest(self) -> Tensor:
        """The smallest rate of every channel, [H·V]."""
        return wide(self.A_log).exp().amin(-1)

    def decay(self, x: Tensor) -> Tensor:
        """Log decay [B, T, H, V] of the slowest state of every channel, in fp32 or wider."""
        low = self._parts(self.x_proj(self.values_of(x, Tokens(), None)))[0]
        return (-self._slowest() * F.softplus(wide(self.dt_proj(low)))).unflatten(-1, (self.heads, -1))

    def recur(
        self, x: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        low, write, read = self._parts(self.x_proj(v))
        raw, bias = F.linear(low, self.dt_proj.weight), self.dt_proj.bias
        fused = tokens.valid is None and (tokens.starts is None or tokens.cu_seqlens is not None)
        steps, values = (raw, v) if fused else self._steps(wide(raw) + wide(bias), v, tokens)
        options: dict[str, Any] = {"dt_bias": bias, "dt_softplus": True} if fused else {}
        plain = values is v
        if plain:
            options["D"] = self.D
        rates = -wide(self.A_log).exp()
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                o, final = selective_scan_step(values, steps, rates, write, read, state=initial, **options), None
            else:
                options |= {"initial_state": initial, "output_final_state": initial is not None}
                options["cu_seqlens"] = tokens.cu_seqlens
                o, final = selective_scan(values, steps, rates, write, read, **options)
        return o if plain else o + (wide(v) * wide(self.D)).to(o.dtype), final

    def _steps(self, raw: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Δ and values [B, T, H·V]: no step at padding; where a document starts one so long that all is forgotten,
        with values so small that Δ·v is as without it."""
        steps = tokens.keep(F.softplus(raw))
        if tokens.starts is None or tokens.cu_seqlens is not None:
            return steps, v
        longer = torch.where(tokens.starts[..., None], steps - RESET / self._slowest().detach(), steps)
        values = torch.where(tokens.starts[..., None], wide(v) * (steps / longer.clamp_min(1e-20)), wide(v))
        return longer, values.to(v.dtype)
