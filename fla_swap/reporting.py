"""An `AttentionReport` for people: a Rich table of the sites and one of the near misses."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from fla_swap.types import AttentionReport, AttentionSite, Norm


def report_table(report: AttentionReport) -> Group:
    """A Rich renderable; print it with `rich.print(report_table(report))`."""
    parts: list[Table | str] = [_sites(report)]
    if report.near_misses:
        parts.append(_misses(report))
    parts += [f"belongs to no site: {line}" for line in report.unclaimed]
    parts += [f"note: {line}" for line in report.notes]
    return Group(*parts)


def _sites(report: AttentionReport) -> Table:
    table = Table(title=f"{report.model}: {len(report.sites)} attention sites ({report.seconds:.1f} s)")
    for column in ("layer", "module", "heads", "dims", "mask", "rope", "extras", "proof"):
        table.add_column(column)
    for site in report.sites:
        heads = f"{site.heads}" if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
        dims = f"{site.head_dim}" if site.head_dim == site.v_head_dim else f"{site.head_dim}/{site.v_head_dim}"
        mask = site.mask.kind if site.mask.window is None else f"{site.mask.kind} {site.mask.window}"
        proof = "not proved" if not site.proved else f"{site.max_error or 0.0:.1e}"
        table.add_row(str(site.layer), site.fqn, heads, dims, mask, _rope(site), _extras(site), proof)
    return table


def _rope(site: AttentionSite) -> str:
    if site.rope is None:
        return "–"
    turned = 2 * len(site.rope.inv_freq)
    part = "" if turned == site.head_dim else f" {turned}/{site.head_dim}"
    scaling = "" if site.rope.attention_scaling == 1.0 else f" ×{site.rope.attention_scaling:.3g}"
    return f"{site.rope.style}{part}{scaling}"


def _extras(site: AttentionSite) -> str:
    words = []
    biased = [n for n in "qkvo" if getattr(site, n).bias is not None]
    if biased:
        words.append("bias " + "".join(biased))
    if site.q_norm is not None:
        words.append(_norm(site.q_norm))
    if site.softcap is not None:
        words.append(f"softcap {site.softcap:g}")
    if site.sinks is not None:
        words.append("sinks")
    if site.alibi is not None:
        words.append("alibi")
    if site.dropout:
        words.append(f"dropout {site.dropout:g}")
    if abs(site.scale - site.head_dim**-0.5) > 1e-6 * site.scale:
        words.append(f"scale {site.scale:.4g}")
    return ", ".join(words) or "–"


def _norm(norm: Norm) -> str:
    return f"q/k {norm.kind} norm" + (" across heads" if norm.across_heads else "")


def _misses(report: AttentionReport) -> Table:
    table = Table(title=f"{len(report.near_misses)} attention cores that are not understood")
    for column in ("module", "slot", "reason", "source"):
        table.add_column(column, overflow="fold")
    for miss in report.near_misses:
        table.add_row(miss.fqn, miss.slot, miss.reason, miss.source)
    return table
