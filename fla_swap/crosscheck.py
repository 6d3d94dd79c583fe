"""The model's own config as a second witness: what it states about a layer must be what the graph says.

Configs have conventions, not a schema: each rule below reads the names in use for one fact, and stays silent where a
config has none of them. The config that counts for a site is the one of the nearest module around it that has one, so
that the parts of composite models (text and vision, encoder and decoder) are held to their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fla_swap.errors import VerificationError
from fla_swap.types import AttentionSite

LONGEST = 8192
"""Windows above this are not looked for in the graph."""

OTHER_KINDS = re.compile(r"^(linear|mamba|index|ssm|conv|vision|audio|router|compress)_")
HEADS = re.compile(r"(^|_)(num_attention_heads|attention_heads|n_heads?|num_heads|num_global_attention_heads)$")
KV_HEADS = re.compile(r"(^|_)(num_\w*key_value_heads|num_\w*kv_heads|kv_n_heads|num_query_groups)$")
HEAD_DIM = re.compile(r"(^|_)(head_dim|d_kv|kv_channels|d_head|head_size|dim_head)$")
SCALED_BY_POWER = ("query_pre_attn_scalar",)
SCALED_BY_FACTOR = ("attention_multiplier",)
SOFTCAP = ("attn_logit_softcapping", "attention_logit_softcapping", "attn_logit_softcap")
WINDOW = re.compile(r"^(sliding_window|sliding_window_size|window_size|attention_window|local_attention_window)$")
CHUNK = re.compile(r"^(attention_chunk_size|chunk_size|attn_chunk_size)$")


@dataclass(frozen=True, kw_only=True)
class Witness:
    """One site and what is said about it: `config` as a flat mapping, `layer` its number in it, `eager` or not."""

    site: AttentionSite
    config: Mapping[str, Any]
    layer: int | None
    eager: bool

    @property
    def kind(self) -> str | None:
        """The layer's entry in `layer_types`."""
        return _entry(self.config.get("layer_types"), self.layer)


Rule = Callable[[Witness], str | None]


def check_config(sites: Sequence[AttentionSite], model: nn.Module) -> None:
    """Hold every site against the config of the part of `model` that it stands in, where there is one.

    Raises VerificationError that names the layers, what the graph has and what the config says.
    """
    wrong = []
    for witness in _witnesses(sites, model):
        said = [sentence for rule in RULES if (sentence := rule(witness)) is not None]
        if said:
            wrong.append(f"{witness.site.fqn or '(the model)'}: {'; '.join(said)}")
    if wrong:
        more = f" (and {len(wrong) - 4} more layers)" if len(wrong) > 4 else ""
        raise VerificationError(
            f"the graph and the model's own config disagree: {' | '.join(wrong[:4])}{more}. Either the model does not "
            "run what its config says, or a site was read wrongly: compare the site's source line with the config"
        )


def unseen_layers(names: Iterable[str], model: nn.Module) -> list[str]:
    """Modules built like one of `names` (another layer's attention, of the same class) that are not among them.

    Their attention was not seen in the graph: they were not called, or nothing reads what they return.
    """
    known = {n for n in names if n}
    modules = dict(model.named_modules())
    shapes = {(_pattern(n), type(modules[n])) for n in known if n in modules and re.search(r"\.\d+(\.|$)", f".{n}")}
    return [n for n, m in modules.items() if n not in known and (_pattern(n), type(m)) in shapes]


