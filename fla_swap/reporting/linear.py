"""The facts of a layer that is linear already, in words."""

from __future__ import annotations

from fla_swap.reporting.facts import Fact, call_fact, heads_fact, place_fact, projection_fact, ref_text
from fla_swap.types import AttentionSite, Recurrence


def linear_facts(site: AttentionSite) -> list[Fact]:
    """Everything that a linear layer states, in the order of the computation."""
    read = site.recurrence
    assert read is not None
    origin = "what the projected channels go into, in the graph"
    rule = f"{read.rule}: no softmax; {'a swap' if site.proved else 'unproved, a swap'} for {read.mixer!r} is exact"
    facts = [Fact(name="kind", text=rule, short=site.kind, origin=origin), place_fact(site), heads_fact(site)]
    facts += [projection_fact(side, getattr(site, side)) for side in "qkv"]
    facts += [f for f in (_convolution(read), _decay(read), _strength(read)) if f is not None]
    if read.skip is not None:
        text = f"values times {ref_text(read.skip)} are added to the output"
        facts.append(Fact(name="skip", text=text, short="skip", origin="the one vector without another place"))
    scale = f"{read.scale:.6g}" + (", q and k of unit length" if read.unit else "")
    facts.append(Fact(name="scale", text=scale, origin="what follows q in the graph, and the proof"))
    facts += [f for f in _after(read) if f is not None]
    if site.o is not None:
        facts.append(projection_fact("o", site.o))
    facts.append(call_fact(site.call))
    text = "not proved"
    if site.proved:
        text = f"differs from the module's own output by {site.max_error or 0.0:.1e} (relative, fp32)"
    origin = f"{read.mixer!r} rebuilt from these facts, whole and with its state carried on, on random weights"
    return [*facts, Fact(name="proof", text=text, origin=origin)]


def linear_words(site: AttentionSite) -> list[str]:
    """What a linear layer has beside its rule, each in a word or two."""
    return [f.short for f in linear_facts(site) if f.short and f.name not in ("kind", "place", "heads")]


def _convolution(read: Recurrence) -> Fact | None:
    if read.conv is None:
        if read.activation is None:
            return None
        text, short = f"{read.activation} of q, k and v", f"{read.activation} q/k/v"
        return Fact(name="activation", text=text, short=short, origin="its operation in the graph")
    behind = "" if read.activation is None else f", {read.activation} behind it"
    bias = "no bias" if read.conv_bias is None else f"bias {ref_text(read.conv_bias)}"
    text = f"causal, {read.taps} taps for each channel of q, k and v: {ref_text(read.conv)}, {bias}{behind}"
    return Fact(name="convolution", text=text, short=f"conv {read.taps}", origin="its operation in the graph")


def _decay(read: Recurrence) -> Fact:
    rate = "" if read.rate is None else ref_text(read.rate)
    if read.decay is None:
        text = f"exp(−rate) a token and head, rates {rate}"
        return Fact(name="decay", text=text, origin="a stored number for each head, and the proof")
    rank = "" if read.decay_rank is None else f" of rank {read.decay_rank}"
    bias = "" if read.dt_bias is None else f" + {ref_text(read.dt_bias)}"
    made = projection_fact("", read.decay).text
    text = f"exp(−exp({rate}) · softplus(x{bias})), x{rank}: {made}"
    return Fact(name="decay", text=text, origin="the softplus in the graph and what is multiplied with it")


def _strength(read: Recurrence) -> Fact | None:
    if read.beta is None:
        return None
    text = f"{read.beta_limit:g} · sigmoid of {projection_fact('', read.beta).text}"
    short = "" if read.beta_limit == 1 else f"strength to {read.beta_limit:g}"
    return Fact(name="write strength", text=text, short=short, origin="the sigmoid of one channel a head")


def _after(read: Recurrence) -> list[Fact | None]:
    norm = gate = None
    if read.norm is not None:
        weight = "no weight" if read.norm.weight is None else f"weight {ref_text(read.norm.weight)}"
        text = f"{read.norm.kind} norm over {read.norm_width} channels, eps {read.norm.eps:g}, {weight}"
        short = f"output {read.norm.kind} norm"
        norm = Fact(name="output norm", text=text, short=short, origin="its operations in the graph")
    if read.gate is not None:
        rank = "" if read.gate_rank is None else f" of rank {read.gate_rank}"
        text = f"outputs times {read.gate_activation} of a projection{rank}: {projection_fact('', read.gate).text}"
        short = f"{read.gate_activation} gate"
        gate = Fact(name="gate", text=text, short=short, origin="the product before the output projection")
    return [gate, norm] if read.gate_first else [norm, gate]
