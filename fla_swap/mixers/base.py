"""What every token mixer shares: configuration, the module's contract, reading a site's weights, rotary embedding.

Legend for shapes: B batch, T time, D hidden size, H query heads, HK key/value heads, K key width, V value width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.types import AttentionSite, Norm, Projection, Rope, WeightRef, from_jsonable

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Dimensions that every mixer has. Left None, they are taken from the attention site that is replaced.

    `head_dim` is the width of a query/key head, `v_head_dim` of a value head. `rope` rotates q and k when not None.
    Outside a swap `head_dim` defaults to hidden_size / num_heads, `v_head_dim` to `head_dim`, and `rope` to a rotary
    embedding of base `rope_base` (None: none). The start of some papers' layers depends on their number `layer`, from
    0, among `num_layers`.

    The defaults of a mixer's own options are what a swap starts best from; `PAPER` holds those of the paper's layer,
    where they differ (`paper`).
    """

    PAPER: ClassVar[Mapping[str, Any]] = {}

    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    rope: Rope | None = None
    rope_base: float | None = None
    layer: int | None = None
    num_layers: int | None = None

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """The layer as its paper has it, overlaid by `options`; an unknown option is a MixerError."""
        return cls.from_options({**cls.PAPER, **options})

    def filled(self) -> Self:
        """The same config with what follows from other options where it is None (a swap states it all)."""
        found: dict[str, Any] = {}
        if self.hidden_size and self.num_heads:
            found = self.widths(self.hidden_size, self.num_heads)
        width = self.head_dim or found.get("head_dim")
        if self.rope is None and self.rope_base is not None and width is not None:
            found["rope"] = Rope(inv_freq=tuple(self.rope_base ** (-i / width) for i in range(0, width - 1, 2)))
        return dataclasses.replace(self, **found) if found else self

    def widths(self, hidden_size: int, num_heads: int) -> dict[str, int]:
        """The widths of heads that are None, by name."""
        return {} if self.head_dim else {"head_dim": share(hidden_size, num_heads, type(self).__name__)}

    def to_options(self) -> dict[str, Any]:
        """Every field as plain JSON data; `from_options` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the config from plain JSON data; an unknown option is a MixerError that names the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise MixerError(f"{cls.__name__} has no option {unknown}; it has {sorted(known)}")
        return from_jsonable(cls, dict(options))


def share(width: float, heads: int, where: str) -> int:
    """The width of one of `heads` heads that have `width` channels together; a MixerError when they do not divide."""
    if width % heads:
        raise MixerError(f"{where}: {width:g} channels do not divide into {heads} heads; give head_dim and v_head_dim")
    return int(width) // heads


class TokenMixer(nn.Module):
    """One token-mixing layer for training, prefill and decode.

    Subclasses set `name` and `config_class`, and implement `forward`, `init_state` and `load_attention`.
    `uses_kv_cache` marks the mixers that keep transformers' own key/value cache instead of a constant state.
    `feed_forward` names what follows the layer in a model of the paper: "swiglu", "channel_mixing" or "none".
    `calibratable` marks the mixers whose start can be fitted to data before training (RECIPES, "Initialisation"): they
    implement `head_outputs`, `set_head_scale_`, `set_half_life_`, and `set_beta_` if they have a write strength.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[MixerConfig]]
    mask_kinds: ClassVar[tuple[str, ...]] = ("causal", "window")
    uses_kv_cache: ClassVar[bool] = False
    feed_forward: ClassVar[str] = "swiglu"
    calibratable: ClassVar[bool] = False

    def __init__(self, config: MixerConfig):
        super().__init__()
        config = config.filled()
        missing = [n for n in ("hidden_size", "num_heads", "head_dim") if getattr(config, n) is None]
        if missing:
            raise MixerError(f"{type(config).__name__} needs {missing} (a swap takes them from the attention site)")
        self.config = config

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
        """Mix tokens along time.

        Args:
            hidden_states: [B, T, D].
            state: what `init_state` or an earlier call returned; updated **in place** (fixed addresses) and returned.
            output_state: without `state`, start from zeros and return the new state (else None is returned).
            valid: bool [B, T], False for padding: such tokens leave the state untouched (their output is arbitrary).
            starts: bool [B, T], True where a new document starts: nothing before it is seen from there on.
            cu_seqlens: int [N+1] document borders of a packed batch (B = 1); `starts` need not be given then.
            positions: int [B, T] for rotary; default counts from 0 (or on from the state).
            cos_sin: rotary tables [B or 1, T, 2·len(inv_freq)] when the surrounding model computed them already.
        Returns:
            y [B, T, D] and the state.
        """
        raise NotImplementedError

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Zero state: named tensors whose first dimension is the batch and whose size does not depend on T."""
        raise NotImplementedError

    def load_attention(self, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
        """Initialise this module's parameters, in place, from the attention at `site`."""
        raise NotImplementedError

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
        """What goes into `o_proj`, head by head: [B, T, H, V], after norm and gate. Arguments as in `forward`."""
        raise NotImplementedError(f"{self.name} does not show its heads' outputs")

    def set_head_scale_(self, scale: Tensor) -> None:
        """Multiply `head_outputs` by `scale`, [H] or [H, V], from now on (folded into a parameter)."""
        raise NotImplementedError(f"{self.name} has no scale per head")

    def set_half_life_(self, tokens: Tensor) -> None:
        """Set the decay's bias so that, without input from the tokens, head h's memory halves in tokens[h] steps."""
        raise NotImplementedError(f"{self.name} has no decay")

    def set_beta_(self, beta: Tensor) -> None:
        """Set the bias of the write strength so that, without input from the tokens, it is beta[h], [H]."""
        raise NotImplementedError(f"{self.name} has no write strength")

    @classmethod
    def config_for(cls, site: AttentionSite, options: Mapping[str, Any] | MixerConfig | None = None) -> MixerConfig:
        """The complete config that replaces `site`: the options, with what is None taken from the site.

        Raises MixerError, naming the site, when this mixer cannot take its mask kind or head counts.
        """
        if options is None:
            config = cls.config_class()
        elif isinstance(options, MixerConfig):
            if type(options) is not cls.config_class:
                raise MixerError(f"{cls.name} takes {cls.config_class.__name__}, got {type(options).__name__}")
            config = options
        else:
            config = cls.config_class.from_options(options)
        if site.mask.kind not in cls.mask_kinds:
            raise MixerError(
                f"{site.fqn}: its mask is {site.mask.kind!r}, and {cls.name!r} can replace only {list(cls.mask_kinds)} "
                "(rules=[fs.Rule(PATTERN, …)] choose the layers)"
            )
        if site.heads % site.kv_heads:
            raise MixerError(f"{site.fqn}: {site.heads} query heads do not divide into {site.kv_heads} key/value heads")
        found = {
            "hidden_size": site.hidden_size,
            "num_heads": site.heads,
            "num_kv_heads": site.kv_heads,
            "head_dim": site.head_dim,
            "v_head_dim": site.v_head_dim,
            "rope": site.rope,
            "layer": site.layer,
        }
        filled = {n: v for n, v in found.items() if getattr(config, n) is None}
        return cls.complete(dataclasses.replace(config, **filled), site)

    @classmethod
    def complete(cls, config: MixerConfig, site: AttentionSite) -> MixerConfig:
        """Hook: fill in the options of a subclass that depend on the site, or refuse the combination (MixerError)."""
        return config

    @classmethod
    def from_attention(
        cls,
        site: AttentionSite,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any] | MixerConfig | None = None,
    ) -> TokenMixer:
        """Build the mixer that replaces `site`, initialised from its weights, on their device and in their dtype.

        Args:
            weights: fully qualified parameter (and buffer) name → tensor, as in `model.named_parameters()`.
        """
        like = weights[site.q.weight.name]
        mixer = cls(cls.config_for(site, options)).to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            mixer.load_attention(site, weights)
        return mixer


