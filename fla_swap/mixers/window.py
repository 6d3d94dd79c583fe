"""Sliding-window softmax attention (Mistral, 2310.06825): exact attention to the last tokens, with a constant state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.window.ops import (
    WindowState,
    new_window_state,
    window_attention_lse,
    window_attention_step,
)
from fla_swap.kernels.window.state import roll, unroll
from fla_swap.mixers.base import MixerConfig, State, read_ref
from fla_swap.mixers.heads import HeadsConfig, HeadsMixer
from fla_swap.mixers.parts import Tokens, token_positions
from fla_swap.types import AttentionSite

RING = ("k", "v", "valid", "count")


@dataclass(frozen=True, kw_only=True)
class WindowConfig(HeadsConfig):
    """Softmax attention over a window. All but `window` is taken from the site on a swap.

    Args:
        window: tokens that a query sees, itself counted. A site that is windowed already keeps the smaller window.
        scale: factor on q·k; None outside a swap: K^-0.5.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: one learned logit per head in the softmax's denominator (gpt-oss, 2508.10925).
        alibi: slopes per head (2108.12409).
    """

    PAPER: ClassVar[Mapping[str, Any]] = {"rope_base": 10000.0}

    window: int = 512
    scale: float | None = None
    softcap: float | None = None
    sinks: bool | None = None
    alibi: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise MixerError(f"window counts the token itself and must be at least 1, got {self.window}")


class Window(HeadsMixer):
    """Softmax attention over the last `window` tokens; key/value heads stay grouped.

    State: a ring of the last `window` keys and values, "k" [N, HK, W, K], "v" [N, HK, W, V], "valid" bool [N, W],
    "count" int64 [N]; and "position" int64 [N] when the heads depend on it.
    """

    name = "window"
    config_class = WindowConfig
    config: WindowConfig

    def __init__(self, config: WindowConfig):
        super().__init__(config)
        if config.alibi is not None and len(config.alibi) != self.heads:
            raise MixerError(f"alibi needs one slope for each of {self.heads} heads, got {len(config.alibi)}")
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        assert isinstance(config, WindowConfig)
        if site.mask.window is not None and site.mask.window < config.window:
            config = dataclasses.replace(config, window=site.mask.window)
        return super().complete(config, site)

    @classmethod
    def site_facts(cls, site: AttentionSite) -> dict[str, Any]:
        own = {
            "scale": site.scale,
            "softcap": site.softcap,
            "sinks": site.sinks is not None,
            "alibi": site.alibi,
        }
        return super().site_facts(site) | own

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        super().load_attention(site, weights)
        if self.sinks is not None and site.sinks is not None:
            self.sinks.copy_(read_ref(weights, site.sinks))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        ring = new_window_state(
            batch_size,
            self.config.window,
            kv_heads=self.kv_heads,
            key_dim=self.head_dim,
            value_dim=self.v_head_dim,
            dtype=dtype,
            device=device,
        )
        state = dict(ring._asdict())
        if self.counts:
            state["position"] = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return state

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        output_state: bool = False,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cos_sin: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        if state is None and output_state:
            sequences = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            dtype = self.q_proj.weight.dtype
            state = self.init_state(sequences, device=hidden_states.device, dtype=dtype)
        heads = self._mix(hidden_states, Tokens(valid, starts, cu_seqlens), state, positions, cos_sin)
        return self.o_proj(heads.flatten(2)), state

    def head_outputs(
        self,
        hidden_states: Tensor,
        *,
        state: State | None = None,
        output_state: bool = False,
        valid: Tensor | None = None,
        starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cos_sin: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self._mix(hidden_states, Tokens(valid, starts, cu_seqlens), state, positions, cos_sin)

    def _mix(
        self,
        x: Tensor,
        tokens: Tokens,
        state: State | None,
        positions: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Heads' outputs [B, T, H, V], normed and gated as the site's, the state updated in place."""
        return self.finish(self._attend(x, tokens, state, positions, cos_sin), x)

    def _attend(
        self,
        x: Tensor,
        tokens: Tokens,
        state: State | None,
        positions: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if self.counts:
            counted, following = token_positions(x, tokens, None if state is None else state["position"])
            positions = counted if positions is None else positions
            if state is not None:
                state["position"].copy_(following)
        q, k, v = self.to_heads(*self.project(x), positions, cos_sin)
        q, k = q.to(v.dtype), k.to(v.dtype)
        ring = None if state is None else WindowState(*(state[name] for name in RING))
        if ring is not None and x.shape[1] == 1 and tokens.cu_seqlens is None and not torch.is_grad_enabled():
            if tokens.starts is not None:
                ring.valid.logical_and_(~tokens.starts)  # [N, W] and [B, 1]: a new document forgets the ring
            return window_attention_step(q, k, v, state=ring, valid=tokens.valid, **self._options(q))
        o, _, after = attend_window(q, k, v, tokens, ring, self._options(q))
        if ring is not None and after is not None:
            for own, new in zip(ring, after, strict=True):
                own.copy_(new.detach())
        return o

    def _options(self, q: Tensor) -> dict[str, Any]:
        alibi = self.config.alibi
        return {
            "window": self.config.window,
            "softcap": self.config.softcap,
            "sinks": self.sinks,
            "alibi": None if alibi is None else torch.tensor(alibi, device=q.device, dtype=torch.float32),
            "scale": self.scale,
        }


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, ring: WindowState | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, WindowState | None]:
    """Windowed attention of heads q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V] that go on from a ring.

    `options`: of `window_attention`, the window among them. Returns o [B, T, H, V], the log-denominators [B, T, H], and
    the new ring if there is an old one.
    """
    if tokens.starts is not None and tokens.cu_seqlens is None:
        return _with_starts(q, k, v, tokens, ring, options)
    return window_attention_lse(
        q,
        k,
        v,
        initial_state=ring,
        output_final_state=ring is not None,
        cu_seqlens=tokens.cu_seqlens,
        valid=tokens.valid,
        **options,
    )