def _pattern(fqn: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", fqn)


def _witnesses(sites: Sequence[AttentionSite], model: nn.Module) -> Iterator[Witness]:
    for site in sites:
        path = site.fqn.split("#")[0]
        config = _nearest_config(model, path)
        if config is None:
            continue
        owner = model.get_submodule(path)
        numbers = [int(p) for p in path.split(".") if p.isdigit()]
        own = getattr(owner, "layer_idx", None)
        layer = own if isinstance(own, int) else numbers[-1] if numbers else None
        eager = getattr(config, "_attn_implementation", None) == "eager"
        yield Witness(site=site, config=_flat(config, layer), layer=layer, eager=eager)


def _nearest_config(model: nn.Module, path: str) -> Any:
    """The config of the innermost module at or above `path` that has one; a bare number or dict is none."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return config
    return None


def _flat(config: Any, layer: int | None) -> dict[str, Any]:
    """The fields of a config, with those of an attention config inside it, and of this layer where layers differ."""
    fields = dict(vars(config))
    differing = getattr(config, "per_layer_config", None)
    if differing is not None and layer is not None and layer < getattr(config, "num_hidden_layers", 0):
        fields |= {n: v for n, v in vars(differing[layer]).items() if not n.startswith("_")}
    for name in getattr(config, "attribute_map", {}):
        fields.setdefault(name, getattr(config, name, None))
    inner = fields.get("attn_config")
    if inner is not None:
        own = dict(inner) if isinstance(inner, Mapping) else dict(vars(inner))
        fields |= {n: v for n, v in own.items() if not n.startswith("_") and n not in fields}
    return fields


def _stated(config: Mapping[str, Any], names: re.Pattern[str]) -> dict[str, int]:
    """The positive integers under such names; those of other kinds of layers are left out."""
    found = {n: v for n, v in config.items() if names.search(n) and not OTHER_KINDS.match(n)}
    return {n: v for n, v in found.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def _first(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any] | None:
    return next(((n, config[n]) for n in names if config.get(n) is not None), None)


def _entry(values: Any, layer: int | None) -> Any:
    if not isinstance(values, list | tuple) or layer is None or layer >= len(values):
        return None
    return values[layer]


def _near(a: float, b: float, tolerance: float = 1e-3) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _one_of(what: str, found: int, stated: Mapping[str, int]) -> str | None:
    if not stated or found in stated.values():
        return None
    words = ", ".join(f"{n} = {v}" for n, v in stated.items())
    return f"{found} {what}, the config says {words}"


def _heads(w: Witness) -> str | None:
    return _one_of("heads", w.site.heads, _stated(w.config, HEADS))


def _kv_heads(w: Witness) -> str | None:
    stated = _stated(w.config, KV_HEADS)
    if w.config.get("multi_query"):
        stated["multi_query"] = 1
    if not stated and w.site.kv_heads != w.site.heads:
        stated = _stated(w.config, HEADS)
    elif w.site.kind == "cross" or w.config.get("multi_query") is not None:
        stated |= _stated(w.config, HEADS)
    if w.kind == "sliding_attention" and any(w.site.kv_heads % v == 0 for v in stated.values()):
        return None  # layers with a window may have more of them than the config says of the others
    return _one_of("key/value heads", w.site.kv_heads, stated)


def _head_dim(w: Witness) -> str | None:
    return _one_of("channels a head", w.site.head_dim, _stated(w.config, HEAD_DIM))


def _window(w: Witness) -> str | None:
    mask, config = w.site.mask, w.config
    stated = {} if config.get("use_sliding_window") is False else _stated(config, WINDOW)
    if mask.kind == "window" and stated:
        near = {n: v for n, v in stated.items() if abs(v - (mask.window or 0)) <= 1}
        if not near:
            return _one_of("tokens in the window", mask.window or 0, stated)
        if w.kind == "full_attention":
            return f"a window of {mask.window}, the config says layer_types[{w.layer}] = 'full_attention'"
    if mask.kind == "causal" and w.kind == "sliding_attention" and stated:
        limit = config.get("max_position_embeddings")
        limit = min(limit, LONGEST) if isinstance(limit, int) else LONGEST
        if max(stated.values()) < limit - 1:
            words = ", ".join(f"{n} = {v}" for n, v in stated.items())
            return f"no window, the config says layer_types[{w.layer}] = 'sliding_attention' and {words}"
    return None


def _chunk(w: Witness) -> str | None:
    if w.site.mask.kind != "chunked":
        return None
    return _one_of("tokens in a chunk", w.site.mask.window or 0, _stated(w.config, CHUNK))


def _rope_parameters(w: Witness) -> Mapping[str, Any] | None:
    """The plain rotary parameters of this layer; None where frequencies are scaled, or it cannot be told which."""
    given = w.config.get("rope_parameters")
    if not isinstance(given, Mapping):
        return None
    if any(isinstance(v, Mapping) for v in given.values()):
        given = given.get(w.kind) if isinstance(w.kind, str) else None
    if not isinstance(given, Mapping) or given.get("rope_type", "default") != "default":
        return None
    own = _entry(w.config.get("layer_rope_theta"), w.layer)
    return given if own is None else {**given, "rope_theta": own}


def _rope_base(w: Witness) -> str | None:
    rope, given = w.site.rope, _rope_parameters(w)
    theta = None if given is None else given.get("rope_theta")
    if rope is None or not isinstance(theta, int | float) or len(rope.inv_freq) < 2 or theta <= 1:
        return None
    count = len(rope.inv_freq)
    # What is found follows base^(-i/n) when two neighbours have one ratio; anything else is no plain table.
    found = [-f for f in rope.inv_freq] if rope.inv_freq[0] < 0 else list(rope.inv_freq)  # turned the other way
    if min(found) <= 0:
        return None
    base = (found[0] / found[1]) ** count
    plain = all(_near(f, found[0] * base ** (-i / count), 2e-2) for i, f in enumerate(found))
    if plain and found[0] > 0.98 and not _near(base, theta, 5e-2):
        return f"a rotary base of {base:.6g}, the config says rope_theta = {theta:g}"
    return None


def _rope_width(w: Witness) -> str | None:
    rope, given = w.site.rope, _rope_parameters(w)
    if rope is None or given is None:
        return None
    factor = given.get("partial_rotary_factor", w.config.get("partial_rotary_factor"))
    if not isinstance(factor, int | float) or not 0 < factor <= 1 or w.config.get("qk_rope_head_dim"):
        return None
    turned, wanted = 2 * len(rope.inv_freq), int(w.site.head_dim * factor)
    if turned != wanted - wanted % 2:
        return f"{turned} of {w.site.head_dim} channels turned, the config says partial_rotary_factor = {factor:g}"
    return None


def _rope_layers(w: Witness) -> str | None:
    turned = _entry(w.config.get("no_rope_layers"), w.layer)
    if turned is None or w.site.kind == "cross" or bool(turned) == (w.site.rope is not None):
        return None
    found = "a" if w.site.rope is not None else "no"
    return f"{found} rotary embedding, the config says no_rope_layers[{w.layer}] = {turned} (0 is none)"


def _softcap(w: Witness) -> str | None:
    if not any(name in w.config for name in SOFTCAP):
        return None
    stated, found = _first(w.config, SOFTCAP), w.site.softcap
    name, value = stated or (next(n for n in SOFTCAP if n in w.config), None)
    if found is None:
        return f"no softcap in eager code, the config says {name} = {value}" if value and w.eager else None
    if not value or not _near(float(value), found):
        return f"a softcap of {found:g}, the config says {name} = {value}"
    return None


def _scale(w: Witness) -> str | None:
    wanted = None
    power, factor = _first(w.config, SCALED_BY_POWER), _first(w.config, SCALED_BY_FACTOR)
    if power is not None and power[1] > 0:
        name, value, wanted = *power, float(power[1]) ** -0.5
    elif factor is not None:
        name, value, wanted = *factor, float(factor[1])
    elif "scale_attn_weights" in w.config and not w.config.get("scale_attn_by_inverse_layer_idx"):
        name, value = "scale_attn_weights", w.config["scale_attn_weights"]
        wanted = w.site.head_dim**-0.5 if value else 1.0
    if wanted is None or _near(wanted, w.site.scale):
        return None
    return f"scores times {w.site.scale:.6g}, the config says {name} = {value}, which is {wanted:.6g}"


def _clip(w: Witness) -> str | None:
    if "clip_qkv" not in w.config:
        return None
    stated = w.config["clip_qkv"] or None
    if (stated is None) == (w.site.clip is None) and (stated is None or _near(float(stated), w.site.clip or 0.0)):
        return None
    return f"q, k and v clamped to {w.site.clip}, the config says clip_qkv = {stated}"


def _alibi(w: Witness) -> str | None:
    stated = w.config.get("alibi")
    if not isinstance(stated, bool) or stated == (w.site.alibi is not None):
        return None
    return f"{'' if w.site.alibi else 'no '}ALiBi, the config says alibi = {stated}"


RULES: tuple[Rule, ...] = (
    _heads,
    _kv_heads,
    _head_dim,
    _window,
    _chunk,
    _rope_base,
    _rope_width,
    _rope_layers,
    _softcap,
    _scale,
    _clip,
    _alibi,
)
