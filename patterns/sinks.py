"""Attention sinks: one learned logit for each head takes part in the softmax and is dropped after it (2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CapturedGraph, NotLayout, _ops, argument, shape
from fla_swap.patterns.steps import SUB
from fla_swap.types import WeightRef

CAT = _ops("cat", "concat")
LARGEST = _ops("max", "amax")


@dataclass(frozen=True, kw_only=True)
class Shift:
    """scores − max(scores), for numerical safety: a softmax does not see it."""

    name: str = "shift"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in SUB or len(node.all_input_nodes) != 2:
            return ABSENT
        x, largest = node.all_input_nodes
        if not graph.is_open(largest):
            return ABSENT
        largest = graph.open_inputs(largest)[0] if shape(largest) and largest.target not in LARGEST else largest
        if largest.target not in LARGEST or largest.all_input_nodes[0] is not x:
            return ABSENT
        if argument(largest, 1, "dim") not in (-1, len(shape(x) or ()) - 1, [-1]):
            return Refused("the scores are shifted by a maximum over something else than the keys", node)
        return Found(nodes=(node, largest), next=x)


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """`cat([scores, sinks], -1)` with one stored logit for each head."""

    name: str = "sinks"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in CAT or len(node.all_input_nodes) != 2:
            return ABSENT
        scores, sinks = node.all_input_nodes
        if graph.is_open(sinks) or not graph.is_open(scores):
            return Refused("something that depends on what the model reads is joined to the scores", node)
        dims = shape(sinks)
        name = self._parameter(graph.peel_closed(sinks), graph)
        if dims is None or dims[-1] != 1 or len(dims) != 4 or name is None:
            return Refused("what is joined to the scores is not one stored logit for each head", node)
        return Found(facts={"sinks": WeightRef(name=name)}, nodes=(node,), next=scores)

    @staticmethod
    def _parameter(node: fx.Node, graph: CapturedGraph) -> str | None:
        origin = node
        while origin.op == "call_function" and len(origin.all_input_nodes) == 1:
            origin = origin.all_input_nodes[0]
        dims = shape(origin)
        if origin.name not in graph.weights or dims is None or len(dims) != 1:
            return None
        try:
            numbers = graph.trace_closed(origin, torch.arange(dims[0]), node)
        except NotLayout:
            return None
        wanted = torch.arange(dims[0])[:, None, None]
        fits = numbers.dim() == 4 and numbers.shape[1] == dims[0] and bool((numbers == wanted).all())
        return graph.weights[origin.name] if fits else None
