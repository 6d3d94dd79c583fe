"""Queries times a factor that grows with the logarithm of the position (Llama 4, Ministral 3; 2501.19399)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CapturedGraph, _ops, modules_of, shape
from fla_swap.patterns.scores import MUL
from fla_swap.types import Temperature

ARANGE = _ops("arange")
POSITIONS = ("position_ids", "cache_position")
STEPS = 12
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class LogTemperature:
    """x · (1 + s · log(1 + ⌊(position + o) / L⌋)). The constants are read from the graph; the closed factor is then run
    at positions around its first steps, which lie beyond the captured length."""

    name: str = "temperature"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        factor = factor_by_position(node, graph)
        if factor is None:
            return ABSENT
        return self._found(node, graph.open_inputs(node)[0], factor, graph)

    @staticmethod
    def _found(node: fx.Node, x: fx.Node, factor: fx.Node, graph: CapturedGraph) -> Result:
        key = ("temperature", factor)
        if key not in graph.known:
            graph.known[key] = _fit(factor, graph)
        found = graph.known[key]
        if found is None:
            reason = "q or k is scaled by an amount that depends on the position, but not as 1 + s · log(1 + ⌊p / L⌋)"
            return Refused(reason, node)
        return Found(facts={"temperature": found}, nodes=(node, factor), next=x)


def factor_by_position(node: fx.Node, graph: CapturedGraph) -> fx.Node | None:
    """The closed factor when `node` is an open tensor times one number for each token."""
    if node.target not in MUL or len(node.all_input_nodes) != 2 or len(graph.open_inputs(node)) != 1:
        return None
    factor = next(n for n in node.all_input_nodes if not graph.is_open(n))
    return factor if _by_position(factor, graph) else None


def _by_position(factor: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a closed factor is one number for each token."""
    dims = shape(factor) or ()
    if dims.count(graph.length) != 1:
        return False
    value = graph.evaluate(factor)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    rows = value.movedim(dims.index(graph.length), -1).reshape(-1, graph.length)
    return bool((rows == rows[:1]).all()) and bool(_sources(factor, graph))


def _sources(factor: fx.Node, graph: CapturedGraph) -> list[fx.Node]:
    """The nodes that number the tokens from 0: the factor is a function of these."""
    cone, stack = set(), [factor]
    while stack:
        node = stack.pop()
        if node not in cone:
            cone.add(node)
            stack.extend(node.all_input_nodes)
    counts = torch.arange(graph.length)
    found = []
    for node in cone:
        given = node.op == "placeholder" and node.name not in graph.weights
        if (node.target in ARANGE or given) and (shape(node) or ())[-1:] == (graph.length,):
            value = graph.evaluate(node)
            if bool((value.reshape(-1, graph.length) == counts).all()):
                found.append(node)
            elif not given or node.name.startswith(POSITIONS):
                return []
    return found


def _fit(factor: fx.Node, graph: CapturedGraph) -> Temperature | None:
    sources = _sources(factor, graph)
    time = (shape(factor) or ()).index(graph.length)

    def at(start: int) -> Tensor:
        """The factor at positions start, start + 1, …"""
        given = {n: graph.evaluate(n) + start for n in sources}
        return graph.run(factor, given).double().movedim(time, -1).reshape(-1, graph.length)[0]

    padding = any(n.target in ARANGE and _same_module(n, factor) for n in sources)
    for length in sorted(c for c in _constants(factor, graph) if c >= 2):
        for offset in (0, 1):
            scale = (float(at(length - offset)[0]) - 1.0) / math.log(2.0)
            guess = Temperature(scale=round(scale, 6), length=length, offset=offset, padding=padding)
            if abs(scale) > 1e-4 and all(_agrees(guess, at, start) for start in _probes(length, graph.length)):
                return guess
    return None


def _same_module(source: fx.Node, factor: fx.Node) -> bool:
    return modules_of(source) == modules_of(factor)


def _probes(length: int, width: int) -> list[int]:
    """Starts of stretches of positions: around the first steps, and far out."""
    around = [max(0, step * length - width // 2 - 1) for step in range(STEPS)]
    return [*around, *(step * length + length // 2 for step in (0, 1, 17, 50))]


def _agrees(guess: Temperature, at, start: int) -> bool:  # type: ignore[no-untyped-def]
    found = at(start)
    positions = torch.arange(start, start + len(found)).double()
    steps = torch.floor((positions + guess.offset) / guess.length)
    return float((1 + guess.scale * torch.log1p(steps) - found).abs().max()) < TOLERANCE


def _constants(factor: fx.Node, graph: CapturedGraph) -> set[int]:
    """Whole numbers among the constants that the factor is computed from."""
    seen, stack, found = set(), [factor], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        values = [a for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
        value = graph.values.get(node.name) if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.numel() == 1:
            values.append(value.item())
        found.update(int(v) for v in values if float(v).is_integer() and abs(v) < 2**31)
    return found