def wide(x: Tensor) -> Tensor:
    """x in fp32, or float64 if it is that: what norms, gates and softmax are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is stored in fewer bits than it stands for (torchao's tensor classes): it has a `dequantize`."""
    return isinstance(tensor, Tensor) and type(tensor).dequantize is not Tensor.dequantize


def read_ref(weights: Mapping[str, Tensor], ref: WeightRef) -> Tensor:
    """The tensor that a reference means: turned to [out, in], its rows selected. Shares memory where it can.

    A quantised tensor is read as the values that it stands for, in the dtype that it shows.
    """
    if ref.more:
        first = dataclasses.replace(ref, more=())
        return torch.cat([read_ref(weights, part) for part in (first, *ref.more)])
    tensor = weights[ref.name]
    if is_quantised(tensor):
        tensor = tensor.dequantize()
    if ref.dims is not None:
        outputs, inputs = ref.dims
        shape = [math.prod(tensor.shape[d] for d in dims) for dims in ref.dims if dims]
        tensor = tensor.permute(*outputs, *inputs).reshape(shape)
    if ref.transposed:
        tensor = tensor.t()
    if ref.rows is None:
        return tensor
    pieces = [tensor[start:stop] for start, stop in ref.rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def read_projection(weights: Mapping[str, Tensor], projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in], its adapters merged into it, and bias [out] or None of a projection."""
    bias = None if projection.bias is None else read_ref(weights, projection.bias)
    weight = read_ref(weights, projection.weight)
    for adapter in projection.adapters:
        change = wide(read_ref(weights, adapter.up)) @ wide(read_ref(weights, adapter.down))
        weight = (wide(weight) + adapter.scale * change).to(weight.dtype)
    return weight, bias


def repeat_heads(tensor: Tensor, heads: int, repeats: int) -> Tensor:
    """Repeat the rows of a projection or bias head by head: [heads·d, …] → [heads·repeats·d, …].

    Head h of the result is head h // repeats of the input (repeating row by row would mix channels inside a head).
    """
    if repeats == 1:
        return tensor
    rows = tensor.unflatten(0, (heads, tensor.shape[0] // heads))
    return rows.repeat_interleave(repeats, dim=0).flatten(0, 1)


def copy_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Copy a projection into an `nn.Linear`; a bias it has and the source has not becomes zero."""
    linear.weight.copy_(weight)
    if linear.bias is not None:
        if bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(bias)


def rope_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 2·len(inv_freq)] of integer positions [B, T], each frequency standing twice.

    Style "half" repeats the block of frequencies, "interleaved" repeats each frequency in place.
    """
    inv_freq = torch.tensor(rope.inv_freq, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * inv_freq
    angles = torch.cat((angles, angles), -1) if rope.style == "half" else angles.repeat_interleave(2, -1)
    scaling = rope.attention_scaling
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> Tensor:
    """Rotate the first cos.shape[-1] channels of x [B, T, H, K]; cos, sin [B or 1, T, R] as from `rope_tables`."""
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    part = x[..., :width]
    if style == "half":
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
    rotated = part * cos + turned * sin
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


def positions_like(hidden_states: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Positions offset, offset + 1, … as int64 [1 or B, T]; `offset` may be a tensor [B]."""
    steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
    return steps + (offset[:, None] if isinstance(offset, Tensor) else offset)


