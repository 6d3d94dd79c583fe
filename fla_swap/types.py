"""The data that the stages hand to each other. Frozen, JSON-able, no torch modules inside."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRef:
    """Where one projection's weight or bias lives: a parameter, the rows of it, and whether it is transposed.

    `rows` are half-open ranges along the *output* dimension, concatenated in order (None: the whole parameter), so
    a fused qkv is three refs to one parameter, also where heads are interleaved. `transposed`: stored [in, out].
    `dims`: of a parameter with other than two dimensions, those that count its outputs and those that count its inputs.
    `more`: what stands in other parameters, concatenated after it (heads with projections or norms of their own).
    """

    name: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    more: tuple[WeightRef, ...] = ()
    dims: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it reads, without repetition."""
        return tuple(dict.fromkeys((self.name, *(part.name for part in self.more))))


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """`scale · up @ down` added to a projection's weight (LoRA, 2106.09685): down [r, in], up [out, r]."""

    down: WeightRef
    up: WeightRef
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A linear map: `weight` read as [out, in], `bias` [out] or None; `adapters` are added to the weight."""

    weight: WeightRef
    bias: WeightRef | None = None
    adapters: tuple[LowRank, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A norm over the head dimension (or over all heads at once when `across_heads`).

    `kind` "rms", "layer" or "l2" (x / max(‖x‖, eps)); `offset` is added to the weight before use (Gemma stores
    weight − 1). `per_head`: the norm acts on each head, with weights of its own for each, [heads · head_dim] in all
    (stored so, or as [heads, head_dim]).
    """

    kind: str
    eps: float
    weight: WeightRef | None = None
    bias: WeightRef | None = None
    offset: float = 0.0
    across_heads: bool = False
    per_head: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """The heads' outputs times `activation(x Wᵀ + b)`, before the output projection (2505.06708).

    `projection` reads the same hidden states as q and gives [heads · v_head_dim], or [heads] when `per_head`.
    """

    projection: Projection
    activation: str = "sigmoid"
    per_head: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """Queries times `1 + scale · log(1 + ⌊(position + offset) / length⌋)`, positions from 0 (Llama 4; 2501.19399).

    `padding`: the owner counts the positions itself, tokens of padding too.
    """

    scale: float
    length: int
    offset: int = 0
    padding: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding of the first `2 · len(inv_freq)` channels; `style` "half" (Llama) or "interleaved" (GPT-J).

    Angles are `position · inv_freq` in radians; cos and sin are multiplied by `attention_scaling`. `limit`: the longest
    input for which the model uses these frequencies (it takes others for longer ones); None: no such length is known.
    RoFormer, 2104.09864.
    """

    inv_freq: tuple[float, ...]
    style: str = "half"
    attention_scaling: float = 1.0
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """Which keys a query sees.

    kind: "causal", "window", "chunked", "bidirectional", or "local" (bidirectional, keys nearer than `window` tokens).
    window: tokens seen, the token itself counted ("window"; "local": on each side), or a chunk's length ("chunked").
    """

    kind: str
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArgPath:
    """How an argument reaches the owner module: a keyword, or a position; `item` indexes into a tuple argument."""

    keyword: str | None = None
    position: int | None = None
    item: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CallContract:
    """How the owner module is called and what it returns, observed by hooks, never guessed from names.

    `outputs`: length of the returned tuple, or None for a bare tensor; `output_index`: where the attention output
    stands in it (the other places get None). `cos`, `sin`: rotary tables when the caller passes them.
    `cache_index`: the layer number with which the owner updates the cache. `memory`: the encoder states of a
    cross-attention. `residual`: what the owner adds to the attention's output itself before it returns it.
    `time_first`: hidden states come and go as [T, B, D]. `pairs`: a mask [T, S]; `padding`: one over the keys, [B, S],
    to be added, or true where a key is hidden. `hides`: masks of truth values are true where a key is hidden.
    `listed`: what it returns is a list.
    `own_mask`: the owner hides what the site's mask hides, whatever `mask` says. `seen`: the arguments that were
    tensors in the observed call; what a tensor elsewhere means is not known. None: it was not noted (older reports).
    `unmasked`: what the owner computes where `mask` is None: under the site's "own" mask, under a "causal" one, or
    something "other" (it may fail); None: `mask` is no tensor, or it was not tried. `zeros`: arguments that look like
    masks to be added and were zero everywhere: what they do where they are not is not known.
    """

    hidden: ArgPath
    mask: ArgPath | None = None
    positions: ArgPath | None = None
    cos: ArgPath | None = None
    sin: ArgPath | None = None
    cache: ArgPath | None = None
    cache_index: int | None = None
    outputs: int | None = None
    output_index: int = 0
    memory: ArgPath | None = None
    residual: ArgPath | None = None
    time_first: bool = False
    pairs: ArgPath | None = None
    padding: ArgPath | None = None
    hides: bool = False
    listed: bool = False
    own_mask: bool = False
    seen: tuple[ArgPath, ...] | None = None
    unmasked: str | None = None
    zeros: tuple[ArgPath, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recurrence:
    """What a layer computes that is linear already, between its q, k, v and its output projection.

    `mixer`: the one of ours that computes it, `rule` its name in words. `activation` acts on q, k and v, after the
    causal convolution `conv` (rows in the order of q, k, v; taps) where there is one. `decay`: what the decay is made
    of, `rate` and `dt_bias` its vectors: −exp(rate) · softplus(decay(x) + dt_bias), the softplus held between
    `step_limits`; without `decay` the rate itself, one positive number a head. `beta`: the write strength,
    `beta_limit` · sigmoid. `skip`: a factor on v that is added to the output. `scale` on q; `unit`: q and k have unit
    length. `qk_heads`: heads of q and k, each shared by several of v. `norm` of the heads' outputs, over `norm_width`
    channels; `gate`, an activation of a projection, is multiplied with them, before the norm if `gate_first`. Low-rank
    maps have a first half (`_down`, `_rank` outputs).
    """

    mixer: str
    rule: str
    qk_heads: int
    scale: float = 1.0
    unit: bool = False
    activation: str | None = None
    conv: WeightRef | None = None
    conv_bias: WeightRef | None = None
    taps: int | None = None
    decay: Projection | None = None
    decay_down: Projection | None = None
    decay_rank: int | None = None
    step_limits: tuple[float, float] | None = None
    rate: WeightRef | None = None
    dt_bias: WeightRef | None = None
    beta: Projection | None = None
    beta_limit: float = 1.0
    skip: WeightRef | None = None
    norm: Norm | None = None
    norm_width: int | None = None
    gate: Projection | None = None
    gate_down: Projection | None = None
    gate_rank: int | None = None
    gate_activation: str | None = None
    gate_first: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """Everything needed to rebuild one attention layer: `o_proj(softmax(scale · q kᵀ + mask) v)`.

    `fqn` is the owner module (the one that is replaced); `layer` its number among the model's sites, from 0.
    Shapes: q_proj [heads · head_dim, hidden], k_proj [kv_heads · head_dim, hidden], v_proj [kv_heads · v_head_dim,
    hidden], o_proj [hidden, heads · v_head_dim]; `o` None: the owner returns the heads side by side, [B, T, heads ·
    v_head_dim]. Norms act before RoPE unless `norm_after_rope`.

    `kind`: "self", or "cross" (keys and values come from `call.memory` [B, S, memory_size]). `place`: "module", or
    "graph" for an attention that has no module of its own, or shares it: only `fs.rewrite` can replace it; `fqn` is
    then the deepest module around it with "#" and a number. `anchor`: the core's node in the captured graph.
    Between projection and norm q, k and v are clamped to ±`clip`. `v_norm` acts on the value heads, `v_scale`
    multiplies them after it; `o_norm` acts on the heads' outputs, before `gate` multiplies them. `output_size`: the
    rows of o_proj where they are not `hidden_size`.
    `output_dropout`: what is dropped of the output (before a residual is added) in training mode.
    `recurrence`: the layer is linear already; then `kind` names its rule, and there is no softmax.
    """

    fqn: str
    layer: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection | None
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    mask: Mask
    call: CallContract
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rope: bool = False
    softcap: float | None = None
    sinks: WeightRef | None = None
    alibi: tuple[float, ...] | None = None
    dropout: float = 0.0
    kind: str = "self"
    place: str = "module"
    anchor: str = ""
    memory_size: int | None = None
    clip: float | None = None
    temperature: Temperature | None = None
    v_norm: Norm | None = None
    o_norm: Norm | None = None
    gate: Gate | None = None
    output_size: int | None = None
    v_scale: float = 1.0
    output_dropout: float = 0.0
    recurrence: Recurrence | None = None
    source: str = ""
    proved: bool = False
    max_error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NearMiss:
    """An attention core that is no site: `slot` names the recogniser that failed, `progress` how many passed.

    `passed` names the slots that held, `anchor` is the core's node in the captured graph.
    """

    fqn: str
    slot: str
    reason: str
    source: str = ""
    progress: int = 0
    passed: tuple[str, ...] = ()
    anchor: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionReport:
    """What `inspect` found: proved sites in model order, near misses (furthest first), cores that belong to no site.

    `linear`: the layers that are linear already, in model order; `mixer="same"` swaps them, other plans keep them.
    """

    model: str
    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...] = ()
    unclaimed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    checked_length: int | None = None
    linear: tuple[AttentionSite, ...] = ()

    def site(self, fqn: str) -> AttentionSite:
        """The site whose owner is `fqn`, linear or not; KeyError with the known names otherwise."""
        known = (*self.sites, *self.linear)
        for site in known:
            if site.fqn == fqn:
                return site
        raise KeyError(f"no attention site {fqn!r}; the sites are {[s.fqn for s in known]}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def explain(self, name: str) -> str:
        """All that is known about a module: its facts and where each is from, or where it stopped and what to do.

        `name` may be any module around or inside attention ("model.layers.3"; "" is the whole model). Raises KeyError
        with names near it when the report has nothing there.
        """
        from fla_swap.reporting import explain

        return explain(self, name)

    def __str__(self) -> str:
        from fla_swap.reporting import report_text

        return report_text(self)

    def __rich__(self) -> Any:
        from fla_swap.reporting import report_table

        return report_table(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """One swapped layer: its site and the mixer to put there (name and options, as JSON)."""

    site: AttentionSite
    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapPlan:
    """Which layers are swapped for what; `kept` are the fqns that stay as they are. Saved in the model's config."""

    layers: tuple[LayerPlan, ...]
    kept: tuple[str, ...] = ()
    version: int = 1


def to_jsonable(value: Any) -> Any:
    """A frozen dataclass of this module as plain dicts, lists and scalars."""
    return dataclasses.asdict(value)


def from_jsonable(cls: type, data: Any) -> Any:
    """Rebuild a dataclass of this module from `to_jsonable`'s output (lists become tuples, dicts their classes)."""
    hints = _field_types(cls)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}")
    return cls(**{name: _convert(hints[name], value) for name, value in data.items()})


def _field_types(cls: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any) -> Any:
    import types
    import typing

    if value is None:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v) for v in value)
        return tuple(_convert(a, v) for a, v in zip(args, value, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_jsonable(typing.cast(type, hint), value)
    return value
