"""A few lines of code around a source line, when the file can be read here."""

from __future__ import annotations

import linecache
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SourceLines:
    """`lines` are (number, text, whether it is the line itself)."""

    file: str
    lines: tuple[tuple[int, str, bool], ...]


def source_lines(source: str, around: int = 3) -> SourceLines | None:
    """The lines around `file:line`; None when that is no line of a readable file."""
    file, _, number = source.rpartition(":")
    if not file or not number.isdigit():
        return None
    wanted, everything = int(number), linecache.getlines(file)
    if not 1 <= wanted <= len(everything):
        return None
    first, last = max(1, wanted - around), min(len(everything), wanted + around)
    chosen = tuple((n, everything[n - 1].rstrip("\n"), n == wanted) for n in range(first, last + 1))
    return SourceLines(file=file, lines=chosen)
