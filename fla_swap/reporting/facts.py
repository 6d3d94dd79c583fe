"""The facts of a site in words, each with where it came from. The one place that knows all fields of a site."""

from __future__ import annotations

from dataclasses import dataclass

from fla_swap.types import (
    ArgPath,
    AttentionReport,
    AttentionSite,
    CallContract,
    Gate,
    Mask,
    Norm,
    Projection,
    Rope,
    WeightRef,
)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that a site states: `text` for reading on, `short` for a table's cell, `origin` how it is known."""

    name: str
    text: str
    origin: str
    short: str = ""


def facts_of(site: AttentionSite) -> list[Fact]:
    """Everything that the site states, in the order of the computation; what it does not have is left out."""
    facts = [_kind(site), place_fact(site), heads_fact(site)]
    facts += [projection_fact(side, getattr(site, side)) for side in "qkv"]
    facts += [*_before_scores(site), _scale(site), _mask(site), *_on_scores(site), *_after(site)]
    if site.o is None:
        text = "none: the heads are returned side by side"
        facts.append(Fact(name="o", text=text, origin="where the module ends"))
    else:
        facts.append(projection_fact("o", site.o))
    return [*facts, call_fact(site.call), _proof(site)]


def extras_of(site: AttentionSite) -> list[str]:
    """What a site has beside heads, mask and rotary embedding, each in a word or two."""
    biased = [n for n in "qkvo" if (p := getattr(site, n)) is not None and p.bias is not None]
    adapted = [n for n in "qkvo" if (p := getattr(site, n)) is not None and p.adapters]
    words = ["bias " + "".join(biased)] if biased else []
    words += ["adapters " + "".join(adapted)] if adapted else []
    steps = (*_before_scores(site), *_on_scores(site), *_after(site))
    words += [f.short for f in steps if f.short and f.name != "rope"]
    if site.o is None:
        words.append("no output projection")
    if abs(site.scale - site.head_dim**-0.5) > 1e-6 * abs(site.scale):
        words.append(f"scale {site.scale:.4g}")
    return list(dict.fromkeys(words))


def heads_text(site: AttentionSite) -> str:
    return f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"


def dims_text(site: AttentionSite) -> str:
    return f"{site.head_dim}" if site.head_dim == site.v_head_dim else f"{site.head_dim}/{site.v_head_dim}"


def mask_text(mask: Mask) -> str:
    return mask.kind if mask.window is None else f"{mask.kind} {mask.window}"


def rope_text(rope: Rope | None, head_dim: int) -> str:
    if rope is None:
        return "–"
    turned = 2 * len(rope.inv_freq)
    part = "" if turned == head_dim else f" {turned}/{head_dim}"
    scaling = "" if rope.attention_scaling == 1.0 else f" ×{rope.attention_scaling:.3g}"
    return f"{rope.style}{part}{scaling}"


def proof_text(site: AttentionSite) -> str:
    return "not proved" if not site.proved else f"{site.max_error or 0.0:.1e}"


def _kind(site: AttentionSite) -> Fact:
    if site.kind == "cross":
        width = "" if site.memory_size is None else f" [batch, length, {site.memory_size}]"
        text = f"cross-attention: keys and values come from other states{width} than the queries"
    else:
        text = "self-attention: queries, keys and values come from the same hidden states"
    return Fact(name="kind", text=text, short=site.kind, origin="what the projections read, in the graph")


def place_fact(site: AttentionSite) -> Fact:
    if site.place == "graph":
        text = "no module of its own: only fs.rewrite can replace it"
    else:
        text = "a module of its own, which fs.swap_ can replace"
    origin = "the modules in which its nodes were computed" + (f"; core node {site.anchor}" if site.anchor else "")
    return Fact(name="place", text=text, short=site.place, origin=origin)


def heads_fact(site: AttentionSite) -> Fact:
    shared = "" if site.heads == site.kv_heads else f" on {site.kv_heads} key/value heads"
    values = "" if site.head_dim == site.v_head_dim else f" (values {site.v_head_dim})"
    text = f"{site.heads} query heads{shared}, {site.head_dim} channels each{values}, hidden size {site.hidden_size}"
    return Fact(name="heads", text=text, short=heads_text(site), origin="numbered entries sent through the reshapes")


