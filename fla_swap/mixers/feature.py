"""What the mixers share that replace softmax by a feature map, with softmax kept for the last tokens if asked for.

o_t = Σ_{j≤t} sim(q_t, k_j) v_j / Σ_{j≤t} sim(q_t, k_j). With a window of W tokens (LoLCATs, 2410.10254) sim is
γ exp(s) for the last W and the feature map's for older ones, under one denominator: with the window's softmax o_w, its
log-denominator ℓ, and o_f and D of the features,  o = p o_w + (1 − p) o_f,  p = sigmoid(log γ + ℓ − log D).

Legend for shapes: B batch, T time, H heads, K key width, V value width, F features, W window, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.kernels.window.ops import WindowState, new_window_state
from fla_swap.mixers.base import State, wide
from fla_swap.mixers.parted import PartedMixer, Parts
from fla_swap.mixers.parts import RESET, Tokens
from fla_swap.mixers.recurrent import RecurrentConfig
from fla_swap.mixers.window import RING, attend_window, outside_window


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(RecurrentConfig):
    """Options of the mixers with a feature map; see also `RecurrentConfig`.

    Args:
        scale: factor on q·k; None: the site's on a swap.
        window: tokens, the newest counted, to which attention is softmax; the features stand for older ones. None:
            features throughout.
        eps: added to the denominator.
    """

    window: int | None = None
    eps: float = 1e-6


class FeatureMixer(PartedMixer):
    """State: "recurrent" [N, H, F, V], sums of features times values; "normaliser" [N, H, F], sums of features; with a
    window its ring "k", "v", "valid", "count" as in `Window`, from which tokens go on into the sums.

    Subclasses implement `feature_count` (F) and `similar`.
    """

    config: FeatureConfig

    def __init__(self, config: FeatureConfig):
        super().__init__(config)
        config = self.config
        if config.window is not None and config.window < 1:
            raise MixerError(f"{self.name}: window counts the token itself and must be at least 1, got {config.window}")
        if config.eps < 0 or (config.window and not config.eps):
            raise MixerError(f"{self.name}: eps must be at least 0, and above with a window, got {config.eps}")
        self.window_logit = nn.Parameter(torch.zeros(self.heads)) if config.window else None
        self.scale = self.default_scale() if config.scale is None else config.scale

    def default_scale(self) -> float:
        """What `scale=None` means outside a swap."""
        return self.head_dim**-0.5

    @property
    def feature_count(self) -> int:
        """F."""
        raise NotImplementedError

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        features = self.feature_count
        return {"recurrent": (self.heads, features, self.v_head_dim), "normaliser": (self.heads, features)}

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        state = super().init_state(batch_size, device=device, dtype=dtype)
        if self.config.window is None:
            return state
        ring = new_window_state(
            batch_size,
            self.config.window,
            kv_heads=self.heads,
            key_dim=self.head_dim,
            value_dim=self.v_head_dim,
            dtype=dtype,
            device=device,
        )
        return state | ring._asdict()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """One denominator for window and features, with equal rights (γ = 1)."""
        if self.window_logit is not None:
            self.window_logit.zero_()

    def similar(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Tensor, Parts | None]:
        """(o [B, T, H, V], denominators [B, T, H], new parts of the memory if there are old ones) of the feature map.

        g [B, T, H]: log decays that forget where documents start, or None. `decode`: update `before` in place; the
        denominators are then not asked for. `tokens.valid`: the keys that count.
        """
        raise NotImplementedError

    def operate(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Parts | None]:
        o, _, after = self.similar(q, k, v, forgetting(q, tokens), tokens, before, decode=decode)
        return o, after

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        window = self.config.window
        if window is None or self.window_logit is None:
            return super().remember(x, q, k, v, tokens, state)
        ring = None if state is None else WindowState(*(state[name] for name in RING))
        before, _ = self.parts(state, tokens, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            old_k, old_v, old = outside_window(k, v, tokens, ring, window)
            far, den, sums = self.similar(q, old_k, old_v, forgetting(q, tokens), old, before, decode=False)
            near, lse, after = attend_window(q, k, v, tokens, ring, {"window": window, "scale": self.scale})
        self.store_parts(state, sums)
        if ring is not None and after is not None:
            for own, new in zip(ring, after, strict=True):
                own.copy_(new.detach())
        share = torch.sigmoid(wide(self.window_logit) + lse - (wide(den) + self.config.eps).log()).unsqueeze(-1)
        return (share * wide(near) + (1 - share) * wide(far)).to(v.dtype)


def forgetting(q: Tensor, tokens: Tokens) -> Tensor | None:
    """Log decays [B, T, H] that forget everything where a document starts inside a row; None when none can."""
    if tokens.starts is None or tokens.cu_seqlens is not None:
        return None
    g = torch.where(tokens.starts, RESET, 0.0).to(torch.promote_types(q.dtype, torch.float32))
    return g[..., None].expand(q.shape[:3])
