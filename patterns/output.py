"""From the core forwards: norm and gate of the heads, the output projection, a residual, and nothing else.

Everything between the core and what the owner module returns must be one of these, or movement of data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.patterns.adapters import linear_of_all
from fla_swap.patterns.base import Found, Refused
from fla_swap.patterns.combined import combined
from fla_swap.patterns.core import SDPA
from fla_swap.patterns.gate import GateFacts, GateRefused, find_gate, state_gate
from fla_swap.patterns.graph import (
    CAST,
    DROPOUT,
    LAYOUT,
    SHAPE_ONLY,
    CapturedGraph,
    NotLayout,
    _ops,
    argument,
    modules_of,
    op_name,
    shape,
    source_of,
)
from fla_swap.patterns.norm import NormFacts, NormRefused, QKNorm, state_norm
from fla_swap.patterns.normalise import SOFTMAX
from fla_swap.patterns.projection import Linear, Project
from fla_swap.patterns.scores import ADD
from fla_swap.types import ArgPath, CallContract, WeightRef

CAT = _ops("cat", "concat", "stack")
_QUIET = LAYOUT | CAST | DROPOUT
_LONGEST_NORM = 24
_FURTHEST = 64


@dataclass(frozen=True, kw_only=True)
class Output:
    """What stands after the core: the heads' norm and gate, `x` (the heads side by side), the projection up to `out`.

    `linear` None: the heads leave their module as they are, and `out` is `x`. `same`: recognised steps, output → input.
    """

    x: fx.Node
    out: fx.Node
    linear: Linear | None = None
    norm: NormFacts | None = None
    gate: GateFacts | None = None
    sinks: WeightRef | None = None
    same: Mapping[fx.Node, fx.Node] = field(default_factory=dict)


def find_output(core: fx.Node, graph: CapturedGraph, owner: str | None = None) -> Output | Refused:
    """Walk from the core to the output projection, or, with `owner`, to where the heads leave this module."""
    walk, facts, same = core, {}, {}
    while True:
        users = [u for u in readers(walk) if owner is None or owner in modules_of(u)]
        if owner is not None and not users:
            return Output(x=walk, out=walk, same=same, **facts)
        result = _forward(walk, users, graph)
        if isinstance(result, Refused):
            return result
        if "projection" in result.facts:
            linear = _with_bias(result.facts["projection"], graph)
            return Output(x=linear.x, out=linear.out, linear=linear, same=same, **facts)
        for name, value in result.facts.items():
            if name in facts or (name == "norm" and "gate" in facts):
                return Refused(f"a {name} on the heads' outputs after {' and '.join(facts)}", result.nodes[0])
            facts[name] = value
        assert result.out is not None
        if result.next is not None:
            same[result.out] = result.next
        walk = result.out


def _forward(walk: fx.Node, users: list[fx.Node], graph: CapturedGraph) -> Found | Refused:
    """One step from the heads towards the output; `.out` is the node after it."""
    if len(users) == 1:
        (user,) = users
        found = Project().match(user, graph)
        if isinstance(found, Found | Refused):
            return found
        found = find_gate(user, walk, graph)
        if isinstance(found, Found):
            return dataclasses.replace(found, out=user)
        joins = user.target in CAT and len(graph.open_inputs(user)) == len(user.all_input_nodes)
        if joins or (user.target in _QUIET and len(graph.open_inputs(user)) == 1):
            return Found(nodes=(user,), out=user)
        cores = _cores_before(user, graph)
        if len(cores) > 1:
            return Refused(
                f"{op_name(user)} combines the outputs of {len(cores)} attention cores, as differential attention "
                "does, and a site cannot state that",
                user,
            )
        norm = _norm_after(walk, users, graph)
        if norm is not None:
            return norm
        if isinstance(found, Refused):
            return found
        return Refused(f"{op_name(user)} between the core and the output projection is not understood", user)
    adapted = linear_of_all(users, graph)
    if adapted is not None:
        return Found(facts={"projection": adapted})
    norm = _norm_after(walk, users, graph)
    if norm is not None:
        return norm
    return combined(walk, users, graph) or Refused(
        f"the attention's output is read by {len(users)} operations, expected one", walk
    )


def _norm_after(walk: fx.Node, users: list[fx.Node], graph: CapturedGraph) -> Found | None:
    """The norm of `walk`, to its last step: the furthest node that a norm recogniser walks back to it."""
    source = graph.peel(walk, CAST)[-1]
    found, region, frontier = None, {walk}, list(users)
    while frontier and len(region) < _LONGEST_NORM:
        node = min(frontier, key=graph.order)
        frontier.remove(node)
        if node in region or any(n not in region for n in graph.open_inputs(node)):
            continue
        region.add(node)
        frontier += readers(node)
        result = QKNorm().match(node, graph)
        if isinstance(result, Found) and result.next is not None and graph.peel(result.next, CAST)[-1] is source:
            found = Found(facts=result.facts, nodes=(node,), next=result.next, out=node)
    return found


def _cores_before(node: fx.Node, graph: CapturedGraph) -> set[fx.Node]:
    """The attention cores whose outputs reach `node` before any projection."""
    cores, seen, stack = set(), set(), list(graph.open_inputs(node))
    while stack and len(seen) < _FURTHEST:
        walk = stack.pop()
        if walk in seen:
            continue
        seen.add(walk)
        if walk.target in SDPA | SOFTMAX:
            cores.add(walk)
        elif not isinstance(Project().match(walk, graph), Found):
            stack += graph.open_inputs(walk)
    return cores


def _with_bias(linear: Linear, graph: CapturedGraph) -> Linear:
    users = readers(linear.out)
    if linear.bias is None and len(users) == 1:
        wider = Project().match(users[0], graph)
        if isinstance(wider, Found) and wider.facts["projection"].x is linear.x:
            return wider.facts["projection"]
    return linear


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node that read its values."""
    return [u for u in node.users if u.target not in SHAPE_ONLY]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the heads stand: `known` are the numbers token · width + channel at the output of each core."""

    known: Mapping[fx.Node, Tensor]
    width: int

    def at(self, node: fx.Node, same: Mapping[fx.Node, fx.Node], graph: CapturedGraph) -> tuple[Tensor, Tensor]:
        """(tokens, channels) at `node`. Raises `NotLayout`."""
        moved = graph.trace_from(self.known, node, same)
        return moved // self.width, moved % self.width


def check_order(output: Output, places: Places, last: fx.Node, graph: CapturedGraph) -> str | None:
    """Why the heads do not enter the output projection in order (and leave the owner as [B, T, D]), or None."""
    try:
        tokens, channels = places.at(output.x, output.same, graph)
    except NotLayout as stop:
        return f"{op_name(stop.node)} between the core and the output projection"
    if channels.shape[-1] != places.width or not bool((channels == torch.arange(places.width)).all()):
        return "the heads enter the output projection in another order than the queries"
    if not bool((tokens == tokens[..., :1]).all()):
        return "the output projection mixes tokens"
    return check_tokens(output, tokens[..., :1], last, graph)


def check_tokens(output: Output, tokens: Tensor, last: fx.Node, graph: CapturedGraph) -> str | None:
    """Why the output does not leave the owner as [B, T, D], or None. `tokens` [..., 1] enter the projection."""
    dims = shape(output.out)
    assert dims is not None
    left = graph.trace(output.out, tokens.expand(dims), last, {})
    wanted = graph.token_numbers()
    if left.dim() != 3 or left.shape[:2] != wanted.shape[:2] or not bool((left == wanted).all()):
        return f"the owner returns its output as {tuple(left.shape)}, expected [batch, time, hidden]"
    return None


def output_facts(
    output: Output, places: Places, hidden: fx.Node, heads: int, graph: CapturedGraph
) -> dict[str, Any] | Refused:
    """The facts of a site that stand after the core: the heads' norm and gate, another width of the output."""
    facts: dict[str, Any] = {}
    width = shape(hidden)
    if output.linear is not None and width is not None and output.linear.outputs != width[-1]:
        facts["output_size"] = output.linear.outputs
    try:
        if output.norm is not None:
            _, channels = places.at(output.norm.x, output.same, graph)
            facts["o_norm"] = state_norm(output.norm, channels, torch.arange(places.width).view(heads, -1))
        if output.gate is not None:
            tokens, channels = places.at(output.gate.heads, output.same, graph)
            facts["gate"] = state_gate(output.gate, hidden, tokens, channels, heads, graph)
    except NormRefused as refused:
        assert output.norm is not None
        return Refused(f"the norm of the heads' outputs {refused}", output.norm.x)
    except (GateRefused, NotLayout) as refused:
        return Refused(str(refused), output.x)
    return facts


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The owner module seen in the graph: `hidden` comes in, `last` goes out.

    `memory`: what keys and values are made of where that is not `hidden` (cross-attention). `residual`: what the owner
    adds to the attention's output, after `end`, the last step before that.
    """

    owner: str
    hidden: fx.Node
    end: fx.Node
    last: fx.Node
    memory: fx.Node | None = None
    residual: fx.Node | None = None

    def marks(self, *, time_first: bool) -> CallContract:
        """What the contract must find in a call; the residual's position says whether it is the hidden state itself."""
        residual = None if self.residual is None else ArgPath(position=0 if self.residual is self.hidden else 1)
        return CallContract(hidden=ArgPath(position=0), time_first=time_first, residual=residual)


