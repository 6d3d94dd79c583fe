"""What the mixers with a matrix state per head share: queries and keys, positions, the state.

Legend for shapes: B batch, T time, D hidden size, H heads, HK key/value heads, K key width, V value width, N sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, State
from fla_swap.mixers.parts import Tokens, activate, check_activation, token_positions
from fla_swap.mixers.stateful import StatefulConfig, StatefulMixer, share_heads, store
from fla_swap.types import AttentionSite

MAX_HEAD_DIM = 256


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(StatefulConfig):
    """Options of the mixers with a matrix state; see also `StatefulConfig`. The convolution acts on q, k and v, before
    the heads' norms and rotation.

    Args:
        expand_k: as `expand_v`, for q and k and `head_dim`.
        scale: factor on q; None: the mixer's own default.
        use_rope: rotate q and k as the site does (HyPE keeps it in linear layers); False drops it.
        qk_activation: feature map on q and k: None, "silu", "relu" or "elu".
        qkv_activation: the same on what is projected to q, k and v, before anything else.
    """

    expand_k: float = 1.0
    scale: float | None = None
    use_rope: bool = True
    qk_activation: str | None = None
    qkv_activation: str | None = None

    def expand_of_keys(self) -> float:
        return self.expand_k


class Inputs(NamedTuple):
    """What the parts of a mixer read, [B, T, D] each: the tokens themselves, or tokens mixed with earlier ones."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    gate: Tensor


class RecurrentMixer(StatefulMixer):
    """A mixer whose state is a K × V matrix per head, in fp32. Subclasses implement `recur` and their gates.

    State: "recurrent" [N, H, K, V] fp32; "conv" [N, conv_size − 1, C]; "position" int64 [N] when they depend on it.
    """

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, *, qk_heads: int | None = None):
        super().__init__(config, qk_heads=qk_heads)
        check_recurrent(self.config, self.name)
        if not self.config.use_rope:
            self.rope = None

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        assert isinstance(config, RecurrentConfig)
        check_recurrent(config, f"{site.fqn}: {cls.name}")
        if not config.use_rope:
            config = dataclasses.replace(config, rope=None)
        return super().complete(config, site)

    def conv_channels(self) -> int:
        return sum(p.out_features for p in (self.q_proj, self.k_proj, self.v_proj))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide_dtype = torch.promote_types(dtype, torch.float32)
        shapes = self.memory_shapes()
        state = {n: torch.zeros((batch_size, *s), device=device, dtype=wide_dtype) for n, s in shapes.items()}
        state |= self.conv_state(batch_size, device, dtype)
        if self.counts:
            state["position"] = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return state

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the recurrence remembers of a sequence: name in the state → shape."""
        return {"recurrent": (self.heads, self.head_dim, self.v_head_dim)}

    def inputs(self, x: Tensor, tokens: Tokens, state: State | None) -> Inputs:
        """What the projections, the decay and the output gate read; here the tokens x [B, T, D] themselves."""
        return Inputs(x, x, x, x, x)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps on q and k [B, T, H, K]."""
        kind = self.config.qk_activation
        return activate(q, kind), activate(k, kind)

    def recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence on q, k [B, T, H, K] and v [B, T, H, V]; x [B, T, D] feeds the gates.

        `decode`: update `initial` in place by the step operator and return no state. Otherwise the final state is
        returned when there is an initial one.
        """
        raise NotImplementedError

    def _mix(
        self,
        x: Tensor,
        tokens: Tokens,
        state: State | None,
        positions: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        inputs = self.inputs(x, tokens, state)
        q, k, v = self.project_apart(inputs.q, inputs.k, inputs.v)
        q, k, v = (activate(x, self.config.qkv_activation) for x in (q, k, v))
        if self.conv is not None:
            line = self.convolve(torch.cat((q, k, v), -1), tokens, state)
            q, k, v = line.split((q.shape[-1], k.shape[-1], v.shape[-1]), -1)
        if self.counts:
            counted, following = token_positions(x, tokens, None if state is None else state["position"])
            store(state, "position", following)
            positions = counted if positions is None else positions
        q, k, v = self.to_heads(q, k, v, positions, cos_sin)
        q, k = self.features(q, k)
        q, k, v = q.to(v.dtype), tokens.keep(k.to(v.dtype)), tokens.keep(v)
        k, v = share_heads(k, self.q_heads), share_heads(v, self.heads)
        o = self.remember(inputs.decay, q, k, v, tokens, state)
        return self._finish(o, x, inputs.gate)

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        """Run the recurrence (`recur`) from the state, which is updated in place. Returns [B, T, H, V]."""
        initial, decode = self.memory(state, tokens, x.shape[1])
        o, final = self.recur(x, q, k, v, tokens, initial, decode=decode)
        if final is not None:
            store(state, "recurrent", final)
        return o


def check_recurrent(config: RecurrentConfig, where: str) -> None:
    """MixerError, with `where` and the numbers, for options that do not fit."""
    widths = (config.head_dim or 0, config.v_head_dim or config.head_dim or 0)
    if max(widths) > MAX_HEAD_DIM:
        raise MixerError(f"{where}: heads of {max(widths)} channels; the kernels take at most {MAX_HEAD_DIM}")
    check_activation(config.qk_activation, where)
    check_activation(config.qkv_activation, where, "qkv_activation")