def projection_fact(side: str, projection: Projection) -> Fact:
    text = ref_text(projection.weight)
    text += ", no bias" if projection.bias is None else f", bias {ref_text(projection.bias)}"
    for adapter in projection.adapters:
        text += f", plus {adapter.scale:g} × {ref_text(adapter.up)} @ {ref_text(adapter.down)}"
    return Fact(name=side, text=text, origin="the product in the graph and the parameter behind it")


def ref_text(ref: WeightRef) -> str:
    rows = ""
    if ref.rows is not None:
        shown = [f"{a}–{b - 1}" for a, b in ref.rows[:4]] + (["…"] if len(ref.rows) > 4 else [])
        rows = f" rows {', '.join(shown)}"
    text = f"{ref.name}{rows}{' (stored [in, out])' if ref.transposed else ''}"
    return " then ".join((text, *map(ref_text, ref.more)))


def _before_scores(site: AttentionSite) -> list[Fact]:
    facts = []
    if site.clip is not None:
        text = f"q, k and v are clamped to ±{site.clip:g}"
        facts.append(Fact(name="clip", text=text, short=f"clip {site.clip:g}", origin="constants in the graph"))
    for side, norm in (("q", site.q_norm), ("k", site.k_norm), ("v", site.v_norm)):
        if norm is not None:
            sides = "v" if side == "v" else "q/k"
            facts.append(_norm(f"{side} norm", norm, f"{sides} {norm.kind} norm"))
    if site.v_scale != 1.0:
        text = f"values times {site.v_scale:g}"
        facts.append(Fact(name="v scale", text=text, short=f"v × {site.v_scale:g}", origin="constants in the graph"))
    if site.rope is not None:
        facts.append(_rope(site.rope, site.head_dim, site.norm_after_rope and site.q_norm is not None))
    if site.temperature is not None:
        t = site.temperature
        text = f"queries times 1 + {t.scale:g} · log(1 + ⌊(position + {t.offset}) / {t.length}⌋)"
        text += ", positions counted through the padding" if t.padding else ""
        facts.append(Fact(name="temperature", text=text, short="temperature", origin="run at every position"))
    return facts


def _norm(name: str, norm: Norm, short: str) -> Fact:
    over = "all heads at once" if norm.across_heads else "each head"
    weight = "no weight" if norm.weight is None else f"weight {ref_text(norm.weight)}"
    if norm.offset:
        weight += f" + {norm.offset:g}"
    bias = "" if norm.bias is None else f", bias {ref_text(norm.bias)}"
    own = ", weights of its own for each head" if norm.per_head else ""
    across = " across heads" if norm.across_heads else ""
    text = f"{norm.kind} norm over {over}, eps {norm.eps:g}, {weight}{bias}{own}"
    return Fact(name=name, text=text, short=short + across, origin="its operations in the graph")


def _rope(rope: Rope, head_dim: int, before_norm: bool) -> Fact:
    turned = 2 * len(rope.inv_freq)
    part = "all channels" if turned == head_dim else f"the first {turned} of {head_dim} channels"
    text = f"{part} turned, pairs {rope.style}, frequencies {rope.inv_freq[0]:.6g} … {rope.inv_freq[-1]:.6g}"
    if rope.attention_scaling != 1.0:
        text += f", tables times {rope.attention_scaling:g}"
    if before_norm:
        text += ", before the norm"
    if rope.limit is not None:
        text += f", for inputs of up to {rope.limit} tokens"
    origin = "the step was run on random input at every position and the turns read off"
    return Fact(name="rope", text=text, short=rope_text(rope, head_dim), origin=origin)


def _scale(site: AttentionSite) -> Fact:
    usual = abs(site.scale - site.head_dim**-0.5) <= 1e-6 * abs(site.scale)
    text = f"{site.scale:.6g}" + (f" = {site.head_dim}^−½" if usual else f" (the usual is {site.head_dim**-0.5:.6g})")
    return Fact(name="scale", text=text, origin="the constant factors on q, k and the scores")


