"""Hedgehog (2402.04347) with a window (LoLCATs, 2410.10254): learned features that learn to look like softmax.

φ(x) = [softmax(W x), softmax(−W x)], W of each head, for q and k apart; softmax itself for the last tokens.

Legend for shapes: B batch, T time, H heads, K key width, F rows of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.kernels.feature.maps import hedgehog_features
from fla_swap.kernels.feature.normalised import normalised, normalised_step
from fla_swap.mixers.feature import FeatureConfig, FeatureMixer
from fla_swap.mixers.parted import Parts
from fla_swap.mixers.parts import Tokens

MAX_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class HedgehogConfig(FeatureConfig):
    """Options of Hedgehog; see also `FeatureConfig`.

    `HedgehogConfig.paper` is the layer of the Hedgehog paper, without a window; the defaults are LoLCATs'.

    Args:
        feature_dim: F, half the number of features; None: the heads' width, at most 128.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"window": None, "output_gate": None}

    window: int | None = 64
    feature_dim: int | None = None


class Hedgehog(FeatureMixer):
    """Linear attention with Hedgehog's feature map; W is the identity (its first F rows) at the start."""

    name = "hedgehog"
    config_class = HedgehogConfig
    config: HedgehogConfig

    def __init__(self, config: HedgehogConfig):
        super().__init__(config)
        config = self.config
        rows = config.feature_dim or min(self.head_dim, MAX_FEATURES // 2)
        if not 1 <= rows <= MAX_FEATURES // 2:
            raise MixerError(f"hedgehog: feature_dim must lie between 1 and {MAX_FEATURES // 2}, got {rows}")
        self.q_map, self.k_map = (nn.Parameter(torch.empty(self.heads, rows, self.head_dim)) for _ in range(2))
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        super().reset_gates()
        for own in (self.q_map, self.k_map):
            own.copy_(torch.eye(*own.shape[1:]))

    @property
    def feature_count(self) -> int:
        return 2 * self.q_map.shape[1]

    def similar(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Tensor, Parts | None]:
        q, k = (hedgehog_features(x, w.to(x.dtype)) for x, w in ((q, self.q_map), (k, self.k_map)))
        k = k if tokens.valid is None else k * tokens.valid[..., None, None]
        state = None if before is None else (before[0], before[1])
        if decode and state is not None and g is None:
            o = normalised_step(q, k, v, state=state, eps=self.config.eps)
            return o, o.new_empty(0), None
        options: dict[str, Any] = {"initial_state": state, "output_final_state": state is not None}
        return normalised(q, k, v, g, eps=self.config.eps, cu_seqlens=tokens.cu_seqlens, **options)
