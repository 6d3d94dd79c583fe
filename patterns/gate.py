"""Output gates: the heads' outputs times activation(x Wᵀ + b), channel by channel or head by head (2505.06708)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CAST, DROPOUT, LAYOUT, CapturedGraph, NotLayout, _ops, argument, op_name, shape
from fla_swap.patterns.normalise import SOFTMAX
from fla_swap.patterns.projection import Linear, Project
from fla_swap.patterns.steps import MUL, SUB
from fla_swap.types import Gate, WeightRef

ACTIVATIONS = {
    "sigmoid": _ops("sigmoid", "sigmoid_", "special_expit"),
    "silu": _ops("silu", "silu_"),
    "tanh": _ops("tanh", "tanh_"),
    "softplus": _ops("softplus"),
}


LOGSUMEXP = _ops("logsumexp")


class GateRefused(Exception):
    """The gate's projection does not stand against the heads as a site states it."""


@dataclass(frozen=True, kw_only=True)
class GateFacts:
    """heads · opened, where `opened` is `activation` of the output of `linear`, moved and broadcast."""

    activation: str
    linear: Linear
    heads: fx.Node
    opened: fx.Node
    same: Mapping[fx.Node, fx.Node]


def find_gate(node: fx.Node, heads: fx.Node, graph: CapturedGraph) -> Result:
    """Whether `node` multiplies `heads` by a gate; the fact "gate" is a `GateFacts`."""
    others = [n for n in node.all_input_nodes if n is not heads]
    if node.target not in MUL or len(others) != 1:
        return ABSENT
    (opened,) = others
    if not graph.is_open(opened):
        return Refused(
            "the heads' outputs are multiplied by a stored or constant factor, which a site cannot state", node
        )
    step = graph.peel(opened, LAYOUT | CAST)[-1]
    name = next((n for n, ops in ACTIVATIONS.items() if step.target in ops), None)
    if name is None:
        return Refused(
            f"the heads' outputs are multiplied by {op_name(step)}, expected one of {sorted(ACTIVATIONS)} as a gate",
            node,
        )
    if name == "softplus" and (argument(step, 1, "beta", 1), argument(step, 2, "threshold", 20)) != (1, 20):
        return Refused("a gate with a softplus of another slope or threshold", step)
    before = step.all_input_nodes[0]
    if name == "sigmoid":
        sinks = sinks_of_gate(before, heads, graph)
        if sinks is not None and _each_query(step, opened, heads, graph):
            return Found(facts={"sinks": sinks}, nodes=(node, step), next=heads)
    for inner in graph.peel(before, LAYOUT | CAST):
        found = Project().match(inner, graph)
        if isinstance(found, Refused):
            return found
        if isinstance(found, Found):
            facts = GateFacts(
                activation=name, linear=found.facts["projection"], heads=heads, opened=opened, same={step: before}
            )
            return Found(facts={"gate": facts}, nodes=(node, step), next=heads)
    return Refused("a gate on the heads' outputs that is not one projection of the hidden states", step)


def sinks_of_gate(logit: fx.Node, heads: fx.Node, graph: CapturedGraph) -> WeightRef | None:
    """Sinks, spelled as a gate: softmax(s) · sigmoid(logsumexp(s) − sink) is the softmax with one more column, `sink`.

    `logit` [B, H, T] (or [B, H, T, 1]) is the difference; `heads` [B, H, T, V] must be what the softmax of the same
    scores was multiplied into. 2309.17453 describes sinks.
    """
    less = graph.peel(logit, CAST)[-1]
    if less.target not in SUB or len(less.args) != 2 or argument(less, 2, "alpha", 1) != 1:
        return None
    total, sinks = less.args
    if not isinstance(total, fx.Node) or not isinstance(sinks, fx.Node) or graph.is_open(sinks):
        return None
    total = graph.peel(total, CAST)[-1]
    dims = shape(total) or ()
    if total.target not in LOGSUMEXP or total.args[1] not in ([-1], -1, [3]):
        return None
    scores, probabilities = total.args[0], graph.peel(heads, CAST)[-1].all_input_nodes
    softmaxes = [s for n in probabilities for s in graph.peel(n, CAST | DROPOUT) if s.target in SOFTMAX]
    if len(softmaxes) != 1 or softmaxes[0].args[0] is not scores or softmaxes[0].args[1] not in (-1, 3):
        return None
    return stored_for_heads(sinks, dims, graph) if len(shape(scores) or ()) == 4 else None


def _each_query(step: fx.Node, opened: fx.Node, heads: fx.Node, graph: CapturedGraph) -> bool:
    """Whether `opened` [B, H, T, 1] holds what `step` [B, H, T] has for each query of `heads` [B, H, T, V]."""
    dims = shape(heads) or ()
    numbers = torch.arange(math.prod(dims[:-1])).reshape(dims[:-1])
    try:
        start = numbers.reshape(shape(step) or ())
        moved = graph.trace(step, start, opened, {})
    except (NotLayout, RuntimeError):
        return False
    return torch.equal(moved, numbers[..., None])


def stored_for_heads(node: fx.Node, dims: tuple[int, ...], graph: CapturedGraph) -> WeightRef | None:
    """The one-dimensional parameter behind `node` whose entry h stands at [:, h] of a tensor of shape `dims`."""
    origin = node
    while origin.op == "call_function" and len(origin.all_input_nodes) == 1:
        origin = origin.all_input_nodes[0]
    size = shape(origin)
    if origin.name not in graph.weights or size is None or size != (dims[1],):
        return None
    try:
        numbers = graph.trace_closed(origin, torch.arange(size[0]), node)
        found = numbers.expand(dims)
    except (NotLayout, RuntimeError):
        return None
    wanted = torch.arange(size[0]).reshape(-1, *(1,) * (len(dims) - 2))
    return WeightRef(name=graph.weights[origin.name]) if bool((found == wanted).all()) else None


def state_gate(
    facts: GateFacts, hidden: fx.Node, tokens: Tensor, channels: Tensor, heads: int, graph: CapturedGraph
) -> Gate:
    """The `Gate` that a site states. Raises `GateRefused`.

    `tokens`, `channels`: which token, and which of the heads' channels in the order of the site, stands at each entry
    of `facts.heads`.
    """
    linear = facts.linear
    try:
        read = graph.trace(hidden, graph.token_numbers().expand(shape(hidden) or ()), linear.x, {})
        numbers = read[..., :1] * linear.outputs + torch.arange(linear.outputs)
        numbers = graph.trace(linear.out, numbers, facts.opened, facts.same)
    except NotLayout as stop:
        raise GateRefused(f"{op_name(stop.node)} between the hidden states and the gate") from stop
    if not bool((read == read[..., :1]).all()):
        raise GateRefused("the gate's projection mixes tokens")
    numbers, tokens, channels = torch.broadcast_tensors(numbers, tokens, channels)
    rows = (numbers % linear.outputs).flatten()
    if not torch.equal(numbers // linear.outputs, tokens):
        raise GateRefused("a token is gated by another token")
    table = torch.full((int(channels.max()) + 1,), -1)
    table[channels.flatten()] = rows
    if not torch.equal(table[channels.flatten()], rows):
        raise GateRefused("the gate differs between tokens in more than the hidden states")
    per_head = table.view(heads, -1)
    if per_head.shape[1] > 1 and bool((per_head == per_head[:, :1]).all()):
        return Gate(projection=linear.projection(per_head[:, 0]), activation=facts.activation, per_head=True)
    return Gate(projection=linear.projection(table), activation=facts.activation)
