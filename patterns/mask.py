"""What a closed mask of a site means: it is evaluated, and the table of (query, key) pairs is classified."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from fla_swap.patterns.axes import Axes, AxesRefused, arrange
from fla_swap.patterns.core import MaskTerm
from fla_swap.patterns.graph import CapturedGraph, op_name
from fla_swap.patterns.hints import cone, thresholds
from fla_swap.patterns.mask_kinds import KINDS, MaskRefused, alibi, candidates, explain, for_all, split
from fla_swap.types import Mask


@dataclass(frozen=True, kw_only=True)
class MaskTable:
    """`seen` bool [T, S] (query, key); `bias` [H or 1, T, S], what is added to the scores that are seen, or None."""

    seen: Tensor
    bias: Tensor | None


class Term(Protocol):
    """What acts on the scores: the closed tensor at `node`."""

    @property
    def node(self) -> fx.Node: ...


def evaluate_mask(
    terms: Sequence[MaskTerm], causal: bool, graph: CapturedGraph, axes: Sequence[Axes] | None = None
) -> MaskTable:
    """The mask that the terms make at the graph's lengths, with nothing padded.

    `axes`: for each term, how the scores lie where it acts (None: as [..., T, S]).
    """
    seen = torch.ones(1, 1, graph.length, graph.key_length, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    bias: Tensor | None = None
    factors: list[Tensor] = []
    after: list[tuple[MaskTerm, Tensor]] = []
    for number, term in enumerate(terms):
        learned = graph.parameters_of(term.node)
        if learned:
            what = "factor of the scores" if term.kind == "times" else "bias on the scores (relative positions)"
            raise MaskRefused(f"a learned {what}, made of the parameter {learned[0]!r}")
        value = graph.evaluate(term.node) if term.table is None else term.table
        if axes is not None:
            try:
                value = arrange(value, axes[number])
            except AxesRefused as refused:
                raise MaskRefused(str(refused)) from refused
        value = _four_dims(value, graph)
        if term.kind == "times":
            factors.append(value)
        elif term.kind.endswith("after"):
            after.append((term, value == 1 if term.kind == "times after" else ~value.bool()))
        else:
            kept, rest = split(term.kind, value, term.factor)
            seen = seen & kept
            if rest is not None:
                bias = rest if bias is None else bias + rest
    if any(not bool(((f == 1) | ~seen).all()) for f in factors):
        raise MaskRefused("the scores are multiplied by a table that is not 1 wherever they count")
    for term, kept in after:
        if not bool((kept | ~seen).all()):
            what = "hides keys that took part in it" if term.kind == "drop after" else "scales the probabilities"
            name = op_name(term.at or term.node)
            raise MaskRefused(f"{name} between the softmax and the values {what}, which a site cannot state")
    return _table(seen, bias, graph)


def _four_dims(value: Tensor, graph: CapturedGraph) -> Tensor:
    while value.dim() < 4:
        value = value[None]
    if value.dim() > 4:
        value = value.flatten(1, -3)
    size = (graph.length, graph.key_length)
    if any(own not in (1, wanted) for own, wanted in zip(value.shape[-2:], size, strict=True)):
        raise MaskRefused(f"a mask of shape {tuple(value.shape)} for {size[0]} queries and {size[1]} keys")
    return value


def _table(seen: Tensor, bias: Tensor | None, graph: CapturedGraph) -> MaskTable:
    size = (graph.length, graph.key_length)
    flat = for_all(seen.expand(*seen.shape[:2], *size))
    if bias is not None:
        if not bool((bias == bias[:1]).all()):
            raise MaskRefused("the bias on the scores differs between rows of the batch")
        bias = bias[0].expand(-1, *size).masked_fill(~flat, 0.0)
    return MaskTable(seen=flat, bias=bias)


def classify(tables: Sequence[MaskTable]) -> Mask:
    """The one kind that explains the tables of every length. Raises `MaskRefused` when none does."""
    longest = max((t.seen for t in tables), key=len)
    found = candidates(longest[-1], longest[:, 0])
    for table in tables:
        found = explain(found, table.seen, len(table.seen))
    if found:
        return found[0]
    known = {_other_kind(t.seen) for t in tables}
    if len(known) == 1 and None not in known:
        raise MaskRefused(f"{known.pop()}: a site states causal, window, chunked, bidirectional and local masks")
    raise MaskRefused(f"the mask is {KINDS} at lengths " + ", ".join(str(t.seen.shape[0]) for t in tables))


def _other_kind(seen: Tensor) -> str | None:
    """The name of a mask that is known, but that a site has no word for."""
    j, i = torch.arange(seen.shape[1])[None, :], torch.arange(seen.shape[0])[:, None]
    first = int(seen[0].sum())
    if torch.equal(seen, (j <= i) | (j < first)):
        return f"a prefix-LM mask (the first {first} tokens see each other)"
    if 0 < first < seen.shape[0] and torch.equal(seen, i // first == j // first):
        return f"bidirectional blocks of {first} tokens"
    return None


def alibi_slopes(tables: Sequence[MaskTable], heads: int) -> tuple[float, ...] | None:
    """Slopes s_h when the bias is s_h · (key − query) up to a constant per row, at every length; None without a bias.

    Raises `MaskRefused` for any other bias (2108.12409 describes ALiBi).
    """
    found = [None if t.bias is None else _slopes(t.bias, t.seen, heads) for t in tables]
    first = found[0]
    if all(f is None for f in found):
        return None
    for other in found[1:]:
        if first is None or other is None or float((other - first).abs().max()) > 1e-4 * float(first.abs().max()):
            lengths = ", ".join(str(t.seen.shape[0]) for t in tables)
            raise MaskRefused(f"a bias on the scores that is another at another length (compared: {lengths} tokens)")
    assert first is not None
    return tuple(first.tolist())


def _slopes(bias: Tensor, seen: Tensor, heads: int) -> Tensor:
    """fp64 [H] from bias [H or 1, T, T]; one head after the other, as long tables are large."""
    length, keys = seen.shape
    if length != keys:
        raise MaskRefused("a bias on the scores of a cross-attention")
    slopes = []
    for line in bias:
        try:
            slopes.append(alibi(line[None], seen, 1e-4))
        except MaskRefused as refused:
            if _by_distance(line[None].double(), seen):
                raise MaskRefused(
                    "a bias on the scores by relative position (learned, as T5's?) that is not ALiBi: no line"
                ) from refused
            raise
    return torch.cat(slopes).expand(heads)


def _by_distance(bias: Tensor, seen: Tensor) -> bool:
    """Whether bias [H, T, T] depends on key − query alone, where it is seen."""
    for distance in range(1 - seen.shape[0], seen.shape[1]):
        line, kept = bias.diagonal(distance, -2, -1), seen.diagonal(distance)
        values = line[:, kept]
        if values.shape[-1] > 1 and float((values - values[:, :1]).abs().max()) > 1e-5:
            return False
    return True


def length_hints(terms: Iterable[Term], graph: CapturedGraph, above: int | None = None) -> set[int]:
    """Numbers `above` the graph's length (None) at which a mask of these terms may change: windows and chunks are
    among them."""
    above = max(graph.length, graph.key_length) if above is None else above
    return thresholds(cone((t.node for t in terms), graph), graph, above)
