"""What stands around a linear recurrence: its decay, and norm and gate on the way to the output projection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.errors import NoValue
from fla_swap.patterns.base import Found
from fla_swap.patterns.graph import CAST, LAYOUT, CapturedGraph, _ops, argument, op_name, shape
from fla_swap.patterns.norm import QKNorm
from fla_swap.patterns.output import readers
from fla_swap.patterns.parts import Stop
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.reach import PRODUCT
from fla_swap.patterns.scores import split_factor
from fla_swap.patterns.steps import ADD, MUL
from fla_swap.patterns.weights import Spread, WeightsRefused, read_spread, weights_behind
from fla_swap.types import Norm, WeightRef

SOFTPLUS, WHERE, LOG = _ops("softplus"), _ops("where"), _ops("log", "log1p")
CLAMP = _ops("clamp", "clamp_min", "clamp_max")
ROOT = _ops("rsqrt", "sqrt", "linalg_vector_norm", "norm")
QUIET = LAYOUT | CAST
_NEAR = 7


@dataclass(frozen=True, kw_only=True)
class Decay:
    """−exp(rate) · softplus(x + dt_bias); `x` is where the projected channels are first computed with."""

    x: fx.Node
    rate: WeightRef
    dt_bias: WeightRef | None
    limits: tuple[float, float] | None = None


def is_softplus(node: fx.Node, graph: CapturedGraph) -> bool:
    """log(1 + exp(x)), as one operation, or spelled out with x itself where it is large."""
    if node.target in SOFTPLUS:
        return argument(node, 1, "beta", 1) == 1
    if node.target not in WHERE or len(node.args) != 3:
        return False
    _, x, small = node.args
    if not isinstance(x, fx.Node) or not isinstance(small, fx.Node) or small.target not in LOG:
        return False
    values = torch.tensor([-40.0, -3.0, 0.0, 2.0, 19.0, 45.0])
    dims = shape(x) or ()
    if len(dims) < 1 or not graph.is_open(x):
        return False
    sample = values[torch.arange(torch.Size(dims).numel()) % len(values)].view(dims)
    try:
        value = graph.run(node, {x: sample})
    except (NoValue, ValueError):
        return False
    return torch.allclose(value, torch.nn.functional.softplus(sample), rtol=1e-5, atol=1e-6)


def read_decay(node: fx.Node, graph: CapturedGraph) -> Decay:
    """The decay around the softplus at `node`. Raises `Stop`."""
    given = node.args[1 if node.target in WHERE else 0]
    assert isinstance(given, fx.Node)
    x, bias = graph.peel(given, QUIET)[-1], None
    x = x if x.target in ADD else graph.peel(given, CAST)[-1]
    if x.target in ADD and len(graph.open_inputs(x)) == 1 and len(x.all_input_nodes) == 2:
        closed = next(n for n in x.all_input_nodes if not graph.is_open(n))
        bias = _vector(closed, graph)
        if bias is None:
            raise Stop("decay", "the bias in the softplus is computed", x)
        x = graph.open_inputs(x)[0]
    factor, limits = _rate(node, graph)
    origins = weights_behind(factor, graph)
    if len(origins) != 1 or not _is_negative_exp(factor, origins[0], graph):
        raise Stop("decay", "the rate of the decay is not −exp of one stored vector", factor)
    return Decay(x=x, rate=WeightRef(name=graph.weights[origins[0].name]), dt_bias=bias, limits=limits)


def _vector(node: fx.Node, graph: CapturedGraph) -> WeightRef | None:
    """A stored parameter, whole and in order."""
    origins = weights_behind(node, graph)
    spread = read_spread(node, graph)
    if spread is None or len(origins) != 1 or spread.offset:
        return None
    wanted = torch.arange(spread.entries.numel())
    return WeightRef(name=spread.names[0]) if torch.equal(spread.entries.flatten(), wanted) else None


def _rate(node: fx.Node, graph: CapturedGraph) -> tuple[fx.Node, tuple[float, float] | None]:
    """The closed factor, made of a parameter, that the softplus is multiplied with; what holds the softplus between."""
    stack, seen, limits = [node], set(), None
    while stack:
        walk = stack.pop()
        for user in readers(walk):
            if user in seen:
                continue
            seen.add(user)
            closed = [n for n in user.all_input_nodes if not graph.is_open(n)]
            if user.target in MUL and len(closed) == 1 and weights_behind(closed[0], graph):
                return closed[0], limits
            if user.target in CLAMP:
                limits = _limits(user, limits, graph)
                stack.append(user)
            elif user.target in QUIET:
                stack.append(user)
    raise Stop("decay", "no stored rate is multiplied with the softplus", node)


def _limits(node: fx.Node, before: tuple[float, float] | None, graph: CapturedGraph) -> tuple[float, float] | None:
    """The limits of a clamp on what is positive, None when there are none that matter."""
    given = [0.0, math.inf]
    for place, name in ((0, "min"), (1, "max")):
        value = argument(node, place + 1, name) if node.target in _ops("clamp") else node.args[1]
        if value is None or (node.target not in _ops("clamp") and f"clamp_{name}" not in str(node.target)):
            continue
        constant = graph.constant(value)
        if constant is None or before is not None:
            raise Stop("decay", "the step is limited by what is no constant, or twice", node)
        given[place] = constant
    return None if given[0] <= 0 and given[1] == math.inf else (given[0], given[1])


def _is_negative_exp(factor: fx.Node, origin: fx.Node, graph: CapturedGraph) -> bool:
    dims = shape(origin) or ()
    sample = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    try:
        value = graph.run(factor, {origin: sample})
    except (NoValue, ValueError):
        return False
    return value.numel() == sample.numel() and torch.allclose(value.flatten(), -sample.exp().flatten(), rtol=1e-5)


def fixed_rates(owner: str, heads: int, graph: CapturedGraph) -> list[WeightRef]:
    """Stored tensors of the module that hold one positive number a head: what the rates of a fixed decay may be."""
    found = []
    for placeholder, name in graph.weights.items():
        value = graph.values[placeholder]
        stored = (
            name.startswith(f"{owner}.") and isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)
        )
        if stored and value.numel() == heads and value.is_floating_point():
            found.append(WeightRef(name=name))
    return found


def scale_and_unit(leaf: fx.Node, width: int, mixer: str, graph: CapturedGraph) -> list[tuple[float, bool]]:
    """The factor on q and whether q has unit length, read off what follows q at `leaf`; more than one where unclear."""
    if mixer == "mamba2":
        return [(1.0, False)]
    unit, factors = False, []
    for node in _elementwise_after(leaf, graph):
        unit = unit or (node.target in ROOT and (shape(node) or (0,))[-1] == 1)
        factor = split_factor(node, graph)
        if factor is not None:
            factors.append(factor[0])
    scales = list(dict.fromkeys(factors)) or [1.0, width**-0.5]
    return [(scale, unit) for scale in scales]


def _elementwise_after(node: fx.Node, graph: CapturedGraph) -> Iterator[fx.Node]:
    """What is computed from `node` in a few steps, up to a product of matrices."""
    reached, seen = [node], {node}
    for _ in range(_NEAR):
        following = [u for n in reached for u in readers(n) if u not in seen and u.target not in PRODUCT]
        following = [u for u in dict.fromkeys(following) if u.target in QUIET or len(graph.open_inputs(u)) <= 2]
        yield from following
        seen.update(following)
        reached = following


@dataclass(frozen=True, kw_only=True)
class After:
    """Norm over `norm_width` channels and gate (an activation node), the gate before the norm if `gate_first`."""

    norm: Norm | None = None
    norm_width: int | None = None
    gate: fx.Node | None = None
    gate_first: bool = False


def after_heads(output: Linear, openers: set[fx.Node], width: int, graph: CapturedGraph) -> After:
    """What stands before the output projection, walked backwards. Raises `Stop`."""
    walk = graph.peel(output.x, QUIET)[-1]
    norm = _norm(walk, width, graph)
    gate_first = norm is not None
    if norm is not None:
        walk = graph.peel(norm[2], QUIET)[-1]
    gate = None
    if walk.target in MUL and len(graph.open_inputs(walk)) == 2:
        sides = {n: graph.peel(n, QUIET)[-1] for n in graph.open_inputs(walk)}
        opened = [n for n, peeled in sides.items() if peeled in openers]
        if len(opened) == 1:
            gate = sides[opened[0]]
            other = next(peeled for n, peeled in sides.items() if n is not opened[0])
            norm, gate_first = (norm, True) if norm is not None else (_norm(other, width, graph), False)
    if gate is None:
        gate_first = False
    if norm is None:
        return After(gate=gate, gate_first=gate_first)
    return After(norm=norm[0], norm_width=norm[1], gate=gate, gate_first=gate_first)


def _norm(node: fx.Node, width: int, graph: CapturedGraph) -> tuple[Norm, int, fx.Node] | None:
    """The norm that ends at `node`, the channels that it acts on, and what it acts on."""
    found, weight = QKNorm().match(node, graph), None
    if not isinstance(found, Found) or "norm" not in found.facts:
        split = [n for n in node.all_input_nodes if not graph.is_open(n) and weights_behind(n, graph)]
        if node.target not in MUL or len(split) != 1 or len(graph.open_inputs(node)) != 1:
            return None
        weight = read_spread(split[0], graph)
        found = QKNorm().match(graph.peel(graph.open_inputs(node)[0], QUIET)[-1], graph)
        if weight is None or not isinstance(found, Found) or "norm" not in found.facts:
            return None
    facts = found.facts["norm"]
    if set(found.facts) != {"norm"} or facts.kind not in ("rms", "layer"):
        raise Stop("norm", f"a {facts.kind} norm with a factor on the heads' outputs", node)
    weight = facts.weight if weight is None else weight
    if facts.size > width or width % facts.size:
        raise Stop("norm", f"a norm over {facts.size} of {width} channels", node)
    norm = Norm(
        kind=facts.kind,
        eps=facts.eps,
        weight=_ref(weight, node),
        bias=_ref(facts.bias, node),
        offset=0.0 if weight is None else weight.offset,
    )
    return norm, facts.size, facts.x


def _ref(spread: Spread | None, node: fx.Node) -> WeightRef | None:
    if spread is None:
        return None
    try:
        return spread.ref(spread.entries.flatten())
    except WeightsRefused as refused:
        raise Stop("norm", f"{op_name(node)}: {refused}", node) from refused
