"""Public functions that join what a Transformer does around its token mixers."""

from __future__ import annotations

from fla_swap.kernels.fused.conv import short_conv, short_conv_step
from fla_swap.kernels.fused.linear_loss import linear_cross_entropy, linear_kl
from fla_swap.kernels.fused.norm import gated_rms_norm, rms_norm

__all__ = [
    "gated_rms_norm",
    "linear_cross_entropy",
    "linear_kl",
    "rms_norm",
    "short_conv",
    "short_conv_step",
]
