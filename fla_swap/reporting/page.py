"""The report as one HTML page that needs nothing else: no script, no network, no files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from fla_swap.reporting.drawing import KINDS, Bar, draw, legend
from fla_swap.reporting.explanation import advice_of
from fla_swap.reporting.facts import checked_text, extras_of, facts_of, heads_text, mask_text, proof_text, rope_text
from fla_swap.reporting.linear import linear_words
from fla_swap.reporting.source import source_lines
from fla_swap.types import AttentionReport, AttentionSite, NearMiss, SwapPlan

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --dim: #66707a; --paper: #fff; --line: #d9dee3; --mark: #fff1c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #98a2ad; --paper: #15191d; --line: #333b43; --mark: #4a3d10; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.lead, .dim { color: var(--dim); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; }
details table { margin: .5rem 0 .5rem 1rem; width: calc(100% - 1rem); font-size: .93em; }
code, pre, svg { font-family: ui-monospace, monospace; }
pre { overflow-x: auto; border-left: 3px solid var(--line); padding-left: .8rem; margin: .4rem 0 .4rem 1rem; }
pre mark { background: var(--mark); color: inherit; display: inline-block; min-width: 100%; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1.2em; border-radius: 2px; }
.held { color: #2f8f4e; } .failed { color: #c2402c; font-weight: 600; }
svg text { fill: var(--dim); font-size: 10px; }
"""


def report_html(report: AttentionReport, plan: SwapPlan | None = None) -> str:
    """One self-contained page: the layers drawn, each site's facts, each near miss with its slots and its code.

    `plan`: what it swaps and keeps is drawn too. Code is shown where its file can be read on this machine.
    """
    count, missed = len(report.sites), len(report.near_misses)
    proved, linear = sum(s.proved for s in report.sites), len(report.linear)
    more = f", {linear} linear layer{_s(linear)}" if linear else ""
    lead = f"{count} attention site{_s(count)}, {proved} proved{more}, {missed} not understood; {report.seconds:.1f} s"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(report.model)}: attention</title><style>{STYLE}</style></head><body>",
        f'<h1>{escape(report.model)}</h1><p class="lead">{lead}</p>',
        _layers(report, plan),
    ]
    if report.near_misses:
        parts += ["<h2>Not understood</h2>", *(_miss(m) for m in report.near_misses)]
    if report.sites:
        parts += ["<h2>Sites</h2>", *(_site(s) for s in report.sites)]
    if report.linear:
        parts += ["<h2>Linear already</h2>", *(_site(s) for s in report.linear)]
    parts += _list("Softmaxes that belong to no attention", report.unclaimed)
    parts += _list("Notes", [*report.notes, *filter(None, [checked_text(report)])])
    return "\n".join([*parts, "</body></html>", ""])


def in_model_order(report: AttentionReport) -> list[AttentionSite | NearMiss]:
    """Sites as they come, with each near miss and linear layer where its name would stand among them."""
    order: list[AttentionSite | NearMiss] = list(report.sites)
    others: list[AttentionSite | NearMiss] = [*report.near_misses, *report.linear]
    for miss in sorted(others, key=lambda m: _natural(m.fqn)):
        before = [n for n, item in enumerate(order) if _natural(item.fqn) <= _natural(miss.fqn)]
        order.insert(before[-1] + 1 if before else 0, miss)
    return order


def _natural(fqn: str) -> list[tuple[bool, int, str]]:
    pieces = [p for p in re.split(r"(\d+)|\.", fqn) if p]
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in pieces]


def _layers(report: AttentionReport, plan: SwapPlan | None) -> str:
    swapped = {} if plan is None else {layer.site.fqn: layer.mixer for layer in plan.layers}
    kept = () if plan is None else plan.kept
    bars = [_bar(number, item, swapped, kept) for number, item in enumerate(in_model_order(report))]
    if not bars:
        return "<p>No attention was found.</p>"
    keys = "".join(f'<span class="key" style="background:{KINDS[k]}"></span>{k}' for k in legend(bars))
    return f"<h2>Layers</h2>{draw(bars)}<p>{keys}</p>"


def _bar(number: int, item: AttentionSite | NearMiss, swapped: dict[str, str], kept: tuple[str, ...]) -> Bar:
    if isinstance(item, NearMiss):
        title = f"{item.fqn or '(the model)'}: not understood, stopped at {item.slot}: {item.reason}"
        return Bar(kind="not understood", label=str(number), title=title, target=_anchor(item))
    title = f"{item.fqn}: {', '.join(_words(item))}; proof {proof_text(item)}"
    if item.fqn in swapped:
        title += f"; swapped for {swapped[item.fqn]}"
    elif item.fqn in kept:
        title += "; kept as it is"
    kind = "cross-attention" if item.kind == "cross" else "linear" if item.recurrence is not None else item.mask.kind
    dotted = item.fqn in swapped
    return Bar(kind=kind, label=str(number), title=title, target=_anchor(item), dashed=dotted, faint=not item.proved)


def _words(site: AttentionSite) -> list[str]:
    heads = f"{heads_text(site)} heads"
    if site.recurrence is not None:
        return [site.kind, heads, *linear_words(site)]
    return [heads, mask_text(site.mask), f"rope {rope_text(site.rope, site.head_dim)}", *extras_of(site)]


def _anchor(item: AttentionSite | NearMiss) -> str:
    word = "site" if isinstance(item, AttentionSite) else "miss"
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{word}-{item.fqn}-{item.anchor}")


def _site(site: AttentionSite) -> str:
    facts = facts_of(site)
    rows = [
        f'<tr><th>{escape(f.name)}</th><td>{escape(f.text)}</td><td class="dim">{escape(f.origin)}</td></tr>'
        for f in facts
    ]
    words = [site.kind, f"{heads_text(site)} heads of {site.head_dim}", mask_text(site.mask), *extras_of(site)]
    head = f'{site.layer} <code>{escape(site.fqn)}</code> <span class="dim">{escape(", ".join(words))}</span>'
    return (
        f'<details id="{_anchor(site)}"><summary>{head}</summary><table>{"".join(rows)}</table>'
        f"{_code(site.source)}</details>"
    )


def _miss(miss: NearMiss) -> str:
    held = " ".join(f'<span class="held">{escape(slot)} ✓</span>' for slot in miss.passed)
    core = f' <span class="dim">core node {escape(miss.anchor)}</span>' if miss.anchor else ""
    advice = "".join(f"<li>{escape(line)}</li>" for line in advice_of(miss))
    return (
        f'<details open id="{_anchor(miss)}"><summary><code>{escape(miss.fqn or "(the model)")}</code>{core}</summary>'
        f'<p>{held} <span class="failed">{escape(miss.slot)} ✗</span> {escape(miss.reason)}</p>'
        f'{_code(miss.source)}<p class="dim">What can be done:</p><ul>{advice}</ul></details>'
    )


def _code(source: str) -> str:
    where = f'<p class="dim"><code>{escape(source or "no source line")}</code></p>'
    code = source_lines(source)
    if code is None:
        return where
    lines = [
        f"<mark>{number:>5}  {escape(text)}</mark>" if here else f"{number:>5}  {escape(text)}"
        for number, text, here in code.lines
    ]
    return f"{where}<pre>{chr(10).join(lines)}</pre>"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2><ul>{items}</ul>"] if lines else []


def _s(count: int) -> str:
    return "" if count == 1 else "s"
