"""Which contractions a softmax stands between: what tells an attention from a router, a pooling or a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import fx

from fla_swap.patterns.graph import CONTRACTION, CapturedGraph, _is_mutable, _ops, alias_root, shape
from fla_swap.patterns.steps import MUL

PRODUCT = _ops("matmul", "bmm", "mm", "einsum")
BADDBMM = _ops("baddbmm")
CONVOLUTION = _ops("conv1d", "conv2d", "conv3d", "convolution")
SUM = _ops("sum")


def between_products(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether `node` has a product of two open tensors before it and one after it, whatever stands between."""
    return before_product(node, graph) and after_product(node, graph)


def before_product(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether `node` is made of a product of two open tensors, no linear map of hidden states between.

    A map of the scores' heads, [..., T, S, heads], is passed over: its input still counts queries and keys.
    """
    return _search(node, graph, _before(graph))


def after_product(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether `node` goes into a product of two open tensors, no linear map of hidden states between."""
    return _search(node, graph, _after(graph))


def is_product(node: fx.Node, graph: CapturedGraph) -> bool:
    """A contraction of two open tensors, also as an elementwise product that is summed."""
    if node.target in PRODUCT | BADDBMM:
        return len(graph.open_inputs(node)) >= 2 or all(graph.is_open(a) for a in node.args[:2])
    if node.target not in SUM:
        return False
    x = graph.peel(node.all_input_nodes[0])[-1]
    return x.target in MUL and len(graph.open_inputs(x)) == 2


def is_map(node: fx.Node, graph: CapturedGraph) -> bool:
    """A contraction of an open tensor with stored numbers."""
    return node.target in CONTRACTION | CONVOLUTION and len(graph.open_inputs(node)) == 1


def made_of_map(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a contraction with stored numbers is the nearest one before `node`."""
    return _search(node, graph, _before(graph), wanted=is_map)


def products_before(node: fx.Node, graph: CapturedGraph, ends: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nearest products of two open tensors on every way back from `node`; a way ends where `ends` holds as well."""
    return list(_reached(node, graph, _before(graph), is_product, ends))


def sums_values(node: fx.Node, graph: CapturedGraph, ends: Callable[[fx.Node], bool]) -> bool:
    """As `after_product`, where the product itself does not count two lengths (an index of the keys does)."""

    def wanted(walk: fx.Node, graph: CapturedGraph) -> bool:
        return is_product(walk, graph) and not _pairs(shape(walk), graph.length)

    return next(_reached(node, graph, _after(graph), wanted, ends), None) is not None


def _before(graph: CapturedGraph) -> Callable[[fx.Node], list[fx.Node]]:
    """What a node is made of; a buffer that is filled piece by piece is made of the pieces."""
    return lambda node: [*graph.open_inputs(node), *graph.writers(node)]


def _after(graph: CapturedGraph) -> Callable[[fx.Node], list[fx.Node]]:
    """What reads a node, or the buffer that it is written into."""

    def following(node: fx.Node) -> list[fx.Node]:
        roots = [alias_root(user) for user in node.users if user.op == "call_function" and _is_mutable(user)]
        return [*node.users, *(user for root in roots if root is not node for user in root.users)]

    return following


def _search(
    node: fx.Node,
    graph: CapturedGraph,
    following: Callable[[fx.Node], Iterable[fx.Node]],
    wanted: Callable[[fx.Node, CapturedGraph], bool] = is_product,
) -> bool:
    return next(_reached(node, graph, following, wanted), None) is not None


def _reached(
    node: fx.Node,
    graph: CapturedGraph,
    following: Callable[[fx.Node], Iterable[fx.Node]],
    wanted: Callable[[fx.Node, CapturedGraph], bool],
    ends: Callable[[fx.Node], bool] = lambda _: False,
) -> Iterator[fx.Node]:
    seen: set[fx.Node] = {node}
    stack = [n for n in following(node) if graph.is_open(n)]
    while stack:
        walk = stack.pop()
        if walk in seen:
            continue
        seen.add(walk)
        if wanted(walk, graph):
            yield walk
        elif not ends(walk) and (walk.target not in CONTRACTION | CONVOLUTION or mixes_heads(walk, graph)):
            stack += [n for n in following(walk) if graph.is_open(n)]


def mixes_heads(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a contraction with stored numbers acts on scores: its input and output count two lengths."""
    if not is_map(node, graph):
        return False
    return all(_pairs(shape(n), graph.length) for n in (node, *graph.open_inputs(node)))


def _pairs(dims: tuple[int, ...] | None, length: int) -> bool:
    known = [d for d in dims or () if isinstance(d, int)]
    return known.count(length) >= 2 or length * length in known
