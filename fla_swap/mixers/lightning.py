"""Lightning attention (2401.04658, TransNormerLLM): a state that forgets at a rate that depends on layer and head.

S_t = exp(−s_{l,h}) S_{t−1} + k_t v_tᵀ        o_t = S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fla_swap.mixers.decay import HeadDecayConfig, HeadDecayMixer


@dataclass(frozen=True, kw_only=True)
class LightningConfig(HeadDecayConfig):
    """Options of lightning attention; see also `HeadDecayConfig`.

    The paper's layer: ALiBi's slopes as rates, slower in later layers (`layer` of `num_layers`), swish on q and k, an
    RMS norm over all heads and a gate. The defaults are what a swap starts best from.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "init_decay": "alibi",
        "train_decay": False,
        "scale": 1.0,
        "qk_activation": "silu",
        "qk_l2norm": False,
        "output_norm": True,
        "norm_groups": 1,
    }


class Lightning(HeadDecayMixer):
    """Linear attention with one decay per layer and head, whatever the tokens are."""

    name = "lightning"
    config_class = LightningConfig
    config: LightningConfig
