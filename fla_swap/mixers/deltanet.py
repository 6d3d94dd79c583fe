"""DeltaNet (2406.06484): a state that forgets nothing but what it corrects.

S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fla_swap.kernels.delta.ops import gated_delta_rule, gated_delta_rule_step
from fla_swap.mixers.delta import DeltaConfig, DeltaMixer
from fla_swap.mixers.parts import Tokens


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(DeltaConfig):
    """Options of DeltaNet; see `DeltaConfig`. `DeltaNetConfig.paper` is the paper's layer."""

    PAPER: ClassVar[Mapping[str, Any]] = {
        "conv_activation": "silu",
        "qk_activation": "silu",
        "output_norm": True,
        "output_gate": None,
        "use_rope": False,
    }


class DeltaNet(DeltaMixer):
    """Delta rule; β = sigmoid(b_proj(x)) per head."""

    name = "deltanet"
    config_class = DeltaNetConfig
    config: DeltaNetConfig

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.reset_gates()

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        beta = tokens.keep(self.beta(x))
        forgets = tokens.starts is not None and tokens.cu_seqlens is None  # where documents start, and there alone
        g = tokens.decay(torch.zeros_like(beta)) if forgets else None
        options: dict[str, Any] = {"scale": self.scale, "qk_l2norm": self.config.qk_l2norm}
        with torch.autocast(x.device.type, enabled=False):
            if decode and initial is not None:
                return gated_delta_rule_step(q, k, v, g, beta, state=initial, **options), None
            options |= {"initial_state": initial, "output_final_state": initial is not None}
            return gated_delta_rule(q, k, v, g, beta, cu_seqlens=tokens.cu_seqlens, **options)