def _mask(site: AttentionSite) -> Fact:
    words = {
        "causal": "causal: a token sees itself and what is before it",
        "window": f"window: a token sees itself and the {(site.mask.window or 1) - 1} tokens before it",
        "chunked": f"chunked: a token sees what is before it in its chunk of {site.mask.window}",
        "bidirectional": "bidirectional: every token sees every token",
    }
    text = words.get(site.mask.kind, mask_text(site.mask))
    return Fact(name="mask", text=text, short=mask_text(site.mask), origin="the mask was evaluated at two lengths")


def _on_scores(site: AttentionSite) -> list[Fact]:
    facts = []
    if site.softcap is not None:
        text = f"scores s become {site.softcap:g} · tanh(s / {site.softcap:g})"
        facts.append(
            Fact(name="softcap", text=text, short=f"softcap {site.softcap:g}", origin="constants in the graph")
        )
    if site.alibi is not None:
        text = f"ALiBi, slopes {site.alibi[0]:.6g} … {site.alibi[-1]:.6g}"
        facts.append(Fact(name="alibi", text=text, short="alibi", origin="the bias was evaluated, and is linear"))
    if site.sinks is not None:
        text = f"one learned logit a head joins the softmax: {ref_text(site.sinks)}"
        facts.append(Fact(name="sinks", text=text, short="sinks", origin="the column that is joined and dropped"))
    if site.dropout:
        text = f"{site.dropout:g} of the probabilities while training"
        facts.append(
            Fact(name="dropout", text=text, short=f"dropout {site.dropout:g}", origin="a call in training mode")
        )
    return facts


def _after(site: AttentionSite) -> list[Fact]:
    facts = []
    if site.output_dropout:
        short = f"output dropout {site.output_dropout:g}"
        text = f"{site.output_dropout:g} of the output while training"
        facts.append(Fact(name="output dropout", text=text, short=short, origin="a call in training mode"))
    if site.o_norm is not None:
        facts.append(_norm("output norm", site.o_norm, f"output {site.o_norm.kind} norm"))
    if site.gate is not None:
        facts.append(_gate(site.gate))
    return facts


def _gate(gate: Gate) -> Fact:
    each = "one for each head" if gate.per_head else "one for each channel"
    text = f"the heads' outputs times {gate.activation}({projection_fact('', gate.projection).text}), {each}"
    return Fact(name="gate", text=text, short=f"{gate.activation} gate", origin="the product after the core")


def call_fact(call: CallContract) -> Fact:
    roles = ("hidden", "memory", "mask", "pairs", "padding", "positions", "cos", "sin", "cache", "residual")
    parts = [f"{role} {_path(path)}" for role in roles if (path := getattr(call, role)) is not None]
    returned = "a tensor" if call.outputs is None else f"item {call.output_index} of {call.outputs}"
    number = "" if call.cache_index is None else f"; cache layer {call.cache_index}"
    more = ["time first"] if call.time_first else []
    more += ["masks are true where a key is hidden"] if call.hides else []
    more += ["the owner hides what the mask hides, whatever it is passed"] if call.own_mask else []
    more += ["what it returns is a list"] if call.listed else []
    text = "; ".join((", ".join(parts), f"returns {returned}{number}", *more))
    return Fact(name="call", text=text, origin="observed by hooks in a call of the model")


def _path(path: ArgPath) -> str:
    where = path.keyword if path.keyword is not None else f"argument {path.position}"
    return where if path.item is None else f"{where}[{path.item}]"


def _proof(site: AttentionSite) -> Fact:
    if not site.proved:
        return Fact(name="proof", text="not proved", short="not proved", origin="inspect(verify=False)")
    text = f"differs from the model's own code by {site.max_error or 0.0:.1e} (relative, fp32)"
    origin = "attention rebuilt from these facts alone, on random weights and hidden states"
    return Fact(name="proof", text=text, short=proof_text(site), origin=origin)


def checked_text(report: AttentionReport) -> str:
    """Up to where what depends on the position was looked at; "" where that was not recorded."""
    if report.checked_length is None:
        return ""
    return f"masks, positions and scales were compared up to {report.checked_length} tokens"
