"""HGRN (2311.04823): every channel a running mean of its values, whose memory is never shorter than its layer's bound.

f_t = β + (1 − β) · sigmoid(f_proj(x_t))        h_t = f_t h_{t−1} + (1 − f_t) v_t

The paper's states are complex; here they are real, as in the published models of its successors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.kernels.scan.ops import hgrn, hgrn_step
from fla_swap.mixers.base import MixerConfig, wide
from fla_swap.mixers.channels import ChannelConfig, ChannelMixer
from fla_swap.mixers.forget import bound_parameter, forget, forget_bias, lower_bound
from fla_swap.mixers.parts import Tokens, activate, check_activation
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class HGRNConfig(ChannelConfig):
    """Options of HGRN; see also `ChannelConfig`.

    The paper's layer: swish on the values, an RMS norm over all channels, behind it a swish gate. A swap takes over the
    site's values as they are and starts as their mean under exponential decay.

    Args:
        value_activation: on the values, after the convolution: None, "silu", "relu" or "elu".
        lower_bound: β at the start, below 1; it is learned per channel, and 0 stays 0. None: layer / num_layers
            where both are known (what the paper's cumulative softmax over layers starts from), else 0, as on a swap.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "value_activation": "silu",
        "output_norm": True,
        "norm_groups": 1,
        "output_gate": "swish",
    }

    value_activation: str | None = None
    lower_bound: float | None = None


class HGRN(ChannelMixer):
    """HGRN: a gated linear recurrence of every channel on its own."""

    name = "hgrn"
    config_class = HGRNConfig
    config: HGRNConfig

    def __init__(self, config: HGRNConfig):
        super().__init__(config)
        config = self.config
        assert config.hidden_size
        check_activation(config.value_activation, self.name, "value_activation")
        self.bound = lower_bound(config, config.lower_bound, self.name)
        self.bound_logit = bound_parameter(self.bound, self.channels)
        self.f_proj = nn.Linear(config.hidden_size, self.channels)
        self.reset_gates()

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        assert isinstance(config, HGRNConfig)
        check_activation(config.value_activation, f"{site.fqn}: {cls.name}", "value_activation")
        return super().complete(config, site)

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.f_proj.weight.zero_()
        self.set_half_life_(self.half_lives())

    @torch.no_grad()
    def set_half_life_(self, tokens: Tensor) -> None:
        """As in the base class; a half-life shorter than the lower bound allows becomes the shortest possible."""
        self.f_proj.bias.copy_(forget_bias(tokens, self.bound).repeat_interleave(self.v_head_dim))

    def decay(self, x: Tensor) -> Tensor:
        """Log decay log f [B, T, H, V] in fp32 or wider."""
        return forget(self.f_proj(x), self.bound_logit)[0].unflatten(-1, (self.heads, -1))

    def recur(
        self, x: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        g, taken = forget(self.f_proj(x), self.bound_logit)
        values = tokens.keep((wide(activate(v, self.config.value_activation)) * taken).to(v.dtype))
        g = tokens.decay(g)
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return hgrn_step(values, g, state=initial), None
            return hgrn(
                values,
                g,
                initial_state=initial,
                output_final_state=initial is not None,
                cu_seqlens=tokens.cu_seqlens,
            )
