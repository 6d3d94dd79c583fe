"""Which modules may be linear recurrences: no softmax in them, and something that mixes tokens."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from fla_swap.patterns.adapters import match_linear
from fla_swap.patterns.base import Found
from fla_swap.patterns.graph import CapturedGraph, _ops, modules_of, shape
from fla_swap.patterns.output import inside_of
from fla_swap.patterns.reach import CONVOLUTION, is_product

SUMS = _ops("cumsum", "cumsum_")
GATES = _ops("softplus", "exp", "exp_")


def linear_owners(graph: CapturedGraph, cores: Iterable[fx.Node]) -> list[str]:
    """Modules, in model order, with projections around something that mixes tokens, and no softmax among it.

    `cores`: the softmaxes and fused attentions of the graph.
    """
    attending = {name for core in cores for name in modules_of(core)}
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and graph.is_open(node) and _mixes(node, graph):
            owner = _owner(node, attending, graph)
            if owner is not None:
                found.setdefault(owner)
    return [o for o in found if not any(o != other and other.startswith(f"{o}.") for other in found)]


def _mixes(node: fx.Node, graph: CapturedGraph) -> bool:
    """A causal convolution, a running sum, or a product that counts pairs of tokens."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if node.target in CONVOLUTION:
        weight = shape(node.args[1])
        return weight is not None and len(weight) == 3 and weight[0] > 1 == weight[1] < weight[2]
    known = [size for size in value.shape if isinstance(size, int)]  # others depend on the data: no count of tokens
    return node.target in SUMS or (known.count(graph.length) > 1 and is_product(node, graph))


def _owner(node: fx.Node, attending: set[str], graph: CapturedGraph) -> str | None:
    """The innermost module around `node` with a projection before and behind it; None if one of its parts attends, or
    nothing in it remembers more than a convolution does."""
    for name in reversed(modules_of(node)):
        if name in attending:
            return None
        inside = inside_of(name, graph)
        linears = [n for n in inside if isinstance(match_linear(n, graph), Found)]
        if not linears or not graph.order(linears[0]) < graph.order(node) < graph.order(linears[-1]):
            continue
        remembers = any(n.target in GATES and graph.is_open(n) for n in inside)
        return name if remembers or node.target not in CONVOLUTION else None
    return None
