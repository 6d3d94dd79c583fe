"""Which entries of which parameters stand in a closed tensor: it is run on numbered entries, and these are read off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.patterns.graph import CapturedGraph, shape
from fla_swap.types import WeightRef


class WeightsRefused(Exception):
    """The tensor is no selection of stored entries (plus a constant), or one that a `WeightRef` cannot state."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A closed tensor whose every element is a stored entry plus `offset`.

    `entries` has the tensor's shape and numbers the entries of the parameters `names` (of shapes `dims`) one after
    the other.
    """

    names: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]
    entries: Tensor
    offset: float

    def ref(self, entries: Tensor) -> WeightRef:
        """These entries [n], in order. Raises `WeightsRefused` where they are no rows of the parameters."""
        pieces, start = [], 0
        for name, dims in zip(self.names, self.dims, strict=True):
            pieces.append((start, name, dims))
            start += torch.Size(dims).numel()
        found: list[WeightRef] = []
        for run in _runs(entries, [p[0] for p in pieces]):
            start, name, dims = max((p for p in pieces if p[0] <= int(run[0])), key=lambda p: p[0])
            found.append(_piece(name, dims, run - start))
        if not found:
            raise WeightsRefused("no weights")
        merged = _merged(found)
        return WeightRef(name=merged[0].name, rows=merged[0].rows, more=tuple(merged[1:]))


def _runs(entries: Tensor, starts: list[int]) -> tuple[Tensor, ...]:
    """Stretches of entries that lie in one parameter each."""
    bounds = torch.tensor(starts[1:], dtype=torch.int64)
    owner = torch.bucketize(entries, bounds, right=True)
    return torch.tensor_split(entries, (owner.diff() != 0).nonzero().flatten() + 1)


def _piece(name: str, dims: tuple[int, ...], entries: Tensor) -> WeightRef:
    if not dims:
        raise WeightsRefused(f"{name} is a single number without a dimension")
    width = torch.Size(dims[1:]).numel()
    if len(entries) % width:
        raise WeightsRefused(f"a part of the rows of {name}")
    table = entries.reshape(-1, width)
    rows = table[:, 0] // width
    if not torch.equal(table, rows[:, None] * width + torch.arange(width)):
        raise WeightsRefused(f"the rows of {name} in another order")
    if torch.equal(rows, torch.arange(dims[0])):
        return WeightRef(name=name)
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    return WeightRef(name=name, rows=tuple((int(p[0]), int(p[-1]) + 1) for p in torch.tensor_split(rows, breaks)))


def _merged(refs: list[WeightRef]) -> list[WeightRef]:
    """Neighbours that name the same parameter by rows, as one."""
    merged = refs[:1]
    for ref in refs[1:]:
        if ref.name == merged[-1].name and ref.rows is not None and merged[-1].rows is not None:
            merged[-1] = WeightRef(name=ref.name, rows=merged[-1].rows + ref.rows)
        else:
            merged.append(ref)
    return merged


def weights_behind(node: Any, graph: CapturedGraph) -> list[fx.Node]:
    """The stored weights that a closed node is computed from, in the graph's order."""
    if not isinstance(node, fx.Node) or graph.is_open(node):
        return []
    key = ("weights behind", node)
    if key not in graph.known:
        seen, stack = set(), [node]
        while stack:
            walk = stack.pop()
            if walk not in seen:
                seen.add(walk)
                stack.extend(walk.all_input_nodes)
        graph.known[key] = sorted((n for n in seen if n.name in graph.weights), key=graph.order)
    return graph.known[key]


def read_spread(node: fx.Node, graph: CapturedGraph) -> Spread | None:
    """The `Spread` of a closed node, None when its values are computed in any other way."""
    key = ("spread", node)
    if key not in graph.known:
        graph.known[key] = _read(node, graph)
    return graph.known[key]


def _read(node: fx.Node, graph: CapturedGraph) -> Spread | None:
    origins = weights_behind(node, graph)
    dims = [shape(n) or () for n in origins]
    sizes = [torch.Size(d).numel() for d in dims]
    if not origins or any(not n.meta["val"].is_floating_point() for n in origins):
        return None

    def run(numbers: Tensor) -> Tensor:
        parts = (p.reshape(d) for p, d in zip(numbers.split(sizes), dims, strict=True))
        return graph.run(node, dict(zip(origins, parts, strict=True))).double()

    total = sum(sizes)
    zeros = run(torch.zeros(total))
    offset = float(zeros.flatten()[0])
    counted = run(torch.arange(total, dtype=torch.float32)) - offset
    entries = counted.round().long()
    if not bool((zeros == offset).all()) or int(entries.min()) < 0 or int(entries.max()) >= total:
        return None
    sample = torch.randn(total, generator=torch.Generator().manual_seed(0))
    if float((run(sample) - offset - sample.double()[entries]).abs().max()) > 1e-5 * (1 + abs(offset)):
        return None
    names = tuple(graph.weights[n.name] for n in origins)
    return Spread(names=names, dims=tuple(dims), entries=entries, offset=offset)
