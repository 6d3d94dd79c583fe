"""All that is known about one part of a model, in words; and what can be done about a near miss."""

from __future__ import annotations

import difflib

from fla_swap.reporting.facts import checked_text, facts_of
from fla_swap.reporting.linear import linear_facts
from fla_swap.reporting.source import source_lines
from fla_swap.types import AttentionReport, AttentionSite, NearMiss

_RECOGNISER = (
    "write a recogniser for slot {slot!r} (one class; CONTRIBUTING.md walks through one) and pass it as "
    "fs.inspect(model, patterns=[…])"
)
_BY_HAND = "state the site by hand, fs.inspect(model, sites=[fs.AttentionSite(…)]): it is proved like a found one"
_ISSUE = "file an issue with this text and the code around the source line"

_ADVICE = {
    "core": (_RECOGNISER.format(slot="core"), _ISSUE),
    "scores": (_RECOGNISER.format(slot="scores"), _ISSUE),
    "q": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "k": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "v": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "projection": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "norm": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "rope": (_RECOGNISER.format(slot="path"), _BY_HAND),
    "mask": (
        "a site can state causal, windowed, chunked and bidirectional masks and ALiBi: if this mask is one of them, "
        + _BY_HAND,
        _ISSUE,
    ),
    "output": (_BY_HAND, _ISSUE),
    "owner": (
        "move the attention into a module of its own, from hidden states to the output projection's result",
        _BY_HAND,
    ),
    "recurrence": (_ISSUE,),
    "decay": (_ISSUE,),
    "conv": (_ISSUE,),
    "beta": (_ISSUE,),
    "call": ("call the module with the hidden state as one argument, and the mask as another", _ISSUE),
    "proof": (
        "the code computes something that the facts above do not say: look for it around the source line, and "
        + _RECOGNISER.format(slot="path"),
        _ISSUE,
    ),
}


def advice_of(miss: NearMiss) -> tuple[str, ...]:
    """What to do next, the most promising first."""
    return _ADVICE.get(miss.slot, (_BY_HAND, _ISSUE))


def explain(report: AttentionReport, name: str) -> str:
    """Everything that the report knows about `name`, a module: sites and near misses in it, or the site it is part of.

    Raises KeyError when the report has nothing there; it lists names that are near.
    """
    known = (*report.sites, *report.linear)
    sites = [s for s in known if _within(s.fqn, name)] or [s for s in known if _within(name, s.fqn)]
    misses = [m for m in report.near_misses if _within(m.fqn, name)]
    loose = [line for line in report.unclaimed if _within(line.split(" ")[0], name)]
    if not (sites or misses or loose):
        raise KeyError(_unknown(report, name))
    fqns = {s.fqn for s in sites} | {m.fqn for m in misses}
    notes = [n for n in report.notes if n.split(":")[0] in fqns]
    parts = [_site(s) for s in sites] + [_miss(m) for m in misses]
    parts += [f"{line}: a softmax that belongs to no attention" for line in loose]
    checked = [checked_text(report)] if sites and report.checked_length else []
    return "\n\n".join([*parts, *(f"note: {note}" for note in notes), *checked])


def _within(fqn: str, name: str) -> bool:
    return not name or fqn == name or fqn.startswith((f"{name}.", f"{name}#"))


def _unknown(report: AttentionReport, name: str) -> str:
    known = [s.fqn for s in (*report.sites, *report.linear)] + [m.fqn for m in report.near_misses if m.fqn]
    parents = {".".join(k.split(".")[:n]) for k in known for n in range(1, len(k.split(".")) + 1)}
    near = difflib.get_close_matches(name, sorted(parents), n=5, cutoff=0.5) or known[:5]
    return f"the report on {report.model} has no attention in {name!r}; names near it: {near}"


def _site(site: AttentionSite) -> str:
    linear = site.recurrence is not None
    facts = linear_facts(site) if linear else facts_of(site)
    wide, what = max(len(f.name) for f in facts), "linear already" if linear else f"attention layer {site.layer}"
    lines = [f"{site.fqn or '(the model)'}: {what}, {'proved' if site.proved else 'not proved'}"]
    lines += [f"  {f.name:<{wide}}  {f.text}  [{f.origin}]" for f in facts]
    return "\n".join([*lines, f"  {'source':<{wide}}  {site.source}"])


def _miss(miss: NearMiss) -> str:
    core = f" (core node {miss.anchor})" if miss.anchor else ""
    held = ", ".join(miss.passed) or "nothing"
    lines = [
        f"{miss.fqn or '(the model)'}: an attention that is not understood{core}",
        f"  held     {held}",
        f"  failed   {miss.slot}: {miss.reason}",
        f"  source   {miss.source or 'unknown'}",
    ]
    code = source_lines(miss.source)
    if code is not None:
        lines += [f"  {'→' if here else ' '} {number:>5}  {text}".rstrip() for number, text, here in code.lines]
    lines += [f"  next     {advice}" for advice in advice_of(miss)]
    return "\n".join(lines)


def nothing_found(report: AttentionReport) -> str:
    """Why a report without sites has none, as an error says it."""
    if not report.near_misses:
        more = f"; its softmaxes are {list(report.unclaimed)}" if report.unclaimed else ""
        more += "".join(f"; {note}" for note in report.notes)
        return f"{report.model} has no attention: no fused attention call, and no softmax between two products{more}"
    first = report.near_misses[0]
    count = len(report.near_misses)
    return (
        f"{report.model}: {count} layers that mix tokens, none understood. The one that got furthest, {first.fqn}, "
        f"stopped at {first.slot!r}: {first.reason} ({first.source}). All of them are in the error's "
        ".report.near_misses; a recogniser of your own can be passed as patterns="
    )
