"""Linear maps with stored weights: `linear`, `addmm` and `matmul` with a transposed weight, slices of one parameter."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CAST, CONTRACTION, CapturedGraph, NotLayout, _ops, argument, shape
from fla_swap.patterns.scores import ADD
from fla_swap.types import LowRank, Projection, WeightRef

LINEAR, ADDMM, PRODUCT = _ops("linear"), _ops("addmm"), _ops("matmul", "mm")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight [out, in] or bias [out] as rows of a parameter; `rows` has one parameter row for each output."""

    name: str
    rows: Tensor
    whole: int
    transposed: bool = False
    dims: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def ref(self, order: Tensor) -> WeightRef:
        """The outputs in `order`, as ranges of the parameter's rows (None when that is all of them, in order)."""
        rows = self.rows[order]
        if len(rows) == self.whole and bool((rows == torch.arange(self.whole)).all()):
            return WeightRef(name=self.name, transposed=self.transposed, dims=self.dims)
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        pieces = torch.tensor_split(rows, breaks)
        ranges = tuple((int(p[0]), int(p[-1]) + 1) for p in pieces)
        return WeightRef(name=self.name, rows=ranges, transposed=self.transposed, dims=self.dims)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """`scale · up @ down`, added to a weight: down [r, in], up [out, r]."""

    down: Stored
    up: Stored
    scale: float

    def low_rank(self, order: Tensor) -> LowRank:
        """The adapter of a map whose outputs stand in `order`."""
        rank = torch.arange(len(self.down.rows))
        return LowRank(down=self.down.ref(rank), up=self.up.ref(order), scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear map in the graph, y = x Wᵀ + b: nodes `out` and `x`, widths `inputs` and `outputs`.

    `nodes`: all that belongs to it, adapters too.
    """

    x: fx.Node
    out: fx.Node
    weight: Stored
    bias: Stored | None
    inputs: int
    outputs: int
    adapters: tuple[Adapter, ...] = ()
    nodes: tuple[fx.Node, ...] = ()

    def projection(self, order: Tensor) -> Projection:
        """This map with its outputs in `order` (indices)."""
        return Projection(
            weight=self.weight.ref(order),
            bias=None if self.bias is None else self.bias.ref(order),
            adapters=tuple(a.low_rank(order) for a in self.adapters),
        )


@dataclass(frozen=True, kw_only=True)
class Project:
    """The projection that q, k, v or the output goes through. Ends a path."""

    name: str = "projection"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        product, bias = node, None
        if node.target in ADD:
            closed = [n for n in node.all_input_nodes if not graph.is_open(n)]
            opened = [n for n in node.all_input_nodes if graph.is_open(n)]
            if len(closed) != 1 or len(opened) != 1 or len(shape(closed[0]) or ()) != 1:
                return ABSENT
            product, bias = graph.peel(opened[0], CAST)[-1], closed[0]
        if product.target in LINEAR:
            x, weight, own = product.args[0], product.args[1], argument(product, 2, "bias")
            flipped = False
        elif product.target in ADDMM:
            own, x, weight = product.args[:3]
            flipped = True
            if any(product.kwargs.get(n, 1) != 1 for n in ("alpha", "beta")):
                return Refused("addmm with factors", product)
        elif product.target in PRODUCT:
            x, weight = product.args[:2]
            own, flipped = None, True
        else:
            return ABSENT
        if (
            not (isinstance(x, fx.Node) and isinstance(weight, fx.Node))
            or not graph.is_open(x)
            or graph.is_open(weight)
        ):
            if product.target in CONTRACTION and isinstance(weight, fx.Node) and graph.is_open(weight):
                return Refused("the projection's weight is computed from what the model reads", product)
            return ABSENT
        if bias is not None and own is not None:
            return ABSENT
        return self._found(node, x, weight, bias if own is None else own, flipped, graph)

    @staticmethod
    def _found(node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, flipped: bool, graph: CapturedGraph) -> Result:
        stored = stored_matrix(weight, flipped, graph)
        if stored is None:
            return Refused("the projection's weight is not (rows of) one stored parameter", node)
        vector = None if bias is None else stored_vector(bias, graph)
        if bias is not None and vector is None:
            return Refused("the projection's bias is not (a part of) one stored parameter", node)
        dims = shape(x)
        assert dims is not None
        outputs = len(stored.rows)
        linear = Linear(x=x, out=node, weight=stored, bias=vector, inputs=dims[-1], outputs=outputs, nodes=(node,))
        return Found(facts={"projection": linear}, nodes=(node,), next=None)


def _origin(node: Any, graph: CapturedGraph) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) and node.name in graph.weights else None


def _numbered(node: fx.Node, origin: fx.Node, graph: CapturedGraph) -> Tensor | None:
    """Which entry of the parameter stands where in `node`, or None when the entries are changed on the way."""
    dims = shape(origin)
    assert dims is not None
    numbers = torch.arange(origin.meta["val"].numel()).reshape(dims)
    try:
        return graph.trace_closed(origin, numbers, node)
    except NotLayout:
        return None


def stored_matrix(node: fx.Node, flipped: bool, graph: CapturedGraph) -> Stored | None:
    """The weight behind `node`, read as [out, in]; `flipped` when the graph multiplies by it as [in, out]."""
    origin = _origin(node, graph)
    dims = shape(origin)
    if origin is None or dims is None or len(dims) < 2:
        return None
    name = graph.weights[origin.name]
    if len(dims) != 2:
        return _many_dims(node, origin, flipped, graph)
    if graph.peel_closed(node) is origin:
        size = dims[1] if flipped else dims[0]
        return Stored(name=name, rows=torch.arange(size), whole=size, transposed=flipped)
    numbers = _numbered(node, origin, graph)
    if numbers is None or numbers.dim() != 2:
        return None
    matrix = numbers.t() if flipped else numbers
    columns = dims[1]
    for transposed in (False, True):
        rows = matrix[:, 0] % columns if transposed else matrix[:, 0] // columns
        inputs = torch.arange(matrix.shape[1])
        wanted = inputs * columns + rows[:, None] if transposed else rows[:, None] * columns + inputs
        if matrix.shape[1] == dims[0 if transposed else 1] and torch.equal(matrix, wanted):
            return Stored(name=name, rows=rows, whole=dims[1 if transposed else 0], transposed=transposed)
    return None


def _many_dims(node: fx.Node, origin: fx.Node, flipped: bool, graph: CapturedGraph) -> Stored | None:
    """As `stored_matrix`, for a parameter of three or four dimensions: some count outputs, the others inputs."""
    numbers, dims = _numbered(node, origin, graph), shape(origin)
    if numbers is None or dims is None or numbers.dim() != 2 or len(dims) > 4:
        return None
    matrix = numbers.t() if flipped else numbers
    every = torch.arange(origin.meta["val"].numel()).reshape(dims)
    for inputs in _choices(len(dims)):
        outputs = tuple(d for d in range(len(dims)) if d not in inputs)
        columns = every.permute(*outputs, *inputs).reshape(-1, math.prod(dims[d] for d in inputs))
        if columns.shape[1] != matrix.shape[1]:
            continue
        place = torch.empty(every.numel(), dtype=torch.long)
        place[columns.flatten()] = torch.arange(every.numel())
        rows = place[matrix[:, 0]] // columns.shape[1]
        if torch.equal(columns[rows], matrix):
            name = graph.weights[origin.name]
            return Stored(name=name, rows=rows, whole=len(columns), dims=(outputs, inputs))
    return None


def _choices(rank: int) -> list[tuple[int, ...]]:
    """Which dimensions could count the inputs, the fewest first."""
    return [c for n in range(1, rank) for c in itertools.combinations(range(rank), n)]


def stored_vector(node: Any, graph: CapturedGraph) -> Stored | None:
    """The bias behind `node`."""
    origin = _origin(node, graph)
    dims = shape(origin)
    if origin is None or not isinstance(node, fx.Node) or not dims:
        return None
    numbers = _numbered(node, origin, graph)
    if numbers is None or numbers.dim() != 1:
        return None
    # A bias stored as [heads, width] is read as one column.
    own = None if len(dims) == 1 else (tuple(range(len(dims))), ())
    return Stored(name=graph.weights[origin.name], rows=numbers, whole=origin.meta["val"].numel(), dims=own)