def find_owner(nodes: list[fx.Node]) -> str | None:
    """The deepest module in which all of these nodes were computed; None when that is no module."""
    paths = [modules_of(n) for n in nodes]
    common = [p for p in paths[0] if all(p in other for other in paths[1:])]
    return common[-1] if common else None


class OutwardsRefused(Exception):
    """No owner around the core that a site can state. `slot`: "output" or "owner"."""

    def __init__(self, slot: str, reason: str, node: fx.Node):
        super().__init__(reason)
        self.slot, self.node = slot, node


def find_outwards(
    outs: Sequence[fx.Node],
    inputs: Sequence[Linear],
    own: Sequence[fx.Node],
    cores: Sequence[fx.Node],
    graph: CapturedGraph,
) -> tuple[Output, Boundary]:
    """The owner of an attention: the module with its output projection, or else the one that returns its heads.

    `outs`: the outputs of its cores; `inputs`: q, k, v (of each core); `own` of all `cores` belong to it. Raises
    `OutwardsRefused`: why the module with the output projection is none.
    """
    inner = [*outs, *own, *(linear.out for linear in inputs)]
    try:
        return _outwards(outs, inputs, own, cores, inner, None, graph)
    except OutwardsRefused as refused:
        owner = find_owner(inner)
        if owner is None:
            raise
        try:
            return _outwards(outs, inputs, own, cores, inner, owner, graph)
        except OutwardsRefused:
            raise refused from None


