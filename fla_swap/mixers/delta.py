"""What the mixers with the delta rule share: a state that corrects what it holds for a key, by a strength β per token.

S̃ = decay(S_{t−1})        S_t = S̃ + β_t k_t (v_t − S̃ᵀ k_t)ᵀ        o_t = scale · S_tᵀ q_t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, wide
from fla_swap.mixers.recurrent import RecurrentConfig, RecurrentMixer
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(RecurrentConfig):
    """Options of the delta-rule mixers; see also `RecurrentConfig`.

    Args:
        scale: None means 1: q and k have unit length, so that reading a key's own value gives it back.
        num_qk_heads: heads of q and k, each shared by several value heads; None: as many as heads (as on a swap).
        qk_l2norm: make q and k unit vectors; without it keys longer than 1 make the recurrence unstable.
        negative_eigenvalues: β up to 2 (2411.12537) instead of 1.
        init_beta: write strength at the start.
    """

    conv_size: int | None = 4
    num_qk_heads: int | None = None
    qk_l2norm: bool = True
    negative_eigenvalues: bool = False
    init_beta: float = 0.5


class DeltaMixer(RecurrentMixer):
    """The write strength β = sigmoid(b_proj(x)) per head. Subclasses set their decay's start in `reset_decay`."""

    config: DeltaConfig

    def __init__(self, config: DeltaConfig):
        shared = config.num_qk_heads
        if shared is not None and (shared < 1 or (config.num_heads or 0) % shared):
            raise MixerError(f"{self.name}: {config.num_heads} heads do not divide into {shared} (num_qk_heads)")
        super().__init__(config, qk_heads=shared)
        config = self.config
        assert config.hidden_size
        limit = 2.0 if config.negative_eigenvalues else 1.0
        if not 0 < config.init_beta < limit:
            raise MixerError(f"init_beta must lie between 0 and {limit}, got {config.init_beta}")
        self.scale = 1.0 if config.scale is None else config.scale
        self.beta_limit = limit
        self.b_proj = nn.Linear(config.hidden_size, self.heads)

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        if site.recurrence is not None:
            return super().complete(config, site)
        if isinstance(config, DeltaConfig) and config.num_qk_heads not in (None, site.heads):
            raise MixerError(
                f"{site.fqn}: {cls.name}: the site has {site.heads} query heads; num_qk_heads={config.num_qk_heads} "
                "would drop some"
            )
        return super().complete(config, site)

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.b_proj.weight.zero_()
        self.set_beta_(torch.full((self.heads,), self.config.init_beta))
        self.reset_decay()

    def reset_decay(self) -> None:
        """Give the decay its neutral start."""

    @torch.no_grad()
    def set_beta_(self, beta: Tensor) -> None:
        self.b_proj.bias.copy_(torch.logit(wide(beta) / self.beta_limit))

    def beta(self, x: Tensor) -> Tensor:
        """Write strength β [B, T, H] in fp32 or wider."""
        return self.beta_limit * wide(self.b_proj(x)).sigmoid()
