"""A few rows of a closed tensor, without the rest: masks of 32k × 32k tokens are checked block by block.

`RowEvaluator.narrowed` sends a range of one dimension backwards through pointwise operations, broadcasts and views, and
evaluates only that. What is small is evaluated whole; what is large and of no such kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fla_swap.patterns.graph import CAST, CapturedGraph, _is_mutable, _ops, alias_root, argument, shape
from fla_swap.patterns.running import no_half

_SMALL = 2**20
_WHOLE = 2**27
_POINTWISE = _ops(
    *("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or"),
    *("logical_not", "where", "masked_fill", "add", "sub", "rsub", "mul", "div", "neg", "abs", "minimum", "maximum"),
    *("le", "lt", "ge", "gt", "eq", "ne", "floor_divide", "remainder", "clamp", "clamp_min", "clamp_max", "tanh"),
)
_SAME = _ops("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh")
_EXPAND, _UNSQUEEZE, _SLICE = _ops("expand", "broadcast_to"), _ops("unsqueeze"), _ops("slice")
_TRANSPOSE, _INDEX, _TRIANGLE = _ops("transpose"), _ops("index"), _ops("tril", "triu")
_FILLED: dict[Any, Callable[[fx.Node], Any]] = {
    **{op: lambda node: 1 for op in _ops("ones", "new_ones", "ones_like")},
    **{op: lambda node: 0 for op in _ops("zeros", "new_zeros", "zeros_like")},
    **{op: lambda node: argument(node, 1, "fill_value") for op in _ops("full", "full_like")},
    **{op: lambda node: argument(node, 2, "fill_value") for op in _ops("new_full")},
}


class RowsRefused(Exception):
    """A large closed tensor that cannot be evaluated in parts."""


class RowEvaluator:
    """Ranges of closed tensors in a graph whose sizes are plain numbers."""

    def __init__(self, graph: CapturedGraph):
        self.graph = graph
        self.written = {alias_root(n) for n in graph.nodes if n.op == "call_function" and _is_mutable(n)}

    def narrowed(self, node: fx.Node, dim: int, start: int, stop: int) -> Tensor:
        """`node` from `start` to `stop` along `dim` (counted from the end: −2 is the rows of a mask).

        Raises RowsRefused, or ValueError where the tensor is no constant of the graph (`CapturedGraph.evaluate`).
        """
        dims = shape(node)
        if dims is None:
            raise RowsRefused(f"{node.name} is no tensor")
        if -dim > len(dims) or dims[dim] == 1:
            return self._whole(node)
        if _numel(dims) <= _SMALL or node.op != "call_function" or node in self.written:
            return self._whole(node).narrow(dim, start, stop - start)
        if node.target in _TRIANGLE:
            return self._triangle(node, dim, start, stop)
        step = self._step(node, dim, start, stop, dims)
        return self._whole(node).narrow(dim, start, stop - start) if step is None else step

    def _whole(self, node: fx.Node) -> Tensor:
        dims = shape(node) or ()
        if _numel(dims) > _WHOLE and node.op == "call_function":
            raise RowsRefused(f"{node.target} in a mask of shape {dims} cannot be evaluated in parts")
        return self.graph.evaluate(node)

    def _step(self, node: fx.Node, dim: int, start: int, stop: int, dims: tuple[int, ...]) -> Tensor | None:
        target, source = node.target, node.args[0] if node.args else None
        if target in _FILLED:
            size = list(dims)
            size[dim] = stop - start
            val = node.meta["val"]
            fill = _FILLED[target](node)
            return None if isinstance(fill, fx.Node) else torch.full(size, fill, dtype=no_half(val.dtype))
        if target in CAST | _SAME or target in _POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise(node, dim, start, stop)
        if target in _INDEX and isinstance(source, fx.Node):
            return self._index(node, source, dim, start, stop, dims)
        if not isinstance(source, fx.Node):
            return None
        if target in _EXPAND:
            size = list(dims)
            size[dim] = stop - start
            return self.narrowed(source, dim, start, stop).expand(size)
        if target in _UNSQUEEZE:
            added = argument(node, 1, "dim")
            added = added - len(dims) if added >= 0 else added
            return self.narrowed(source, dim + 1 if dim < added else dim, start, stop).unsqueeze(added)
        if target in _TRANSPOSE:
            given: list[Any] = list(node.args[1:3])
            one, other = (d - len(dims) if d >= 0 else d for d in given)
            moved = {one: other, other: one}.get(dim, dim)
            return self.narrowed(source, moved, start, stop).transpose(one, other)
        if target in _SLICE:
            return self._slice(node, source, dim, start, stop, dims)
        return None

    def _slice(
        self, node: fx.Node, source: fx.Node, dim: int, start: int, stop: int, dims: tuple[int, ...]
    ) -> Tensor | None:
        along, step = argument(node, 1, "dim", 0), argument(node, 4, "step", 1)
        along = along - len(dims) if along >= 0 else along
        first = argument(node, 2, "start") or 0
        if step != 1 or first < 0:
            return None
        if along == dim:
            return self.narrowed(source, dim, first + start, first + stop)
        return self.narrowed(source, dim, start, stop).narrow(along, first, dims[along])

    def _pointwise(self, node: fx.Node, dim: int, start: int, stop: int) -> Tensor:
        return self._call(node, lambda n: self.narrowed(n, dim, start, stop))

    def _index(
        self, node: fx.Node, source: fx.Node, dim: int, start: int, stop: int, dims: tuple[int, ...]
    ) -> Tensor | None:
        """x[i, j, …] with an index for every dimension: the result has the indices' common shape."""
        indices = node.args[1]
        if not isinstance(indices, list | tuple) or any(not isinstance(i, fx.Node) for i in indices):
            return None
        if len(indices) != len(shape(source) or ()):
            return None
        return self._call(node, lambda n: self._whole(n) if n is source else self.narrowed(n, dim, start, stop))

    def _triangle(self, node: fx.Node, dim: int, start: int, stop: int) -> Tensor:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if dim not in (-2, -1):
            return self._call(node, lambda n: self.narrowed(n, dim, start, stop))
        diagonal = argument(node, 1, "diagonal", 0) + (start if dim == -2 else -start)
        assert callable(node.target)
        return node.target(self.narrowed(source, dim, start, stop), diagonal)

    def _call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Tensor:
        def known(n: fx.Node) -> Any:
            return value(n) if isinstance(n.meta.get("val"), Tensor) else self.graph.evaluate(n)

        args, kwargs = map_arg((node.args, node.kwargs), known)
        assert callable(node.target)
        return node.target(*no_half(args), **no_half(kwargs))


def _numel(dims: tuple[int, ...]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count
