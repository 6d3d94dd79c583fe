"""The feed-forward half of a block: SwiGLU (2002.05202), or RWKV6's channel mixing (2404.05892).

Legend for shapes: B batch, T time, D hidden size, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.mixers import State
from fla_swap.mixers.parts import Tokens, shift_tokens


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), [B, T, D] → [B, T, D]."""

    def __init__(self, hidden: int, inner: int | None):
        super().__init__()
        inner = inner or rounded(hidden * 8 / 3)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ChannelMixing(nn.Module):
    """sigmoid(receptance(x_r)) · value(relu(key(x_k))²), where x_r and x_k are moved towards the token before.

    State: "channel_shift" [N, 1, D], the last token; updated in place.
    """

    def __init__(self, hidden: int, inner: int | None, layer: int, layers: int):
        super().__init__()
        inner = inner or rounded(hidden * 3.5)
        start = 1 - (torch.arange(hidden) / hidden) ** (1 - layer / layers)
        self.mix_k, self.mix_r = nn.Parameter(start), nn.Parameter(start.clone())
        self.key = nn.Linear(hidden, inner, bias=False)
        self.receptance = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(inner, hidden, bias=False)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return {"channel_shift": torch.zeros(batch_size, 1, self.mix_k.shape[0], device=device, dtype=dtype)}

    def forward(self, x: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        before, last = shift_tokens(x, tokens, None if state is None else state["channel_shift"])
        if state is not None and last is not None:
            state["channel_shift"].copy_(last.detach())
        change = before - x
        k, r = ((x + change * mix).to(x.dtype) for mix in (self.mix_k, self.mix_r))
        return torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())


def rounded(width: float) -> int:
    """Up to the next multiple of 32."""
    return -(-int(width) // 32) * 32