def _outwards(
    outs: Sequence[fx.Node],
    inputs: Sequence[Linear],
    own: Sequence[fx.Node],
    cores: Sequence[fx.Node],
    inner: list[fx.Node],
    owner: str | None,
    graph: CapturedGraph,
) -> tuple[Output, Boundary]:
    output = find_output(outs[0], graph, owner)
    if isinstance(output, Refused):
        raise OutwardsRefused("output", output.reason, output.node)
    owner = find_owner([*inner, output.out])
    if owner is None:
        raise OutwardsRefused("owner", "the projections and the core belong to no common module", own[0])
    count = sum(owner in modules_of(n) for n in cores)
    if count > len(own):
        reason = f"{owner!r} runs {count} attentions in one forward pass (it is shared, or does several)"
        raise OutwardsRefused("owner", reason, own[0])
    boundary = find_boundary(owner, inputs, output, graph)
    if isinstance(boundary, Refused):
        raise OutwardsRefused("owner", boundary.reason, boundary.node)
    return output, boundary


def inside_of(owner: str, graph: CapturedGraph) -> list[fx.Node]:
    """The calls made while the module `owner` was being called, in order."""
    if "inside" not in graph.known:
        found: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                for name in dict.fromkeys(modules_of(node)):
                    found.setdefault(name, []).append(node)
        graph.known["inside"] = found
    return graph.known["inside"].get(owner, [])


def find_boundary(owner: str, inputs: Sequence[Linear], o: Output, graph: CapturedGraph) -> Boundary | Refused:
    """What enters and leaves the owner; refused when it does more than attention. `inputs`: q, k, v (of each core)."""
    inside = [n for n in inside_of(owner, graph) if graph.is_open(n)]
    members = set(inside)
    entries = [_entry(linear, members, graph) for linear in inputs]
    for entry in entries:
        if entry in members:
            return Refused(
                f"the owner {owner!r} does more than attention: {op_name(entry)} before the projection", entry
            )
    sides = [set(entries[side::3]) for side in range(3)]
    if any(len(s) > 1 for s in sides):
        return Refused(f"the heads of {owner!r} read {max(map(len, sides))} different tensors", o.out)
    hidden, memory, values = entries[:3]
    if memory is not values:
        made = [f"{op_name(n)} ({source_of(n)})" if source_of(n) else n.name for n in (memory, values)]
        return Refused(
            f"the keys are made of what {made[0]} gives, the values of what {made[1]} gives: a site has one memory",
            values,
        )
    end = last = o.out
    residual = None
    while users := [u for u in readers(last) if u in members]:
        user = users[0]
        added = [n for n in user.all_input_nodes if n is not last]
        if len(users) == 1 and residual is None and _adds(user, last, added, members, graph):
            end, last, residual = last, user, added[0]
            continue
        quiet = _QUIET if residual is None else CAST | DROPOUT
        if len(users) > 1 or user.target not in quiet or len(graph.open_inputs(user)) != 1:
            return Refused(f"the owner {owner!r} does more than attention: {op_name(user)} after it", user)
        last = user
    known = {hidden, memory, residual}
    for node in inside:
        for value in graph.open_inputs(node):
            if value not in members and value not in known:
                return Refused(f"the owner {owner!r} also reads {value.name}", node)
        if node is not last and any(u not in members for u in readers(node)):
            return Refused(f"the owner {owner!r} also returns {op_name(node)}", node)
    memory = None if memory is hidden else memory
    end = last if residual is None else end
    return Boundary(owner=owner, hidden=hidden, end=end, last=last, memory=memory, residual=residual)


def _adds(user: fx.Node, last: fx.Node, added: list[fx.Node], members: set[fx.Node], graph: CapturedGraph) -> bool:
    """Whether `user` adds to `last` one tensor of its shape that comes into the owner as it is."""
    if user.target not in ADD or len(added) != 1 or argument(user, 2, "alpha", 1) != 1:
        return False
    return added[0] not in members and graph.is_open(added[0]) and shape(added[0]) == shape(last)


def _entry(linear: Linear, members: set[fx.Node], graph: CapturedGraph) -> fx.Node:
    """The tensor that comes into the owner for a projection: the last one on the way in that a movement explains."""
    entry = linear.x
    while entry in members and entry.target in LAYOUT | CAST and len(graph.open_inputs(entry)) == 1:
        entry = graph.open_inputs(entry)[0]
    return entry
