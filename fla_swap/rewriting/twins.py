"""A traced graph with plain numbers for sizes, because recognisers compare sizes and evaluate masks.

A graph with symbolic sizes is copied, and the copy's values are computed anew for chosen sizes, on fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves, tree_map

from fla_swap.patterns.graph import CapturedGraph

_SIZES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A graph of ATen operators and what is known of its placeholders.

    `weights`: placeholder → parameter or buffer name. `values`: placeholder → tensor, for buffers and constants (not
    for parameters: they are trained). `data`: placeholders that carry what the model reads.
    """

    module: fx.GraphModule
    weights: Mapping[str, str]
    values: Mapping[str, Any]
    data: frozenset[str]

    def symbols(self) -> list[Any]:
        """The free symbols in the sizes of the graph's inputs."""
        found: dict[Any, None] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                for number in _sizes(node.meta.get("val")):
                    found |= dict.fromkeys(sorted(number.node.expr.free_symbols, key=str))
        return list(found)


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A graph with plain sizes; `original` maps its nodes to those of the graph that will be rewritten."""

    graph: CapturedGraph
    original: Mapping[fx.Node, fx.Node]


def static_twin(traced: Traced) -> Twin:
    """The graph itself, when it has no symbolic size."""
    return Twin(graph=_captured(traced, traced.module), original={n: n for n in traced.module.graph.nodes})


def symbolic_twin(traced: Traced, sizes: Mapping[Any, int]) -> Twin:
    """A copy of the graph at the given sizes. A node that cannot be computed there is left without a value."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(traced.module.graph, copies)
    graph.output(output)
    module = fx.GraphModule(traced.module, graph)
    _propagate(module, {copy: node for node, copy in copies.items()}, sizes)
    return Twin(graph=_captured(traced, module), original={copy: node for node, copy in copies.items()})


def default_sizes(traced: Traced) -> dict[Any, int]:
    """A different small size for each symbol, within the range that the graph was traced for."""
    sizes: dict[Any, int] = {}
    for symbol in traced.symbols():
        low, high = bounds(traced, symbol)
        free = [n for n in _SIZES if low <= n <= high and n not in sizes.values()]
        sizes[symbol] = free[0] if free else max(low, min(high, low + len(sizes)))
    return sizes


def bounds(traced: Traced, symbol: Any) -> tuple[int, int]:
    """The smallest and largest size that a symbol stands for."""
    for node in traced.module.graph.nodes:
        for number in _sizes(node.meta.get("val")) if node.op == "placeholder" else ():
            if symbol in number.node.expr.free_symbols:
                known = number.node.shape_env.var_to_range.get(symbol)
                if known is not None:
                    low, high = known.lower, known.upper
                    return int(low), int(high) if high.is_finite and high < 2**31 else 2**31
    return 2, 2**31


def _sizes(value: Any) -> Iterator[torch.SymInt]:
    for leaf in tree_leaves(value):
        numbers = (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,)
        for number in numbers:
            if isinstance(number, torch.SymInt) and number.node.expr.free_symbols:
                yield number


def _captured(traced: Traced, module: fx.GraphModule) -> CapturedGraph:
    return CapturedGraph(
        module=module, weights=traced.weights, values=traced.values, data=traced.data, batch=1, length=0
    )


def number_of(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A symbolic size as a plain number."""
    if not isinstance(value, torch.SymInt):
        return value
    return int(value.node.expr.subs(sizes))


def _propagate(module: fx.GraphModule, original: Mapping[fx.Node, fx.Node], sizes: Mapping[Any, int]) -> None:
    known: dict[fx.Node, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in module.graph.nodes:
            node.meta = dict(original[node].meta) if node in original else {}
            node.meta.pop("val", None)
            if node.op == "output":
                continue
            try:
                value = _value(node, original[node], known, sizes, module)
            except Exception:
                continue
            known[node] = node.meta["val"] = value
    for node in module.graph.nodes:
        node.args = map_aggregate(node.args, lambda n: _plain(n, known))  # type: ignore[assignment]
        node.kwargs = map_aggregate(node.kwargs, lambda n: _plain(n, known))  # type: ignore[assignment]


def _value(
    node: fx.Node, original: fx.Node, known: Mapping[fx.Node, Any], sizes: Mapping[Any, int], module: fx.GraphModule
) -> Any:
    if node.op == "placeholder":
        return tree_map(lambda leaf: _at_sizes(leaf, sizes), original.meta["val"])
    if node.op == "get_attr":
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _at_sizes(leaf: Any, sizes: Mapping[Any, int]) -> Any:
    if isinstance(leaf, Tensor):
        shape = [number_of(s, sizes) for s in leaf.shape]
        strides = [number_of(s, sizes) for s in leaf.stride()]
        return torch.empty_strided(shape, strides, dtype=leaf.dtype, device=leaf.device)
    return number_of(leaf, sizes)


def _plain(value: Any, known: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node) and isinstance(known.get(value), int | float | bool):
        return known[value]
    return value