def _with_starts(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, ring: WindowState | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, WindowState | None]:
    """Rows in which documents start: laid end to end as one packed sequence, whose borders are the starts.

    The borders are padded to one per token, so that their number is known without looking at the data.
    """
    assert tokens.starts is not None
    steps, window = q.shape[1], options["window"]
    valid = torch.ones_like(tokens.starts) if tokens.valid is None else tokens.valid
    starts, before = tokens.starts, 0
    if ring is not None:
        past_k, past_v, past_valid = (part.to(own.dtype) for part, own in zip(unroll(ring), (k, v, valid), strict=True))
        before = window
        q = F.pad(q, (0, 0, 0, 0, before, 0))
        k, v = torch.cat((past_k, k), 1), torch.cat((past_v, v), 1)
        valid, starts = torch.cat((past_valid, valid), 1), F.pad(starts, (before, 0), value=False)
    rows, length = starts.shape
    document = F.pad(starts[:, 1:], (1, 0), value=True).flatten().cumsum(0) - 1
    borders = torch.searchsorted(document, torch.arange(rows * length + 1, device=q.device))
    flat = [y.flatten(0, 1)[None] for y in (q, k, v, valid)]
    o, lse, _ = window_attention_lse(*flat[:3], cu_seqlens=borders, valid=flat[3], **options)
    o, lse = (y.unflatten(1, (rows, length))[0, :, before:] for y in (o, lse))
    if ring is None:
        return o, lse, None
    last = document.view(rows, length)
    counts = (valid & (last == last[:, -1:]))[:, -window:]
    return o, lse, roll(k[:, -window:], v[:, -window:], counts, ring.count + steps)


def outside_window(
    k: Tensor, v: Tensor, tokens: Tokens, ring: WindowState | None, window: int
) -> tuple[Tensor, Tensor, Tokens]:
    """The token that leaves the window at each step: k [B, T, HK, K] and v moved by W tokens in their documents.

    The returned marks say which of them exist and count.
    """
    steps = torch.arange(k.shape[1], device=k.device)
    valid = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if tokens.valid is None else tokens.valid
    if ring is None:
        past = (k.new_zeros(1, window, *k.shape[2:]), v.new_zeros(1, window, *v.shape[2:]))
        past = (*past, valid.new_zeros(1, window))
        rows = k.shape[0] if tokens.cu_seqlens is None else tokens.cu_seqlens.shape[0] - 1
        past = tuple(part.expand(rows, *part.shape[1:]) for part in past)
    else:
        past = tuple(part.to(own.dtype) for part, own in zip(unroll(ring), (k, v, valid), strict=True))
    if tokens.cu_seqlens is None:
        old_k, old_v, exists = (
            torch.cat((old, new), 1)[:, : k.shape[1]] for old, new in zip(past, (k, v, valid), strict=True)
        )
        if tokens.starts is not None:
            latest = torch.where(tokens.starts, steps, -window).cummax(1).values
            exists = exists & (latest <= steps - window)
    else:
        bounds = tokens.cu_seqlens.long()
        number = (torch.searchsorted(bounds, steps, right=True) - 1).clamp(max=bounds.shape[0] - 2)
        age = steps - bounds[number]
        index = torch.where(age < window, number * window + age.clamp(max=window - 1), steps + past[2].numel() - window)
        old_k, old_v, exists = (
            torch.cat((old.flatten(0, 1), new[0]))[index][None] for old, new in zip(past, (k, v, valid), strict=True)
        )
    return old_k, old_v, tokens._replace(valid=exists)
