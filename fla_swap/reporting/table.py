"""The report as Rich tables, and as the text of them."""

from __future__ import annotations

import io
import shutil

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from fla_swap.reporting.facts import checked_text, dims_text, extras_of, heads_text, mask_text, proof_text, rope_text
from fla_swap.reporting.linear import linear_words
from fla_swap.types import AttentionReport

LEAST_WIDTH = 100


def report_table(report: AttentionReport) -> Group:
    """A Rich renderable of everything in the report; `rich.print(report)` and `print(report)` show it too."""
    parts: list[Table | str] = [_sites(report)]
    if report.near_misses:
        parts.append(_misses(report))
    parts += [escape(f"belongs to no site: {line}") for line in report.unclaimed]
    parts += [escape(f"note: {line}") for line in report.notes]
    if report.sites and (checked := checked_text(report)):
        parts.append(escape(checked))
    return Group(*parts)


def report_text(report: AttentionReport) -> str:
    """The same as plain text, as wide as the terminal (at least 100 columns)."""
    width = max(shutil.get_terminal_size((160, 24)).columns, LEAST_WIDTH)
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(report_table(report))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _sites(report: AttentionReport) -> Table:
    count, linear = len(report.sites), len(report.linear)
    more = f" and {linear} linear layer{'' if linear == 1 else 's'}" if linear else ""
    title = f"{report.model}: {count} attention site{'' if count == 1 else 's'}{more} ({report.seconds:.1f} s)"
    table = Table(title=escape(title))
    for column in ("layer", "name", "kind", "place", "heads", "dims", "mask", "rope", "extras", "proof"):
        table.add_column(column, overflow="fold")
    for site in report.sites:
        cells = (site.kind, site.place, heads_text(site), dims_text(site), mask_text(site.mask))
        extras = ", ".join(extras_of(site)) or "–"
        rope = rope_text(site.rope, site.head_dim)
        table.add_row(str(site.layer), *map(escape, (site.fqn, *cells, rope, extras, proof_text(site))))
    for site in report.linear:
        extras = ", ".join(linear_words(site)) or "–"
        cells = (site.kind, site.place, heads_text(site), dims_text(site), "–", "–", extras, proof_text(site))
        table.add_row("–", *map(escape, (site.fqn, *cells)))
    return table


def _misses(report: AttentionReport) -> Table:
    count = len(report.near_misses)
    table = Table(title=f"{count} attention core{' that is' if count == 1 else 's that are'} not understood")
    for column in ("name", "stopped at", "reason", "source", "what held"):
        table.add_column(column, overflow="fold")
    for miss in report.near_misses:
        held = " ".join(miss.passed) or "–"
        table.add_row(*map(escape, (miss.fqn or "(the model)", miss.slot, miss.reason, miss.source, held)))
    return table
