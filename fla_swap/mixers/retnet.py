"""RetNet (2307.08621): a state that forgets at a fixed rate per head.

S_t = γ_h S_{t−1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fla_swap.mixers.decay import HeadDecayConfig, HeadDecayMixer


@dataclass(frozen=True, kw_only=True)
class RetNetConfig(HeadDecayConfig):
    """Options of RetNet; see also `HeadDecayConfig`.

    The paper's layer: γ_h = 1 − 2^(−5−h), rotary embedding, values twice as wide as the hidden states, a group norm of
    each head and a swish gate. The defaults are what a swap starts best from.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {
        "expand_v": 2.0,
        "rope_base": 10000.0,
        "init_decay": "retnet",
        "train_decay": False,
        "qk_l2norm": False,
        "output_norm": True,
        "norm_kind": "layer",
        "output_gate": "swish",
    }


class RetNet(HeadDecayMixer):
    """Retention: linear attention with one decay per head, whatever the tokens are."""

    name = "retnet"
    config_class = RetNetConfig
    config: RetNetConfig
