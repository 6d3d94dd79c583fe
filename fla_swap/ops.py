"""Every recurrence as a function: `fla_swap.ops.gla(q, k, v, g)`. Imports no Triton until a GPU tensor needs it."""

from __future__ import annotations

from fla_swap.kernels import flops
from fla_swap.kernels.decay.ops import gla, gla_step
from fla_swap.kernels.decay.rwkv6 import rwkv6, rwkv6_step
from fla_swap.kernels.decay.simple_ops import (
    linear_attention,
    linear_attention_step,
    retention,
    retention_step,
    simple_gla,
    simple_gla_step,
)
from fla_swap.kernels.decay.slots import abc, abc_step, gsa, gsa_step
from fla_swap.kernels.delta.ops import (
    delta_rule,
    delta_rule_step,
    gated_delta_rule,
    gated_delta_rule_step,
    kda,
    kda_step,
)
from fla_swap.kernels.feature.ops import based, based_step, rebased, rebased_step
from fla_swap.kernels.fused.ops import (
    gated_rms_norm,
    linear_cross_entropy,
    linear_kl,
    rms_norm,
    short_conv,
    short_conv_step,
)
from fla_swap.kernels.scan.ops import hgrn, hgrn_step, selective_scan, selective_scan_step
from fla_swap.kernels.window.ops import WindowState, new_window_state, window_attention, window_attention_step

__all__ = [
    "WindowState",
    "abc",
    "abc_step",
    "based",
    "based_step",
    "delta_rule",
    "delta_rule_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_rms_norm",
    "gla",
    "gla_step",
    "gsa",
    "gsa_step",
    "hgrn",
    "hgrn_step",
    "kda",
    "kda_step",
    "linear_attention",
    "linear_attention_step",
    "linear_cross_entropy",
    "linear_kl",
    "new_window_state",
    "rebased",
    "rebased_step",
    "retention",
    "retention_step",
    "rms_norm",
    "rwkv6",
    "rwkv6_step",
    "selective_scan",
    "selective_scan_step",
    "short_conv",
    "short_conv_step",
    "simple_gla",
    "simple_gla_step",
    "window_attention",
    "window_attention_step",
]

flops.register()
