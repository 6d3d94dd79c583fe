"""Low-rank adapters beside a projection, any number of them: y = W x + s · B (A (dropout x)) + … (2106.09685)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx

from fla_swap.patterns.base import ABSENT, Absent, Found, Refused, Result
from fla_swap.patterns.graph import CAST, CONTRACTION, DROPOUT, SHAPE_ONLY, CapturedGraph, _ops, shape
from fla_swap.patterns.projection import Adapter, Linear, Project
from fla_swap.patterns.scores import ADD, MUL, split_factor

VIEW = _ops("view", "reshape", "_unsafe_view", "contiguous", "clone", "alias", "detach")
_QUIET = CAST | DROPOUT | VIEW
_LENGTH = _ops("linalg_norm", "linalg_vector_norm", "norm")


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A projection with adapters. Ends a path, as a plain projection does."""

    name: str = "adapters"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in ADD or len(graph.open_inputs(node)) != 2:
            return ABSENT
        sides = graph.open_inputs(node)
        refused: Refused | None = None
        for base_node, change in (sides, sides[::-1]):
            base = match_linear(graph.peel(base_node, CAST | VIEW)[-1], graph)
            if not isinstance(base, Found):
                continue
            linear: Linear = base.facts["projection"]
            adapter = _adapter(change, graph)
            if adapter is not None and _source(adapter[1], graph) is _source(linear.x, graph):
                return self._found(node, linear, adapter, graph)
            refused = refused or _explained(node, linear, change, graph)
        return refused or ABSENT

    @staticmethod
    def _found(
        node: fx.Node, base: Linear, adapter: tuple[Adapter, fx.Node, tuple[fx.Node, ...]], graph: CapturedGraph
    ) -> Result:
        own, x, nodes = adapter
        if len(own.up.rows) != base.outputs or (shape(x) or (0,))[-1] != base.inputs:
            return Refused("an adapter of another shape than the projection", node)
        linear = dataclasses.replace(
            base,
            x=x if base.x.target in VIEW else base.x,
            out=node,
            adapters=(*base.adapters, own),
            nodes=(*base.nodes, *nodes, node),
        )
        return Found(facts={"projection": linear}, nodes=linear.nodes, next=None)


def match_linear(node: fx.Node, graph: CapturedGraph) -> Result:
    """A projection, with or without adapters, that ends at `node`."""
    plain = Project().match(node, graph)
    return Adapted().match(node, graph) if isinstance(plain, Absent) else plain


def linear_of_all(readers: list[fx.Node], graph: CapturedGraph) -> Linear | None:
    """The one adapted projection that all of these operations are part of, None when there is none."""
    for reader in readers:
        walk = _first_linear(reader, graph)
        found = ABSENT if walk is None else match_linear(walk, graph)
        while walk is not None and isinstance(found, Found):
            linear: Linear = found.facts["projection"]
            own = {*linear.nodes}
            if all(_ends_in(r, own) for r in readers):
                return linear
            walk = _next_sum(walk)
            if walk is None:
                break
            found = match_linear(walk, graph)
    return None


def _first_linear(node: fx.Node, graph: CapturedGraph) -> fx.Node | None:
    while not isinstance(match_linear(node, graph), Found):
        users = [u for u in node.users if u.target not in SHAPE_ONLY]
        if node.target not in _QUIET or len(users) != 1:
            return None
        node = users[0]
    return node


def _ends_in(node: fx.Node, own: set[fx.Node]) -> bool:
    while node not in own:
        users = [u for u in node.users if u.target not in SHAPE_ONLY]
        if node.target not in _QUIET or len(users) != 1:
            return False
        node = users[0]
    return True


def _next_sum(node: fx.Node) -> fx.Node | None:
    while True:
        users = [u for u in node.users if u.target not in SHAPE_ONLY]
        if len(users) != 1 or users[0].target not in ADD | _QUIET:
            return None
        node = users[0]
        if node.target in ADD:
            return node


def _source(x: fx.Node, graph: CapturedGraph) -> fx.Node:
    return graph.peel(x, _QUIET)[-1]


def _adapter(node: fx.Node, graph: CapturedGraph) -> tuple[Adapter, fx.Node, tuple[fx.Node, ...]] | None:
    """(adapter, its input, its nodes) when `node` is s · up(down(x)) with two stored matrices."""
    scale, nodes, linears = 1.0, [], []
    walk = node
    while len(linears) < 2:
        chain = graph.peel(walk, _QUIET)
        nodes += chain[:-1]
        walk = chain[-1]
        factor = split_factor(walk, graph)
        if factor is not None and not _stored_factor(walk, graph):
            nodes.append(walk)
            scale, walk = scale * factor[0], factor[1]
            continue
        found = Project().match(walk, graph)
        if not isinstance(found, Found):
            return None
        linear: Linear = found.facts["projection"]
        if linear.bias is not None:
            return None
        nodes += linear.nodes
        linears.append(linear)
        walk = linear.x
    up, down = linears
    if down.outputs != up.inputs:
        return None
    x = graph.peel(walk, CAST | DROPOUT)
    return Adapter(down=down.weight, up=up.weight, scale=scale), x[-1], (*nodes, *x[:-1])


def _stored_factor(node: fx.Node, graph: CapturedGraph) -> bool:
    return any(graph.peel_closed(n).name in graph.weights for n in node.all_input_nodes if not graph.is_open(n))


def _explained(node: fx.Node, base: Linear, change: fx.Node, graph: CapturedGraph) -> Refused | None:
    """Why what is added to a projection is no adapter, when it does come from the projection's input."""
    source = _source(base.x, graph)
    seen: set[fx.Node] = set()
    stack, own_norm, products, reached = [change], False, 0, False
    while stack and len(seen) < 64:
        walk = stack.pop()
        if walk in seen or walk is source:
            reached = reached or walk is source
            continue
        seen.add(walk)
        products += walk.target in CONTRACTION
        if walk.target in MUL:
            own_norm = own_norm or any(_has_length(n) for n in walk.all_input_nodes if not graph.is_open(n))
        stack.extend(graph.open_inputs(walk))
    if not reached or stack or not products:
        return None
    reason = "what is added to the projection comes from its input, but is not scale · up · down without a bias"
    if own_norm:
        reason = "a weight-decomposed adapter (DoRA): the weight is scaled by its own norm; merge the adapter first"
    return Refused(reason, node, slot="projection")


def _has_length(closed: fx.Node) -> bool:
    seen, stack = set(), [closed]
    while stack:
        walk = stack.pop()
        if walk in seen:
            continue
        seen.add(walk)
        if walk.target in _LENGTH:
            return True
        stack.extend(walk.all_input_nodes)
    return False
