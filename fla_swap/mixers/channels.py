"""What the mixers without queries and keys share: values go in, every channel remembers on its own.

Legend for shapes: B batch, T time, D hidden size, H heads, V value width, N sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, State
from fla_swap.mixers.parts import Tokens
from fla_swap.mixers.stateful import StatefulConfig, StatefulMixer, share_heads, store
from fla_swap.types import AttentionSite

ABOUT_KEYS = ("q_norm", "k_norm", "norm_after_rope", "q_bias", "k_bias", "temperature")


@dataclass(frozen=True, kw_only=True)
class ChannelConfig(StatefulConfig):
    """Options of the mixers without queries and keys; see also `StatefulConfig`.

    Heads are what the values, the norm, the scale and the half-lives are told by. `head_dim` and `rope` mean nothing
    here; what a site states about its queries and keys is left out.
    """


class ChannelMixer(StatefulMixer):
    """A mixer whose H·V channels have a state each, of `memory_shape`, in fp32. Subclasses implement `recur`.

    State: "recurrent" [N, *memory_shape]; "conv" [N, conv_size − 1, ·].
    """

    config: ChannelConfig
    has_keys = False

    def __init__(self, config: ChannelConfig):
        super().__init__(config)
        check_channels(self.config, self.name)
        self.channels = self.heads * self.v_head_dim

    @classmethod
    def site_facts(cls, site: AttentionSite) -> dict[str, Any]:
        return {name: fact for name, fact in super().site_facts(site).items() if name not in ABOUT_KEYS}

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        assert isinstance(config, ChannelConfig)
        check_channels(config, f"{site.fqn}: {cls.name}")
        return super().complete(dataclasses.replace(config, rope=None), site)

    @property
    def counts(self) -> bool:
        return False

    def memory_shape(self) -> tuple[int, ...]:
        """The shape of one sequence's recurrent state."""
        return (self.channels,)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        wide_dtype = torch.promote_types(dtype, torch.float32)
        state = {"recurrent": torch.zeros(batch_size, *self.memory_shape(), device=device, dtype=wide_dtype)}
        return state | self.conv_state(batch_size, device, dtype)

    def recur(
        self, x: Tensor, v: Tensor, tokens: Tokens, initial: Tensor | None, *, decode: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence on the values v [B, T, H·V]; x [B, T, D] feeds the gates. Returns [B, T, H·V], state.

        `decode`: update `initial` in place by the step operator and return no state. Otherwise the final state is
        returned when there is an initial one.
        """
        raise NotImplementedError

    def values_of(self, x: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        """The values [B, T, H·V] of tokens x [B, T, D], the convolution's state updated in place."""
        line = self.convolve(self._clip(self.v_proj(x)), tokens, state)
        return share_heads(self.to_value_heads(line), self.heads).flatten(2)

    def _mix(
        self,
        x: Tensor,
        tokens: Tokens,
        state: State | None,
        positions: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        v = tokens.keep(self.values_of(x, tokens, state))
        initial, decode = self.memory(state, tokens, x.shape[1])
        o, final = self.recur(x, v, tokens, initial, decode=decode)
        if final is not None:
            store(state, "recurrent", final)
        return self._finish(o.unflatten(-1, (self.heads, self.v_head_dim)), x, x)


def check_channels(config: ChannelConfig, where: str) -> None:
    """MixerError, with `where`, for options about what these mixers do not have."""
    given = [name for name in ABOUT_KEYS if getattr(config, name) is not None]
    if given:
        raise MixerError(f"{where}: it has no queries and keys, which {given} are about; leave them None")
