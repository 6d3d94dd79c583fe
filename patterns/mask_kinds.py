"""The kinds of masks that a site states and an operator computes: what each shows, how a table is told to be one, and
the line that ALiBi adds to the scores. Tables come whole (`mask`), or in blocks of query rows where they are too large.

Legend: T queries, S keys, R rows in a block, N heads (or batch and heads).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fla_swap.arguments import HIDDEN
from fla_swap.types import Mask

KINDS = "neither causal, a window, chunked, bidirectional nor local"


class MaskRefused(Exception):
    """The mask is not a function of (query position, key position) alone, or of no kind that can be stated."""


def expected(
    mask: Mask, length: int, start: int = 0, *, keys: int | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """bool [T, S]: which keys (columns) each query (row) sees; chunks are counted from the token `start`.

    Query t stands at key t. `keys` None: as many as queries. `rows`: these queries alone, [R, S].
    """
    first, last = (0, length) if rows is None else rows
    j, i = torch.arange(length if keys is None else keys)[None, :] - start, torch.arange(first, last)[:, None] - start
    if mask.kind == "bidirectional":
        return torch.ones(last - first, j.shape[1], dtype=torch.bool)
    if mask.kind == "local":
        return (i - j).abs() < (mask.window or length)
    seen = j <= i
    if mask.kind == "window":
        seen = seen & (i - j < (mask.window or length))
    if mask.kind == "chunked":
        seen = seen & (i // (mask.window or length) == j // (mask.window or length))
    return seen


def candidates(last_row: Tensor, first_column: Tensor) -> list[Mask]:
    """The kinds that the last query's keys [S] and the first key's queries [T] leave, the plainest first."""
    count, hidden = int(last_row.sum()), torch.nonzero(~first_column)
    found = [Mask(kind="causal"), Mask(kind="bidirectional")]
    if count:
        found += [Mask(kind="window", window=count), Mask(kind="local", window=count)]
    if len(hidden):
        found.append(Mask(kind="chunked", window=int(hidden[0])))
    return found


def explain(found: Iterable[Mask], seen: Tensor, length: int, start: int = 0) -> list[Mask]:
    """Those of the kinds that show the queries from `start` on exactly `seen` [R, S], of `length` queries."""
    keys, rows = seen.shape[1], (start, start + seen.shape[0])
    return [mask for mask in found if torch.equal(expected(mask, length, keys=keys, rows=rows), seen)]


def split(kind: str, value: Tensor, factor: float) -> tuple[Tensor, Tensor | None]:
    """What a mask leaves visible (bool), and what else it adds to the scores (None: nothing), in its own shape.

    `kind`: "add" to the scores, where `factor` multiplies them afterwards; "keep" or "drop", a table of truth values.
    """
    if kind != "add":
        if not bool(((value == 0) | (value == 1)).all()):
            raise MaskRefused("the attention weights are multiplied by a table that is not 0 and 1")
        return (value.bool() if kind == "keep" else ~value.bool()), None
    value = value * factor
    hidden = value <= HIDDEN
    rest = value.masked_fill(hidden, 0.0)
    return ~hidden, rest if bool((rest != 0).any()) else None


def for_all(seen: Tensor) -> Tensor:
    """bool [T, S], the one mask that all heads and rows of the batch have. Raises MaskRefused when they differ."""
    flat = seen.reshape(-1, *seen.shape[-2:])
    if not bool((flat == flat[:1]).all()):
        raise MaskRefused("the mask differs between heads, or between rows of the batch")
    return flat[0]


def alibi(bias: Tensor, seen: Tensor, tolerance: float) -> Tensor:
    """fp64 [N], the slopes of a bias [N, R or 1, S] that is slope · key up to a constant for each row (a softmax knows
    nothing of that; 2108.12409), where it is `seen` [R, S]. `tolerance`: how far from the line, of its largest value.

    Raises MaskRefused for any other bias.
    """
    bias, keys = bias.double(), torch.arange(seen.shape[-1], dtype=torch.float64)
    if bias.shape[-1] != seen.shape[-1]:
        raise MaskRefused("a bias on the scores that is not ALiBi")
    if bias.shape[1] == 1:
        seen = seen.any(0, keepdim=True)
    first, last = _ends(seen)
    span = last - first
    widest = int(span.argmax())
    if span[widest] == 0:
        raise MaskRefused("a bias on scores of which each query sees one")
    at_first = bias.gather(-1, first.expand(len(bias), -1)[..., None])
    slopes = (bias[:, widest, last[widest]] - at_first[:, widest, 0]) / span[widest]
    wrong = bias - at_first - slopes[:, None, None] * (keys - first[:, None])
    if not float(wrong.masked_fill(~seen, 0.0).abs().max()) <= tolerance * float(bias.abs().max()):
        raise MaskRefused("a bias on the scores that is not ALiBi")
    return slopes


def _ends(seen: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [R], [R]: the first and last key that each row sees."""
    number = seen.to(torch.uint8)
    return number.argmax(-1), seen.shape[-1] - 1 - number.flip(-1).argmax(-1)
