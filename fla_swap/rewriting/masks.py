"""What the mask of one core is: its closed terms are evaluated in blocks of query rows, as masks of 32k tokens fit in
no memory, and every row is held against the kinds of masks.

Legend: B batch, H heads, R rows in a block, T tokens, L leading dimensions of the scores (they stand row by row for
batch and heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fla_swap.patterns.graph import shape
from fla_swap.patterns.mask_kinds import KINDS, MaskRefused, alibi, candidates, expected, explain, for_all, split
from fla_swap.patterns.rows import RowEvaluator
from fla_swap.types import Mask

_BLOCK = 2**20


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

    Raises MaskRefused, RowsRefused, or ValueError when a term is no constant of the graph.
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


class _Reader:
    def __init__(
        self, terms: Sequence[Term], causal: bool, lead: tuple[int, ...], length: int, evaluator: RowEvaluator
    ):
        self.terms, self.causal, self.lead, self.length, self.rows = terms, causal, lead, length, evaluator
        self.slopes: Tensor | None = None

    def read(self) -> Visible:
        last, _ = self._block(self.length - 1, self.length)
        found = candidates(last[0], self._first_column())
        step = max(1, _BLOCK // self.length)
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            seen, biases = self._block(start, stop)
            found = explain(found, seen, self.length, start)
            if not found:
                raise MaskRefused(f"the mask is {KINDS} (rows {start} to {stop - 1} of {self.length})")
            self._bias(biases, seen)
        slopes = None
        if self.slopes is not None and bool((self.slopes != 0).any()):
            slopes = tuple(self.slopes.tolist())
        return Visible(mask=found[0], slopes=slopes)

    def _first_column(self) -> Tensor:
        """bool [T]: which queries see the first key."""
        seen = torch.ones(self.length, dtype=torch.bool)
        for term in self.terms:
            value, _ = self._term(term, term.narrowed(self.rows, -1, 0, 1), self.length, 1)
            seen = seen & value[:, 0]
        return seen

    def _block(self, start: int, stop: int) -> tuple[Tensor, list[tuple[Term, Tensor]]]:
        """bool [R, T] of the rows, and what the terms add to the scores (not zero where something is seen)."""
        own = Mask(kind="causal" if self.causal else "bidirectional")
        seen = expected(own, self.length, rows=(start, stop))
        biases = []
        for term in self.terms:
            value = term.narrowed(self.rows, -2, start, stop)
            keep, bias = self._term(term, value, stop - start, self.length)
            seen = seen & keep
            if bias is not None:
                biases.append((term, bias))
        return seen, biases

    def _term(self, term: Term, value: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """bool [R, T] of what the term leaves visible, and the rest of what it adds, in its own shape."""
        value = value[(None,) * (2 - value.dim())] if value.dim() < 2 else value
        keep, bias = split(term.kind, value, term.factor)
        if keep.shape[-2] not in (1, rows) or keep.shape[-1] not in (1, columns):
            raise MaskRefused(f"a mask of shape {shape(term.node)} on {self.length} queries and keys")
        return for_all(keep).expand(rows, columns), bias

    def _bias(self, biases: list[tuple[Term, Tensor]], seen: Tensor) -> None:
        """ALiBi (2108.12409): slope · key, up to a constant for each row, of which a softmax knows nothing."""
        block = torch.zeros(1, dtype=torch.float64)
        for term, bias in biases:
            expanded = bias.expand(*term.lead, *bias.shape[-2:]).reshape(-1, *bias.shape[-2:])
            block = block + alibi(expanded, seen, 1e-6)
        block = block.expand(torch.Size(self.lead).numel())
        if self.slopes is not None and not torch.allclose(self.slopes, block, rtol=1e-5, atol=1e-9):
            raise MaskRefused("a bias on the scores that is not ALiBi")
        self.slopes = block if self.slopes is None else self.slopes
