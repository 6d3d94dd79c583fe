"""What the mask of one core is: its closed terms are evaluated in blocks of query rows, and every row is held
against the kinds that an operator can express.

Legend: B batch, H heads, R rows in a block, T tokens, L leading dimensions of the scores (they stand row by row for
batch and heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fla_swap.arguments import HIDDEN
from fla_swap.patterns.graph import CapturedGraph, shape
from fla_swap.patterns.hints import cone, thresholds
from fla_swap.patterns.rows import RowEvaluator
from fla_swap.types import Mask

_BLOCK = 2**20


class MaskUnknown(Exception):
    """The mask is of no kind that the operators compute."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One closed tensor that acts on the scores: `kind` "add", "keep" or "drop". `lead`: the scores' shape there
    without its last two dimensions. `factor`: what the scores are multiplied by afterwards. `table`: its values where
    no node has them (the functions of FlexAttention), [L, T, T] or to be expanded to it."""

    kind: str
    node: fx.Node
    lead: tuple[int, ...]
    factor: float = 1.0
    table: Tensor | None = field(default=None, compare=False, repr=False)

    def narrowed(self, rows: RowEvaluator, dim: int, start: int, stop: int) -> Tensor:
        """The values from `start` to `stop` along `dim`, counted from the end."""
        if self.table is None:
            return rows.narrowed(self.node, dim, start, stop)
        return self.table.narrow(dim, start, stop - start)


@dataclass(frozen=True, kw_only=True)
class Visible:
    """Which keys a query sees, and the slopes of ALiBi for each leading index of the scores, [prod(L)], or None."""

    mask: Mask
    slopes: tuple[float, ...] | None = None


def read_mask(
    terms: Sequence[Term], causal: bool, lead: tuple[int, ...], length: int, evaluator: RowEvaluator
) -> Visible:
    """The kind of mask that the terms make over `length` queries and keys. Every row is checked.

    Raises MaskUnknown, RowsRefused, or ValueError when a term is no constant of the graph.
    """
    key = ("rewrite", causal, lead, length, *((t.kind, plain(t.node), t.factor, t.lead) for t in terms))
    known = evaluator.graph.known
    if any(t.table is not None for t in terms):
        return _Reader(terms, causal, lead, length, evaluator).read()
    if key not in known:
        known[key] = _Reader(terms, causal, lead, length, evaluator).read()
    return known[key]


def plain(node: fx.Node) -> fx.Node:
    """`node` before slices and expansions that leave the shape as it is: each layer slices the mask anew."""
    while len(node.all_input_nodes) == 1 and node.op == "call_function":
        before = node.all_input_nodes[0]
        name = str(node.target)
        if not name.startswith(("aten.slice", "aten.expand", "aten.alias")) or shape(before) != shape(node):
            break
        node = before
    return node


def constants(terms: Sequence[Term], graph: CapturedGraph, above: int) -> set[int]:
    """Whole numbers above `above` at which the terms may change: windows and chunks are among them."""
    return thresholds(cone((t.node for t in terms), graph), graph, above)


class _Reader:
    def __init__(
        self, terms: Sequence[Term], causal: bool, lead: tuple[int, ...], length: int, evaluator: RowEvaluator
    ):
        self.terms, self.causal, self.lead, self.length, self.rows = terms, causal, lead, length, evaluator
        self.slopes: Tensor | None = None

    def read(self) -> Visible:
        candidates = self._candidates()
        step = max(1, _BLOCK // self.length)
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            seen, biases = self._block(start, stop)
            candidates = [c for c in candidates if torch.equal(expected_rows(c, self.length, start, stop), seen)]
            if not candidates:
                raise MaskUnknown(
                    f"the mask is neither causal, a window, chunked nor bidirectional (rows {start} to {stop - 1} of "
                    f"{self.length})"
                )
            self._bias(biases, seen)
        slopes = None
        if self.slopes is not None and bool((self.slopes != 0).any()):
            slopes = tuple(self.slopes.tolist())
        return Visible(mask=candidates[0], slopes=slopes)

    def _candidates(self) -> list[Mask]:
        last, _ = self._block(self.length - 1, self.length)
        found = [Mask(kind="causal"), Mask(kind="bidirectional")]
        count = int(last.sum())
        if count:
            found.append(Mask(kind="window", window=count))
        hidden = torch.nonzero(~self._first_column())
        if len(hidden):
            found.append(Mask(kind="chunked", window=int(hidden[0])))
        return found

    def _first_column(self) -> Tensor:
        """bool [T]: which queries see the first key."""
        seen = torch.ones(self.length, dtype=torch.bool)
        for term in self.terms:
            value, _ = self._term(term, term.narrowed(self.rows, -1, 0, 1), self.length, 1)
            seen = seen & value[0, :, 0]
        return seen

    def _block(self, start: int, stop: int) -> tuple[Tensor, list[tuple[Term, Tensor]]]:
        """bool [R, T] of the rows, and what the terms add to the scores (not zero where something is seen)."""
        seen = expected_rows(Mask(kind="causal" if self.causal else "bidirectional"), self.length, start, stop)
        biases = []
        for term in self.terms:
            value = term.narrowed(self.rows, -2, start, stop)
            keep, bias = self._term(term, value, stop - start, self.length)
            seen = seen & keep[0]
            if bias is not None:
                biases.append((term, bias))
        return seen, biases

    def _term(self, term: Term, value: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """bool [1, R, T] of what the term leaves visible, and the rest of what it adds, in its own shape."""
        value = value[(None,) * (2 - value.dim())] if value.dim() < 2 else value
        bias = None
        if term.kind == "add":
            hidden = value * term.factor <= HIDDEN
            rest = value.masked_fill(hidden, 0.0)
            keep, bias = ~hidden, rest.double() * term.factor if bool((rest != 0).any()) else None
        else:
            keep = value.bool() if term.kind == "keep" else ~value.bool()
        if keep.shape[-2] not in (1, rows) or keep.shape[-1] not in (1, columns):
            raise MaskUnknown(f"a mask of shape {shape(term.node)} on {self.length} queries and keys")
        flat = keep.reshape(-1, *keep.shape[-2:])
        if not bool((flat == flat[:1]).all()):
            raise MaskUnknown("the mask differs between heads, or between rows of the batch")
        return flat[:1].expand(1, rows, columns), bias

    def _bias(self, biases: list[tuple[Term, Tensor]], seen: Tensor) -> None:
        """ALiBi (2108.12409): slope · key, up to a constant for each row, of which a softmax knows nothing."""
        block = torch.zeros(1, dtype=torch.float64)
        for term, bias in biases:
            if bias.shape[-1] != self.length:
                raise MaskUnknown("a bias on the scores that is not ALiBi")
            expanded = bias.expand(*term.lead, *bias.shape[-2:]).reshape(-1, *bias.shape[-2:])
            block = block + _slopes(expanded, seen)
        block = block.expand(torch.Size(self.lead).numel())
        if self.slopes is not None and not torch.allclose(self.slopes, block, rtol=1e-5, atol=1e-9):
            raise MaskUnknown("a bias on the scores that is not ALiBi")
        self.slopes = block if self.slopes is None else self.slopes


def _slopes(bias: Tensor, seen: Tensor) -> Tensor:
    """[N] from bias [N, R or 1, T], or MaskUnknown."""
    length = bias.shape[-1]
    keys = torch.arange(length, dtype=torch.float64)
    if bias.shape[1] == 1:
        seen = seen.any(0, keepdim=True)
    first, last = _ends(seen)
    at_first = bias.gather(-1, first.expand(len(bias), -1)[..., None]).squeeze(-1)
    at_last = bias.gather(-1, last.expand(len(bias), -1)[..., None]).squeeze(-1)
    span = (last - first).double()
    widest = int(span.argmax())
    if span[widest] == 0:
        raise MaskUnknown("a bias on scores of which each query sees one")
    slopes = (at_last[:, widest] - at_first[:, widest]) / span[widest]
    wanted = at_first[..., None] + slopes[:, None, None] * (keys - first.double()[:, None])
    wrong = (bias - wanted).abs().masked_fill(~seen, 0.0)
    if not float(wrong.max()) <= 1e-6 * float(bias.abs().max()):
        raise MaskUnknown("a bias on the scores that is not ALiBi")
    return slopes


def _ends(seen: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [R], [R]: the first and last key that each row sees."""
    number = seen.to(torch.uint8)
    return number.argmax(-1), seen.shape[-1] - 1 - number.flip(-1).argmax(-1)


def expected_rows(mask: Mask, length: int, start: int, stop: int) -> Tensor:
    """bool [R, T]: which keys the queries from `start` to `stop` see."""
    if mask.kind == "bidirectional":
        return torch.ones(stop - start, length, dtype=torch.bool)
    i, j = torch.arange(start, stop)[:, None], torch.arange(length)[None, :]
    seen = j <= i
    if mask.kind == "window":
        seen = seen & (j > i - (mask.window or length))
    if mask.kind == "chunked":
        size = mask.window or length
        seen = seen & (j >= i // size * size)
    return seen
