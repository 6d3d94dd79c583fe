"""Several linear maps of one input read as one: heads with projections of their own, in code that loops over heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fla_swap.patterns.projection import Linear
from fla_swap.types import Projection, WeightRef


class Joined:
    """The distinct maps among `linears`, their outputs numbered one map after the other."""

    def __init__(self, linears: Sequence[Linear]):
        self.linears: list[Linear] = []
        for linear in linears:
            if not any(_same(linear, known) for known in self.linears):
                self.linears.append(linear)

    def offset(self, linear: Linear) -> int:
        """What is added to the output numbers of `linear`."""
        total = 0
        for known in self.linears:
            if _same(linear, known):
                return total
            total += known.outputs
        raise KeyError(linear.weight.name)

    def projection(self, order: Tensor) -> Projection | str:
        """The map with its outputs in `order`, or why there is none."""
        if len(self.linears) == 1:
            return self.linears[0].projection(order)
        if any(linear.adapters for linear in self.linears):
            return "heads with projections of their own, and adapters on them"
        pieces = self._pieces(order)
        biased = [p for p in pieces if p.bias is not None]
        if len(biased) not in (0, len(pieces)):
            return "some heads' projections have a bias, others have none"
        weight = _joined([p.weight for p in pieces])
        return Projection(weight=weight, bias=_joined([p.bias for p in biased if p.bias]) if biased else None)

    def _pieces(self, order: Tensor) -> list[Projection]:
        bounds = torch.tensor([linear.outputs for linear in self.linears]).cumsum(0)
        which = torch.searchsorted(bounds, order, right=True)
        breaks = (which.diff() != 0).nonzero().flatten() + 1
        found = []
        for piece in torch.tensor_split(order, breaks):
            linear = self.linears[int(torch.searchsorted(bounds, piece[0], right=True))]
            found.append(linear.projection(piece - self.offset(linear)))
        return found


def _same(a: Linear, b: Linear) -> bool:
    if a.out is b.out:
        return True
    if (a.bias is None) != (b.bias is None) or a.x is not b.x or a.adapters or b.adapters:
        return False
    pairs = [(a.weight, b.weight), *([(a.bias, b.bias)] if a.bias and b.bias else [])]
    return all(x.name == y.name and x.transposed == y.transposed and torch.equal(x.rows, y.rows) for x, y in pairs)


def _joined(refs: Sequence[WeightRef]) -> WeightRef:
    if len(refs) == 1:
        return refs[0]
    if len({(r.name, r.transposed, r.dims) for r in refs}) == 1 and all(r.rows for r in refs):
        return dataclasses.replace(refs[0], rows=tuple(pair for r in refs for pair in r.rows or ()))
    return dataclasses.replace(refs[0], more=tuple(refs[1:]))
