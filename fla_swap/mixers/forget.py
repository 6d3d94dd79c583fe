"""The forget gate of HGRN (2311.04823) and HGRN2 (2404.07904): f = β + (1 − β) · sigmoid(z), β a lower bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, wide
from fla_swap.mixers.parts import log_decay_of


def lower_bound(config: MixerConfig, given: float | None, where: str) -> float:
    """β at the start: as given, else layer / num_layers where both are known, else 0. MixerError unless 0 ≤ β < 1."""
    bound = given
    if bound is None:
        bound = config.layer / config.num_layers if config.layer and config.num_layers else 0.0
    if not 0 <= bound < 1:
        raise MixerError(f"{where}: lower_bound must be at least 0 and below 1, got {bound}")
    return bound


def bound_parameter(bound: float, channels: int) -> nn.Parameter | None:
    """The logit of β per channel, learned; None for a bound of 0, which stays 0."""
    return nn.Parameter(torch.full((channels,), math.log(bound / (1 - bound)))) if bound else None


def forget(z: Tensor, bound_logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """log f and 1 − f of z, in fp32 or wider; `bound_logit` broadcasts against it."""
    z = wide(z)
    if bound_logit is None:
        return F.logsigmoid(z), torch.sigmoid(-z)
    logit = wide(bound_logit)
    rest = F.logsigmoid(-logit)
    return torch.logaddexp(F.logsigmoid(logit), rest + F.logsigmoid(z)), (rest + F.logsigmoid(-z)).exp()


def forget_bias(half_life: Tensor, bound: float) -> Tensor:
    """z that halves a memory in `half_life` tokens; the shortest possible where the bound forbids that."""
    forgets = -torch.expm1(log_decay_of(wide(half_life))) / (1 - bound)
    return -torch.logit(forgets.clamp(max=0.999))
