"""What the mixers with a constant state share: convolution, output norm, scale and gate, the state around a call.

Legend for shapes: B batch, T time, D hidden size, H heads, HK key/value heads, V value width, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fla_swap.errors import MixerError
from fla_swap.mixers.base import MixerConfig, State, share, wide
from fla_swap.mixers.heads import HeadsConfig, HeadsMixer
from fla_swap.mixers.parts import OutputGate, ShortConv, Tokens, head_rms_norm, spread_half_lives
from fla_swap.mixers.same import load_recurrence
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class StatefulConfig(HeadsConfig):
    """Options of the mixers with a constant state.

    Args:
        expand_v: all value heads together are this many times as wide as the hidden states, where `v_head_dim` is
            None; on a swap the site's width holds.
        expand_kv: give every query head its own copy of the site's key/value projections (grouped heads then train
            apart); False keeps the projections grouped and repeats heads at run time.
        conv_size: taps of the causal convolution on what was projected (identity at the start); None: no convolution.
            conv_bias: give it a bias, 0 at the start.
        conv_activation: None or "silu" (as in the papers; not the identity, hence off on a swap).
        output_norm: norm before scale and gate, as in the papers; off, because it forgets how large the original's
            outputs were (converted layers learned much more slowly with it). norm_eps: its epsilon. norm_kind: "rms",
            or "layer" (the mean is subtracted). norm_groups: how many groups of heads are normed apart; None: each
            head. norm_after_gate: gate first (Mamba2). norm_bias: add a bias per channel to what is normed and scaled.
        output_gate: "sigmoid", "swish" or None; exactly 1 at the start. gate_rank: None for a full map.
        init_half_life: tokens in which a head's memory halves at the start, one number for all heads or one per head;
            None: spread from 64 to 1024.
    """

    expand_v: float = 1.0
    expand_kv: bool = True
    conv_size: int | None = None
    conv_bias: bool = False
    conv_activation: str | None = None
    output_norm: bool = False
    norm_eps: float = 1e-5
    norm_kind: str = "rms"
    norm_groups: int | None = None
    norm_after_gate: bool = False
    norm_bias: bool = False
    output_gate: str | None = "sigmoid"
    gate_rank: int | None = None
    init_half_life: tuple[float, ...] | None = None

    def widths(self, hidden_size: int, num_heads: int) -> dict[str, int]:
        found, where = {}, type(self).__name__
        if self.head_dim is None:
            found["head_dim"] = share(self.expand_of_keys() * hidden_size, num_heads, where)
        if self.v_head_dim is None and (self.head_dim is None or self.expand_v != 1):
            found["v_head_dim"] = share(self.expand_v * hidden_size, num_heads, where)
        return found

    def expand_of_keys(self) -> float:
        """As `expand_v`, for `head_dim`."""
        return self.expand_v


class StatefulMixer(HeadsMixer):
    """A mixer with a constant state. Subclasses implement `_mix`, `init_state` and their gates.

    State: "recurrent" [N, …] in fp32; "conv" [N, conv_size − 1, C] with a convolution of C channels. No gradient flows
    from one call to the next through it.
    """

    config: StatefulConfig
    calibratable = True

    def __init__(self, config: StatefulConfig, *, qk_heads: int | None = None):
        super().__init__(config, expand_kv=config.expand_kv, qk_heads=qk_heads)
        config = self.config
        check_stateful(config, self.name)
        self.conv = None
        if config.conv_size:
            channels = self.conv_channels()
            self.conv = ShortConv(channels, config.conv_size, config.conv_activation, bias=config.conv_bias)
        self.head_scale = nn.Parameter(torch.ones(self.heads, self.v_head_dim))
        self.head_bias = nn.Parameter(torch.zeros(self.heads, self.v_head_dim)) if config.norm_bias else None
        self.gate = None
        if config.output_gate is not None:
            assert config.hidden_size
            width = self.heads * self.v_head_dim
            self.gate = OutputGate(config.hidden_size, width, config.output_gate, config.gate_rank)

    def conv_channels(self) -> int:
        """What the convolution acts on."""
        return self.v_proj.out_features

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        assert isinstance(config, StatefulConfig)
        check_stateful(config, f"{site.fqn}: {cls.name}")
        return super().complete(config, site)

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
        tokens = Tokens(valid, starts, cu_seqlens)
        if state is None and output_state:
            state = self._new_state(hidden_states, cu_seqlens)
        heads = self._mix(hidden_states, tokens, state, positions, cos_sin)
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

    @torch.no_grad()
    def set_head_scale_(self, scale: Tensor) -> None:
        scale = scale if scale.ndim == 2 else scale[:, None]
        for own in (self.head_scale, self.head_bias):
            if own is not None:
                own.mul_(scale.to(own))

    def half_lives(self) -> Tensor:
        """The configured half-lives in tokens, fp32 [H]."""
        given = self.config.init_half_life
        lives = spread_half_lives(self.heads, 64.0, 1024.0) if given is None else given
        return torch.tensor(lives, dtype=torch.float32).expand(self.heads)

    def conv_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The convolution's part of the zero state."""
        if self.conv is None:
            return {}
        shape = (batch_size, self.conv.taps - 1, self.conv.weight.shape[0])
        return {"conv": torch.zeros(shape, device=device, dtype=dtype)}

    def convolve(self, line: Tensor, tokens: Tokens, state: State | None) -> Tensor:
        """The convolution on [B, T, C], if there is one; its state is updated in place."""
        if self.conv is None:
            return line
        line, past = self.conv(line, tokens, None if state is None else state["conv"])
        if past is not None:
            store(state, "conv", past)
        return line

    def memory(self, state: State | None, tokens: Tokens, steps: int) -> tuple[Tensor | None, bool]:
        """(the recurrence's initial state or None, whether the step operator may update it in place)."""
        if state is None:
            return None, False
        initial, training = state["recurrent"], torch.is_grad_enabled()
        if training:
            initial = initial.clone()  # autograd keeps it, and the state itself changes after the call
        return initial, steps == 1 and tokens.cu_seqlens is None and not training

    def _mix(
        self,
        x: Tensor,
        tokens: Tokens,
        state: State | None,
        positions: Tensor | None,
        cos_sin: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Heads' outputs [B, T, H, V], the state updated in place."""
        raise NotImplementedError

    def _finish(self, o: Tensor, x: Tensor, gate_input: Tensor) -> Tensor:
        """Norm, scale and gate, in fp32 or wider; back in o's dtype. The site's own norm and gate stand around them.

        The scale comes after the site's norm, which would undo it.
        """
        dtype = o.dtype
        o = o if self.o_norm is None else self.o_norm(o)
        gate = None if self.gate is None else self.gate(gate_input).unflatten(-1, (self.heads, self.v_head_dim))
        y = wide(o)
        if gate is not None and self.config.norm_after_gate:
            y, gate = y * gate, None
        y = self.norm_output(y) * wide(self.head_scale)
        y = y if self.head_bias is None else y + wide(self.head_bias)
        y = y if gate is None else y * gate
        return self.open_gate(y, x).to(dtype)

    def norm_output(self, y: Tensor) -> Tensor:
        """The mixer's own norm of [B, T, H, V] in fp32 or wider, if it has one."""
        config = self.config
        if not config.output_norm:
            return y
        groups = y.flatten(-2).unflatten(-1, (config.norm_groups or self.heads, -1))
        if config.norm_kind == "layer":
            groups = groups - groups.mean(-1, keepdim=True)
        return head_rms_norm(groups, config.norm_eps).view_as(y)

    def _new_state(self, x: Tensor, cu_seqlens: Tensor | None) -> State:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return self.init_state(sequences, device=x.device, dtype=self.v_proj.weight.dtype)

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        if site.recurrence is not None:
            load_recurrence(self, site, weights)
            return
        super().load_attention(site, weights)
        self.head_scale.fill_(1)
        if self.head_bias is not None:
            self.head_bias.zero_()
        if self.conv is not None:
            self.conv.reset()
        if self.gate is not None:
            self.gate.reset()
        self.reset_gates()

    def reset_gates(self) -> None:
        """Give the recurrence's gates their neutral start: independent of the token, slow decay."""
        raise NotImplementedError


def share_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, ·] → [B, T, heads, ·]: each head stands for heads / h."""
    repeats = heads // x.shape[2]
    return x if repeats == 1 else x.repeat_interleave(repeats, 2)


def store(state: State | None, name: str, value: Tensor) -> None:
    """Write into a state at its fixed address."""
    if state is not None:
        state[name].copy_(value.detach())


def check_stateful(config: StatefulConfig, where: str) -> None:
    """MixerError, with `where` and the numbers, for options that do not fit."""
    if config.norm_kind not in ("rms", "layer"):
        raise MixerError(f"{where}: norm_kind must be 'rms' or 'layer', got {config.norm_kind!r}")
    if config.norm_groups is not None and (config.norm_groups < 1 or (config.num_heads or 0) % config.norm_groups):
        raise MixerError(f"{where}: {config.num_heads} heads do not divide into {config.norm_groups} groups for a norm")
    lives = config.init_half_life
    if lives is not None and (len(lives) not in (1, config.num_heads) or min(lives) <= 0):
        raise MixerError(
            f"{where}: init_half_life needs 1 or {config.num_heads} positive numbers of tokens, got {list(lives)}"
        )
