"""Rotary embedding in any spelling: the step between two tensors is run on random input, and the rotation read off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CONTRACTION, LAYOUT, REINTERPRET, CapturedGraph, shape
from fla_swap.patterns.temperature import factor_by_position
from fla_swap.types import Rope


class NotRotation(Exception):
    """The step depends on the position but rotates no pairs of channels at fixed frequencies."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """q or k turned by its position (2104.09864): full or partial, half or interleaved, any static frequencies."""

    name: str = "rope"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        chain = graph.peel(node, LAYOUT | REINTERPRET)
        if factor_by_position(chain[-1], graph) is not None:
            return ABSENT  # no rotation: another recogniser's, once the movements after it are walked
        x, between = graph.join(chain[-1])
        if x is None or len(graph.open_inputs(chain[-1])) == 0:
            return ABSENT
        region = {chain[-1], *between}
        if any(n.target in CONTRACTION for n in region) or not _reads_positions(region, graph):
            return ABSENT
        pair = _same_shape(chain, graph.peel(x, LAYOUT | REINTERPRET))
        if pair is None:
            return Refused("a step that depends on the position changes the shape of its input", chain[-1])
        out, x = pair
        key = _structure(out, x, graph)
        if key not in graph.known:
            graph.known[key] = _rotation(out, x, graph)
        rope = graph.known[key]
        if isinstance(rope, str):
            return Refused(rope, chain[-1])
        return Found(facts={"rope": rope}, nodes=tuple(region), next=x, out=out)


def _reads_positions(region: set[fx.Node], graph: CapturedGraph) -> bool:
    for node in region:
        for value in node.all_input_nodes:
            if not graph.is_open(value) and graph.length in (shape(value) or ()):
                return True
    return False


def _same_shape(outs: list[fx.Node], inputs: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The pair (out, input) of one shape with the widest last dimension; the innermost of those."""
    pairs = [
        (out, x)
        for x in inputs
        for out in reversed(outs)
        if shape(x) and shape(out) == shape(x) and not x.meta["val"].is_complex()
    ]
    return max(pairs, key=lambda p: (shape(p[1]) or (0,))[-1], default=None)


def _structure(out: fx.Node, x: fx.Node, graph: CapturedGraph) -> tuple:
    """Equal for steps that spell the same function of the same tables: each is evaluated once."""
    numbers: dict[fx.Node, int] = {x: 0}
    spelled: list = []

    def visit(node: fx.Node) -> None:
        if node in numbers:
            return
        if not graph.is_open(node):
            while node.target in LAYOUT and len(node.all_input_nodes) == 1:
                spelled.append((str(node.target), str(node.args[1:])))
                node = node.all_input_nodes[0]
            spelled.append(node)
            return
        for value in node.all_input_nodes:
            visit(value)
        numbers[node] = len(numbers)
        spelled.append((node.target, str(map_arg(node.args, lambda n: numbers.get(n, -1)))))

    visit(out)
    return ("rope", shape(x), *spelled)


def _rotation(out: fx.Node, x: fx.Node, graph: CapturedGraph) -> Rope | str:
    dims = shape(x)
    assert dims is not None
    if dims[:-1].count(graph.length) != 1:
        return f"a step that depends on the position acts on a tensor of shape {dims}"
    time = dims.index(graph.length)
    sample = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    try:
        before = sample.movedim(time, -2).reshape(-1, graph.length, dims[-1])
        after = graph.run(out, {x: sample}).float().movedim(time, -2).reshape(before.shape)
        return read_rotation(before.double(), after.double(), _frequency_tables(out, x, graph))
    except NotRotation as refused:
        return str(refused)


def _frequency_tables(out: fx.Node, x: fx.Node, graph: CapturedGraph) -> list[Tensor]:
    """One-dimensional constants behind the step: if the frequencies are one of them, they are exact."""
    tables, stack, seen = [], [out], {x}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = graph.values.get(node.name) if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            tables.append(value.detach().double().cpu())
        stack.extend(node.all_input_nodes)
    return tables


def read_rotation(before: Tensor, after: Tensor, tables: list[Tensor]) -> Rope:
    """The `Rope` with after = rotate(before), from samples [N, T, D] at positions 0 … T−1. Raises `NotRotation`."""
    width = before.shape[-1]
    tolerance = 2e-5 + 2e-7 * before.shape[1]
    moved = ((after - before).abs().amax((0, 1)) > 1e-7).nonzero()
    if not len(moved):
        raise NotRotation("a step reads the positions but changes nothing")
    widest = min(width, (int(moved.max()) + 2) // 2 * 2)
    for rotated in dict.fromkeys((width - width % 2, widest)):
        if float((after - before)[..., rotated:].abs().amax() if rotated < width else 0.0) > tolerance:
            continue
        for style in ("half", "interleaved"):
            turn = _turns(before[..., :rotated], after[..., :rotated], style, tolerance)
            if turn is not None:
                return _from_turns(turn, style, tolerance, tables)
    raise NotRotation("a step depends on the position, but rotates no fixed pairs of channels")


def _complex(x: Tensor, style: str) -> Tensor:
    if style == "half":
        first, second = x.chunk(2, -1)
    else:
        first, second = x[..., ::2], x[..., 1::2]
    return torch.complex(first, second)


def _turns(before: Tensor, after: Tensor, style: str, tolerance: float) -> Tensor | None:
    """c + i·s of each position and pair [T, n] if every sample was turned by the same."""
    x, y = _complex(before, style), _complex(after, style)
    turn = (y * x.conj()).sum(0) / x.abs().square().sum(0)
    return turn if float((turn * x - y).abs().max()) < tolerance * 10 * float(y.abs().max()) else None


def _from_turns(turn: Tensor, style: str, tolerance: float, tables: list[Tensor]) -> Rope:
    if style == "interleaved":
        still = ((turn - 1).abs() < 1e-6).all(0).tolist()
        turn = turn[:, : len(still) - next((i for i, s in enumerate(reversed(still)) if not s), 0)]
    scaling = float(turn[0, 0].abs())
    if float((turn.abs() - scaling).abs().max()) > tolerance * 10 * scaling:
        raise NotRotation("q or k is scaled by an amount that depends on the position or the channel")
    scaling = 1.0 if abs(scaling - 1.0) < tolerance else scaling
    if float((turn[0] / scaling - 1).abs().max()) > 1e-4:
        raise NotRotation("positions do not start at 0 in the rotary embedding")
    freq = turn[1].angle()
    for table in tables:
        if table.shape == freq.shape and bool(((table - freq).abs() <= 1e-5 * table.abs() + 1e-7).all()):
            freq = table
    positions = torch.arange(turn.shape[0]).double()
    expected = scaling * torch.polar(torch.ones_like(turn.real), positions[:, None] * freq)
    if float((expected - turn).abs().max()) > scaling * max(tolerance * 20, 1e-3):
        raise NotRotation("the rotation is not position × frequency")
    if any(abs(f) > math.pi for f in freq.tolist()):
        raise NotRotation("a rotary frequency above π")
    return Rope(inv_freq=tuple(freq.tolist()), style=style, attention_scaling=scaling)


def same_rotation(a: Rope | None, b: Rope | None) -> bool:
    """Whether two rotations (or none) are the same within rounding."""
    if a is None or b is None:
        return a is b
    same = a.style == b.style and len(a.inv_freq) == len(b.inv_freq)
    pairs = zip((*a.inv_freq, a.attention_scaling), (*b.inv_freq, b.attention_scaling), strict=True)
    return same and all(abs(x - y) <= 1e-4 * abs(y) + 1e-7 for x, y in pairs)
