"""From the core forwards: heads are put together, the output projection, and nothing else until the owner returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.adapters import linear_of_all
from fla_swap.patterns.base import Found, Refused
from fla_swap.patterns.core import SDPA, SOFTMAX
from fla_swap.patterns.graph import (
    CAST,
    DROPOUT,
    LAYOUT,
    SHAPE_ONLY,
    CapturedGraph,
    NotLayout,
    modules_of,
    op_name,
    shape,
)
from fla_swap.patterns.projection import Linear, Project

_QUIET = LAYOUT | CAST | DROPOUT


def find_output(core: fx.Node, graph: CapturedGraph) -> Linear | Refused:
    """The projection that the core's output goes into, with its bias."""
    walk = core
    while True:
        users = readers(walk)
        if len(users) != 1:
            adapted = linear_of_all(users, graph)
            if adapted is not None:
                return adapted
            return Refused(f"the attention's output is read by {len(users)} operations, expected one", walk)
        (user,) = users
        found = Project().match(user, graph)
        if isinstance(found, Refused):
            return found
        if isinstance(found, Found):
            linear: Linear = found.facts["projection"]
            return _with_bias(linear, graph)
        if user.target not in _QUIET or len(graph.open_inputs(user)) != 1:
            if _meets_another(user, core, graph):
                return Refused("the outputs of several attentions are combined (differential attention?)", user)
            return Refused(f"{op_name(user)} between the core and the output projection is not understood", user)
        walk = user


def _meets_another(node: fx.Node, core: fx.Node, graph: CapturedGraph) -> bool:
    """Whether another attention of the same module goes into `node`."""
    inside = modules_of(core)
    seen: set[fx.Node] = set()
    stack = graph.open_inputs(node)
    while stack and len(seen) < 40:
        walk = stack.pop()
        if walk is core or walk in seen or modules_of(walk) != inside:
            continue
        seen.add(walk)
        if walk.target in SDPA | SOFTMAX:
            return True
        stack.extend(graph.open_inputs(walk))
    return False


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


def check_order(
    linear: Linear, core: fx.Node, last: fx.Node, batch_of: Tensor, heads: int, graph: CapturedGraph
) -> str | None:
    """Why the heads do not enter the output projection in order (and leave the owner as [B, T, D]), or None.

    `batch_of` [L] is the batch row of each leading index of the core's output [..., T, V].
    """
    dims = shape(core)
    assert dims is not None
    width = heads * dims[-1]
    head_of = torch.zeros_like(batch_of)
    for b in range(graph.batch):
        head_of[batch_of == b] = torch.arange(int((batch_of == b).sum()))
    token = batch_of[:, None] * graph.length + torch.arange(graph.length)
    numbers = token[..., None] * width + head_of[:, None, None] * dims[-1] + torch.arange(dims[-1])
    try:
        entered = graph.trace(core, numbers.reshape(dims), linear.x, {})
    except NotLayout as stop:
        return f"{op_name(stop.node)} between the core and the output projection"
    if entered.shape[-1] != width or not bool((entered % width == torch.arange(width)).all()):
        return "the heads enter the output projection in another order than the queries"
    tokens = entered // width
    if not bool((tokens == tokens[..., :1]).all()):
        return "the output projection mixes tokens"
    left = graph.trace(linear.out, tokens[..., :1].expand(*tokens.shape[:-1], linear.outputs), last, {})
    wanted = graph.token_numbers()
    if left.dim() != 3 or left.shape[:2] != wanted.shape[:2] or not bool((left == wanted).all()):
        return f"the owner returns its output as {tuple(left.shape)}, expected [batch, time, hidden]"
    return None


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The owner module seen in the graph: `hidden` comes in, `last` goes out.

    `memory`: what keys and values are made of where that is not `hidden` (cross-attention).
    """

    owner: str
    hidden: fx.Node
    last: fx.Node
    memory: fx.Node | None = None


def find_owner(nodes: list[fx.Node]) -> str | None:
    """The deepest module in which all of these nodes were computed; None when that is no module."""
    paths = [modules_of(n) for n in nodes]
    common = [p for p in paths[0] if all(p in other for other in paths[1:])]
    return common[-1] if common else None


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


def find_boundary(owner: str, inputs: Sequence[Linear], o: Linear, graph: CapturedGraph) -> Boundary | Refused:
    """What enters and leaves the owner; refused when that is more than one attention. `inputs`: q, k, v."""
    inside = [n for n in inside_of(owner, graph) if graph.is_open(n)]
    members = set(inside)
    entries = [_entry(linear, members, graph) for linear in inputs]
    for entry in entries:
        if entry in members:
            return Refused(
                f"the owner {owner!r} does more than attention: {op_name(entry)} before the projection", entry
            )
    hidden, memory, values = entries
    if memory is not values:
        return Refused(f"the keys are made of {memory.name}, the values of {values.name}", values)
    last = o.out
    while True:
        users = [u for u in readers(last) if u in members]
        if not users:
            break
        if len(users) > 1 or users[0].target not in _QUIET or len(graph.open_inputs(users[0])) != 1:
            return Refused(f"the owner {owner!r} does more than attention: {op_name(users[0])} after it", users[0])
        last = users[0]
    for node in inside:
        for value in graph.open_inputs(node):
            if value not in members and value is not hidden and value is not memory:
                return Refused(f"the owner {owner!r} also reads {value.name}", node)
        if node is not last and any(u not in members for u in readers(node)):
            return Refused(f"the owner {owner!r} also returns {op_name(node)}", node)
    return Boundary(owner=owner, hidden=hidden, last=last, memory=None if memory is hidden else memory)


def _entry(linear: Linear, members: set[fx.Node], graph: CapturedGraph) -> fx.Node:
    """The tensor that comes into the owner for a projection: the last one on the way in that a movement explains."""
    entry = linear.x
    while entry in members and entry.target in LAYOUT | CAST and len(graph.open_inputs(entry)) == 1:
        entry = graph.open_inputs(entry)[0]
    return entry
