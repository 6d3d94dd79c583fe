"""An attention that no module has for itself: the part of the graph between its hidden states and its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fla_swap.patterns.adapters import match_linear
from fla_swap.patterns.base import Found, Refused
from fla_swap.patterns.graph import CAST, DROPOUT, LAYOUT, CapturedGraph, modules_of, shape
from fla_swap.patterns.latent import sources
from fla_swap.patterns.output import (
    CAT,
    Boundary,
    Output,
    OutwardsRefused,
    find_output,
    find_outwards,
    find_owner,
    readers,
)
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.scores import split_factor
from fla_swap.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a site stands in a graph: its hidden states, its output, and the memory of a cross-attention."""

    graph: CapturedGraph
    hidden: fx.Node
    end: fx.Node
    memory: fx.Node | None = None

    @staticmethod
    def of(boundary: Boundary, graph: CapturedGraph) -> Region:
        return Region(graph=graph, hidden=boundary.hidden, end=boundary.end, memory=boundary.memory)

    def at(self, graph: CapturedGraph) -> Region:
        """The same in a graph of another length, where that has the same nodes; else this one."""
        pairs = _pairs(self.graph, graph)
        if pairs is None:
            return self
        memory = None if self.memory is None else pairs[self.memory]
        return Region(graph=graph, hidden=pairs[self.hidden], end=pairs[self.end], memory=memory)


def _pairs(a: CapturedGraph, b: CapturedGraph) -> dict[fx.Node, fx.Node] | None:
    """The nodes of `a` with those of `b`; None when they are not the same. Found once for all regions."""
    key = ("same nodes", id(a))
    if key not in b.known:
        pairs = dict(zip(a.nodes, b.nodes, strict=False))
        same = len(a.nodes) == len(b.nodes) and all(
            x.op == y.op and (x.op != "call_function" or x.target is y.target) for x, y in pairs.items()
        )
        b.known[key] = (pairs if same else None, a)  # `a` is kept: its id must not be another's
    return b.known[key][0]


def separate(
    found: Sequence[tuple[AttentionSite, Boundary, bool]], graph: CapturedGraph
) -> tuple[list[AttentionSite], dict[str, Region]]:
    """The sites, those without a module of their own as sites of the graph, and where these stand.

    `found`: each with its boundary and whether a module holds it alone. A module that is called several times, or
    weights that are used several times, hold no attention alone.
    """
    used = [(s.q, s.k, s.v, s.o) for s, _, _ in found]
    sites: list[AttentionSite] = []
    regions: dict[str, Region] = {}
    for site, boundary, alone in found:
        if not alone or used.count((site.q, site.k, site.v, site.o)) > 1:
            count = sum(name.rpartition("#")[0] == site.fqn for name in regions)
            site = dataclasses.replace(site, fqn=f"{site.fqn}#{count}", place="graph")
            regions[site.fqn] = Region.of(boundary, graph)
        sites.append(site)
    return sites, regions


def find_place(
    outs: Sequence[fx.Node],
    inputs: Sequence[Linear],
    own: Sequence[fx.Node],
    cores: Sequence[fx.Node],
    graph: CapturedGraph,
) -> tuple[Output, Boundary, bool]:
    """What stands after the cores and what is around it; true when that is a module of the attention's own.

    Arguments as in `find_outwards`, whose refusal is raised when the graph around the cores is no attention either, or
    when what follows the heads in a module of their own is not understood.
    """
    try:
        return *find_outwards(outs, inputs, own, cores, graph), True
    except OutwardsRefused as refused:
        around = find_owner([*outs, *own, *(linear.out for linear in inputs)])
        several = around is None or sum(around in modules_of(n) for n in cores) > len(own)
        if refused.slot != "owner" and not several:
            raise
        if read_elsewhere(outs, own, graph) is not None:
            raise
        found = find_region(outs, inputs, own, graph)
        if found is None:
            raise
        series = _in_series(found[1], graph)
        if series is not None:
            reason = f"{series.name} is made of the same tensor as the other projections' input: they stand in series"
            raise OutwardsRefused("owner", reason, series) from refused
        return *found, False


