"""Output gates: the heads' outputs times activation(x Wᵀ + b), channel by channel or head by head (2505.06708)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CAST, LAYOUT, CapturedGraph, NotLayout, _ops, argument, op_name, shape
from fla_swap.patterns.projection import Linear, Project
from fla_swap.patterns.scores import MUL
from fla_swap.types import Gate

ACTIVATIONS = {
    "sigmoid": _ops("sigmoid", "sigmoid_", "special_expit"),
    "silu": _ops("silu", "silu_"),
    "tanh": _ops("tanh", "tanh_"),
    "softplus": _ops("softplus"),
}


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