class HeadNorm(nn.Module):
    """The norm that a site applies to q, k, v or its heads' outputs (RMS or layer norm, Gemma's weight offset).

    Acts on [B, T, H, K] over the last dimension, with weights of its own for each head when `per_head`, or over all
    heads together when `across_heads`.
    """

    def __init__(self, norm: Norm, heads: int, head_dim: int):
        super().__init__()
        self.norm, self.heads = norm, heads
        self.apart = norm.across_heads or norm.per_head
        size = heads * head_dim if self.apart else head_dim
        self.weight = nn.Parameter(torch.ones(size)) if norm.weight is not None else None
        self.bias = nn.Parameter(torch.zeros(size)) if norm.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        y = wide(x).flatten(-2) if self.norm.across_heads else wide(x)
        if self.norm.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        if self.norm.kind == "l2":
            y = F.normalize(y, dim=-1, eps=self.norm.eps)
        else:
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        if self.weight is not None:
            y = y * (self._per_channel(self.weight) + self.norm.offset)
        if self.bias is not None:
            y = y + self._per_channel(self.bias)
        return y.reshape(shape).to(x.dtype)

    def _per_channel(self, vector: Tensor) -> Tensor:
        return wide(vector).unflatten(0, (self.heads, -1)) if self.norm.per_head else wide(vector)

    def load(self, weights: Mapping[str, Tensor], heads: int | None = None) -> None:
        """Copy the site's norm weights; `heads` when this module has more heads than the site's (GQA expansion)."""
        for own, ref in ((self.weight, self.norm.weight), (self.bias, self.norm.bias)):
            if own is None or ref is None:
                continue
            value = read_ref(weights, ref).flatten()
            if self.apart and heads is not None and heads != self.heads:
                value = repeat_heads(value, heads, self.heads // heads)
            own.copy_(value.reshape(own.shape))  # a norm for each head may be stored as [heads, width]
