"""Based (2402.18668): softmax's exponential replaced by its Taylor series to second order, on few channels per head.

o_t = Σ_{j≤t} (1 + s + s²/2) v_j / Σ_{j≤t} (1 + s + s²/2), s = scale · q_t·k_j: 153 features of 16 channels.

Legend for shapes: B batch, T time, H heads, K key width, R mapped width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.kernels.feature.maps import feature_count, key_features, query_features
from fla_swap.kernels.feature.normalised import normalised
from fla_swap.kernels.feature.ops import attend, based_step, rebased_step
from fla_swap.mixers.base import share
from fla_swap.mixers.feature import FeatureConfig, FeatureMixer
from fla_swap.mixers.parted import Parts
from fla_swap.mixers.parts import Tokens


@dataclass(frozen=True, kw_only=True)
class PolynomialConfig(FeatureConfig):
    """Options of the mixers with a polynomial similarity; see also `FeatureConfig`.

    Args:
        feature_dim: R, channels of q and k that are multiplied, at most 16 on a GPU. Outside a swap `head_dim`. Where
            heads are wider (on a swap) a learned map of each head makes them R, at first the same orthonormal one for
            q and k, scaled so that q·k keeps its size.
    """

    feature_dim: int = 16

    def widths(self, hidden_size: int, num_heads: int) -> dict[str, int]:
        found = {"head_dim": self.feature_dim} if self.head_dim is None else {}
        if self.v_head_dim is None:
            found["v_head_dim"] = share(self.expand_v * hidden_size, num_heads, type(self).__name__)
        return found


class PolynomialMixer(FeatureMixer):
    """A mixer whose similarity is 1 + s + s²/2 (`taylor`) or s²."""

    config: PolynomialConfig
    taylor: ClassVar[bool]

    def __init__(self, config: PolynomialConfig):
        super().__init__(config)
        config = self.config
        if config.feature_dim < 1:
            raise MixerError(f"{self.name}: feature_dim must be at least 1, got {config.feature_dim}")
        self.mapped = min(config.feature_dim, self.head_dim)
        self.q_map = self.k_map = None
        if self.head_dim > config.feature_dim:
            self.q_map, self.k_map = (
                nn.Parameter(torch.empty(self.heads, self.head_dim, self.mapped)) for _ in range(2)
            )
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        super().reset_gates()
        if self.q_map is None or self.k_map is None:
            return
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(self.q_map.shape, generator=generator, dtype=torch.float64)
        columns = torch.linalg.qr(random).Q * (self.head_dim / self.mapped) ** 0.5
        for own in (self.q_map, self.k_map):
            own.copy_(columns)

    @property
    def feature_count(self) -> int:
        return feature_count(self.mapped, taylor=self.taylor)

    def channels(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, K] → [B, T, H, R]."""
        if self.q_map is None or self.k_map is None:
            return q, k
        q, k = (torch.einsum("bthk,hkr->bthr", x, w.to(x.dtype)) for x, w in ((q, self.q_map), (k, self.k_map)))
        return q, k

    def similar(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Tensor, Parts | None]:
        q, k = (x.contiguous() for x in self.channels(q, k))
        scale, eps, state = self.scale, self.config.eps, None if before is None else (before[0], before[1])
        if decode and state is not None and g is None:
            step = based_step if self.taylor else rebased_step
            o = step(q, k, v, state=state, scale=scale, eps=eps, valid=tokens.valid)
            return o, o.new_empty(0), None
        keep = before is not None
        if g is None:
            return attend(
                q,
                k,
                v,
                scale=scale,
                eps=eps,
                initial_state=state,
                output_final_state=keep,
                cu_seqlens=tokens.cu_seqlens,
                valid=tokens.valid,
                taylor=self.taylor,
            )
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = query_features(q.to(dtype), scale=scale, taylor=self.taylor)
        k = key_features(k.to(dtype), taylor=self.taylor)
        k = k if tokens.valid is None else k * tokens.valid[..., None, None]
        return normalised(q, k, v, g, eps=eps, initial_state=state, output_final_state=keep)


@dataclass(frozen=True, kw_only=True)
class BasedConfig(PolynomialConfig):
    """Options of Based; see also `PolynomialConfig`.

    `BasedConfig.paper` is the paper's linear layer. The paper puts layers of window attention
    (`WindowConfig(window=64)`) between such layers; `window` has both in one layer.
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"use_rope": False, "output_gate": None}


class Based(PolynomialMixer):
    """Linear attention by the exponential's Taylor series."""

    name = "based"
    config_class = BasedConfig
    config: BasedConfig
    taylor = True
