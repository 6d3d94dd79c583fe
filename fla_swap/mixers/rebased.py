"""ReBased (2402.10644): the similarity is (q'·k')², where q' and k' are normed, scaled and moved by learned parameters.

The norm and γ, β let the parabola's minimum, where a key counts for nothing, lie anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.mixers.base import wide
from fla_swap.mixers.based import PolynomialConfig, PolynomialMixer


@dataclass(frozen=True, kw_only=True)
class RebasedConfig(PolynomialConfig):
    """Options of ReBased; see also `PolynomialConfig`.

    Args:
        qk_norm: layer norm of q and k before γ and β. qk_norm_eps: its epsilon.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"use_rope": False, "output_gate": None}

    qk_norm: bool = True
    qk_norm_eps: float = 1e-5


class Rebased(PolynomialMixer):
    """Linear attention with a learned quadratic kernel; γ and β of q and of k per head, 1 and 0 at the start."""

    name = "rebased"
    config_class = RebasedConfig
    config: RebasedConfig
    taylor = False

    def __init__(self, config: RebasedConfig):
        super().__init__(config)
        self.q_gamma, self.k_gamma = (nn.Parameter(torch.ones(self.heads, self.mapped)) for _ in range(2))
        self.q_beta, self.k_beta = (nn.Parameter(torch.zeros(self.heads, self.mapped)) for _ in range(2))

    def channels(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().channels(q, k)
        return self._moved(q, self.q_gamma, self.q_beta), self._moved(k, self.k_gamma, self.k_beta)

    def _moved(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = wide(x)
        if self.config.qk_norm:
            y = F.layer_norm(y, y.shape[-1:], eps=self.config.qk_norm_eps)
        return (y * wide(gamma) + wide(beta)).to(x.dtype)
