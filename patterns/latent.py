"""Projections in series: multi-head latent attention (2405.04434) and low-rank queries, told apart for the refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from fla_swap.patterns.adapters import match_linear
from fla_swap.patterns.base import Found
from fla_swap.patterns.graph import CAST, CONTRACTION, DROPOUT, LAYOUT, CapturedGraph, modules_of, shape
from fla_swap.patterns.norm import QKNorm
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.scores import split_factor

_QUIET = LAYOUT | CAST | DROPOUT
_REACH = 80


def name_series(
    core: Mapping[str, Any], owner: str, slot: str, graph: CapturedGraph
) -> tuple[str, fx.Node | None] | None:
    """(reason, node or None) where projections stand in series and that is why `slot` did not hold; else None."""
    turned = turned_heads(core, owner, graph)
    if turned is not None:
        return turned if slot == "owner" else None
    latent = describe_latent(core, owner, graph)
    return None if latent is None else (latent, None)


def describe_latent(core: Mapping[str, Any], owner: str, graph: CapturedGraph) -> str | None:
    """What the projections of a core do that a site cannot state: several in series. None when they are not.

    `owner`: the module around the core; what lies before it is not looked at.
    """
    q, k, v = (_projections(core[side], owner, graph) for side in "qkv")
    ranks = {side: _ranks(found, owner, graph) for side, found in zip("qkv", (q, k, v), strict=True)}
    if ranks["k"] or ranks["v"]:
        rank = max(ranks["k"] | ranks["v"])
        queries = f"q of rank {max(ranks['q'])}" if ranks["q"] else "q of full rank"
        shared = _shared(k, v)
        turned = f", {shared} rotary channels shared by all heads" if shared else ""
        return (
            f"multi-head latent attention: {queries}, keys and values of rank {rank}{turned}: "
            "a site states one matrix for each projection"
        )
    if ranks["q"]:
        return f"low-rank queries: q goes through {max(ranks['q'])} channels, and a site states one matrix for q"
    return None


def turned_heads(core: Mapping[str, Any], owner: str, graph: CapturedGraph) -> tuple[str, fx.Node] | None:
    """(reason, node) where an operand of the core is multiplied by a stored matrix after its split into heads."""
    for side in "qkv":
        for linear in _projections(core[side], owner, graph):
            before = _before(linear.x, owner, graph)
            if before is not None and _vectors(linear.x) > _vectors(before.out):
                return f"{side} is multiplied by a stored matrix after its split into heads", linear.out
    return None


def _projections(start: fx.Node, owner: str, graph: CapturedGraph) -> list[Linear]:
    """The nearest projections behind an operand of the core."""
    found: list[Linear] = []
    seen: set[fx.Node] = set()
    stack = [start]
    while stack and len(seen) < _REACH:
        node = stack.pop()
        if node in seen or owner not in modules_of(node):
            continue
        seen.add(node)
        if node.target in CONTRACTION or "add" in str(node.target):
            result = match_linear(node, graph)
            if isinstance(result, Found):
                found.append(result.facts["projection"])
                continue
        stack.extend(graph.open_inputs(node))
        stack.extend(graph.writers(node))
    return found


def _ranks(linears: list[Linear], owner: str, graph: CapturedGraph) -> set[int]:
    """Widths of what lies between two projections in series: `inputs` of the later one."""
    return {linear.inputs for linear in linears if _before(linear.x, owner, graph) is not None}


def _vectors(node: fx.Node) -> int:
    """How many vectors along its last dimension a tensor holds."""
    return math.prod((shape(node) or (0,))[:-1])


def _before(node: fx.Node, owner: str, graph: CapturedGraph) -> Linear | None:
    """The other projection of the owner that `node` comes from, through norms and movements of data alone."""
    while owner in modules_of(node):
        result = match_linear(node, graph)
        if isinstance(result, Found):
            return result.facts["projection"]
        norm = QKNorm().match(node, graph)
        if isinstance(norm, Found) and norm.next is not None:
            node = norm.next
            continue
        factor = split_factor(node, graph)
        if factor is not None:
            node = factor[1]
            continue
        inputs = graph.open_inputs(node)
        if node.target not in _QUIET or len(inputs) != 1:
            return None
        node = inputs[0]
    return None


def sources(start: fx.Node, graph: CapturedGraph) -> list[fx.Node]:
    """What `start` is made of through projections, norms and movements of data alone, nearest first, itself too."""
    found = [start]
    while True:
        node = found[-1]
        linear, norm = match_linear(node, graph), QKNorm().match(node, graph)
        inputs = graph.open_inputs(node)
        if isinstance(linear, Found):
            found.append(linear.facts["projection"].x)
        elif isinstance(norm, Found) and norm.next is not None:
            found.append(norm.next)
        elif node.target in _QUIET and len(inputs) == 1:
            found.append(inputs[0])
        else:
            return found


def _shared(k: list[Linear], v: list[Linear]) -> int:
    """How many channels the keys have beside those that come from the latent: they are copied to every head."""
    latent = {linear.out for linear in v}
    beside = [linear for linear in k if linear.out not in latent]
    inner = max((linear.inputs for linear in v), default=0)
    widths = [linear.outputs - inner if linear.outputs > inner else linear.outputs for linear in beside]
    return min(widths, default=0)
