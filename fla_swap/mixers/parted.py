"""What the mixers share whose memory has several parts: slots of keys and of values, or sums and their normaliser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla_swap.mixers.base import State
from fla_swap.mixers.parts import Tokens
from fla_swap.mixers.recurrent import RecurrentConfig, RecurrentMixer
from fla_swap.mixers.stateful import store
from fla_swap.types import AttentionSite

Parts = tuple[Tensor, ...]


class PartedMixer(RecurrentMixer):
    """A mixer whose memory has the parts of `memory_shapes`. Subclasses implement `operate` instead of `recur`.

    They stand in for a softmax, so on a swap the factor on q·k is the site's.
    """

    config: RecurrentConfig

    @classmethod
    def site_facts(cls, site: AttentionSite) -> dict[str, Any]:
        return super().site_facts(site) | {"scale": site.scale}

    def operate(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: Parts | None, *, decode: bool
    ) -> tuple[Tensor, Parts | None]:
        """Run the recurrence on q, k [B, T, H, K] and v [B, T, H, V]; x [B, T, D] feeds the gates.

        `before`: the parts of the memory. `decode`: update them in place and return none. Otherwise the new parts are
        returned when there are old ones.
        """
        raise NotImplementedError

    def parts(self, state: State | None, tokens: Tokens, steps: int) -> tuple[Parts | None, bool]:
        """(the parts of the memory or None, whether a step operator may update them in place)."""
        if state is None:
            return None, False
        training = torch.is_grad_enabled()  # autograd keeps them, and the state itself changes after the call
        before = tuple(state[name].clone() if training else state[name] for name in self.memory_shapes())
        return before, steps == 1 and tokens.cu_seqlens is None and not training

    def remember(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        before, decode = self.parts(state, tokens, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            o, after = self.operate(x, q, k, v, tokens, before, decode=decode)
        self.store_parts(state, after)
        return o

    def store_parts(self, state: State | None, after: Parts | None) -> None:
        if after is not None:
            for name, part in zip(self.memory_shapes(), after, strict=True):
                store(state, name, part)