def read_elsewhere(outs: Sequence[fx.Node], own: Sequence[fx.Node], graph: CapturedGraph) -> fx.Node | None:
    """Who reads the attention weights of `own` beside the products `outs`: it would go on reading the old ones."""
    walks = [n for n in own if n not in outs]
    while walks:
        for user in readers(walks.pop()):
            if user in outs:
                continue
            if user.target not in LAYOUT | CAST | DROPOUT or len(graph.open_inputs(user)) != 1:
                return user
            walks.append(user)
    return None


def _in_series(boundary: Boundary, graph: CapturedGraph) -> fx.Node | None:
    """The one of hidden states and memory that is a projection of what the other is made of: no cross-attention."""
    if boundary.memory is None:
        return None
    hidden, memory = sources(boundary.hidden, graph), sources(boundary.memory, graph)
    shared = set(hidden) & set(memory)
    for start, chain in ((boundary.hidden, hidden), (boundary.memory, memory)):
        if any(isinstance(match_linear(n, graph), Found) for n in chain if n not in shared) and shared:
            return start
    return None


def apart_by_factor(boundary: Boundary, graph: CapturedGraph) -> str | None:
    """The reason when hidden states and memory are one tensor but for a constant factor: no cross-attention either."""
    pairs = (
        (boundary.hidden, boundary.memory, "q reads", "k and v"),
        (boundary.memory, boundary.hidden, "k and v read", "q"),
    )
    for scaled, plain, who, others in pairs:
        found = None if scaled is None else split_factor(graph.peel(scaled, CAST)[-1], graph)
        if found is not None and plain in graph.peel(found[1], CAST):
            return (
                f"{who} the hidden states times {found[0]:.6g} before the projection, {others} without that factor: "
                "a site has one input; put the factor into the projection's weight"
            )
    return None


def find_region(
    outs: Sequence[fx.Node], inputs: Sequence[Linear], own: Sequence[fx.Node], graph: CapturedGraph
) -> tuple[Output, Boundary] | None:
    """From the tensor that q, k and v are all made of to the output projection, or to the heads side by side."""
    chains = [graph.peel(linear.x, LAYOUT | CAST) for linear in inputs]
    hidden = _common(chains[0::3])
    memory = _common(chains[1::3] + chains[2::3])
    both = _common(chains)
    if both is not None:
        hidden = memory = both
    if hidden is None or memory is None:
        return None
    output = find_output(outs[0], graph)
    if isinstance(output, Refused):
        output = _heads_side_by_side(outs[0], graph)
    if output is None:
        return None
    end = output.out
    while len(shape(end) or ()) != 3:
        users = readers(end)
        if len(users) != 1 or users[0].target not in LAYOUT | CAST or len(graph.open_inputs(users[0])) != 1:
            return None
        end = users[0]
    owner = find_owner([*outs, *own, output.out, *(linear.out for linear in inputs)]) or ""
    return output, Boundary(owner=owner, hidden=hidden, end=end, last=end, memory=None if memory is hidden else memory)


def _common(chains: Sequence[list[fx.Node]]) -> fx.Node | None:
    """The nearest [batch, time, width] that is on all chains."""
    shared = set(chains[0]).intersection(*chains[1:])
    return next((n for n in chains[0] if n in shared and len(shape(n) or ()) == 3), None)


def _heads_side_by_side(core: fx.Node, graph: CapturedGraph) -> Output | None:
    """The last node after the core that still holds nothing but its heads."""
    walk, last = core, None
    while True:
        if len(shape(walk) or ()) == 3:
            last = walk
        users = readers(walk)
        if len(users) != 1 or users[0].op != "call_function":
            break
        user = users[0]
        joins = user.target in CAT and len(graph.open_inputs(user)) == len(user.all_input_nodes)
        if not joins and (user.target not in LAYOUT | CAST | DROPOUT or len(graph.open_inputs(user)) != 1):
            break
        walk = user
    return None if last is None else Output(x=last, out=last)
