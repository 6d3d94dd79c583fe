"""The layers of a model as inline SVG: one bar each, in model order, coloured by what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

KINDS = {
    "causal": "#3f7fbf",
    "window": "#3aa39b",
    "chunked": "#8a6fc4",
    "bidirectional": "#c79a2b",
    "cross-attention": "#b0628f",
    "linear": "#5d8f3a",
    "not understood": "#c2402c",
}
"""Colours by mask kind; a bar of a kind that is not here is an error."""

STEP, WIDTH, HEIGHT, LABELS, A_ROW = 24, 20, 64, 16, 40


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One attention layer. `target`: the id on the page that a click leads to; `dashed` swapped, `faint` not proved."""

    kind: str
    label: str
    title: str
    target: str
    dashed: bool = False
    faint: bool = False


def legend(bars: Sequence[Bar]) -> list[str]:
    """The kinds that occur, in the order of `KINDS`."""
    present = {bar.kind for bar in bars}
    return [kind for kind in KINDS if kind in present]


def draw(bars: Sequence[Bar]) -> str:
    """`bars` as one `<svg>` element, 40 to a row."""
    rows = -(-len(bars) // A_ROW)
    width, height = STEP * min(len(bars), A_ROW), rows * (HEIGHT + LABELS)
    body = "".join(_draw_one(number, bar) for number, bar in enumerate(bars))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{len(bars)} attention layers in model order">{body}</svg>'
    )


def _draw_one(number: int, bar: Bar) -> str:
    x, y = STEP * (number % A_ROW), (HEIGHT + LABELS) * (number // A_ROW)
    style = f'fill="{KINDS[bar.kind]}"'
    if bar.dashed:
        style = f'fill="{KINDS[bar.kind]}" fill-opacity=".25" stroke="{KINDS[bar.kind]}" stroke-dasharray="3 2"'
    elif bar.faint:
        style += ' fill-opacity=".5"'
    return (
        f'<a href="#{escape(bar.target)}"><rect x="{x + 1}" y="{y + 1}" width="{WIDTH}" height="{HEIGHT - 2}" rx="2" '
        f"{style}><title>{escape(bar.title)}</title></rect></a>"
        f'<text x="{x + 1 + WIDTH / 2:g}" y="{y + HEIGHT + 11}" text-anchor="middle">{escape(bar.label)}</text>'
    )
