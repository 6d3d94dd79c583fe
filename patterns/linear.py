"""Layers that are linear already: a recurrence between projections, told by what stands around it.

The torch code of a linear recurrence is a loop over chunks with other nodes at every length, so nothing between the
heads and their outputs is matched. What a layer of this kind shows in its graph:

1. a module with projections of one tensor, the last map of which is what it returns, and no softmax;
2. it mixes tokens: a depthwise causal convolution, a running sum, or a product that counts pairs of tokens;
3. each projected channel has a first use, and that says what it is for: softplus (of it and a vector): the decay;
   sigmoid of one channel a head: the write strength; an activation of as many channels as the output projection reads,
   multiplied with what enters that: the gate; all others, behind the convolution or an activation of them all, are q, k
   and v, and the shape in which they are first computed with says how they fall into heads;
4. a norm before the output projection, before or behind the gate; a vector exponentiated and multiplied with the
   softplus: the rate; one more vector with a number for each head: the skip;
5. every parameter that the module reads has one of these places, or it is refused.

What the graph leaves open (which of two equal halves is q, a constant factor) gives several candidates. A candidate is
only that: our mixer is built from it, and must compute what the module computes (`fla_swap.linear_proof`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fla_swap.patterns.adapters import match_linear
from fla_swap.patterns.base import Found
from fla_swap.patterns.channels import (
    QUIET,
    Moved,
    ShortConvolution,
    Source,
    padding_factors,
    projection_of,
    read_convolution,
    whole,
)
from fla_swap.patterns.graph import CapturedGraph, _ops, op_name, shape
from fla_swap.patterns.heads import HeadsRefused, group
from fla_swap.patterns.linear_gates import (
    After,
    Decay,
    after_heads,
    fixed_rates,
    is_softplus,
    read_decay,
    scale_and_unit,
)
from fla_swap.patterns.linear_site import SILU, Layer, site_of
from fla_swap.patterns.output import inside_of, readers
from fla_swap.patterns.parts import Stop
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.reach import CONVOLUTION
from fla_swap.patterns.scores import split_factor
from fla_swap.types import AttentionSite, Recurrence, WeightRef

SIGMOID = _ops("sigmoid")
ACTIVATIONS = {op: "silu" for op in SILU}
OPENERS = {**{op: "silu" for op in SILU}, **{op: "sigmoid" for op in SIGMOID}}
RULES = {
    "gated_deltanet": "gated delta rule",
    "kda": "gated delta rule, a decay for each channel",
    "mamba2": "state space, a decay for each head",
    "lightning": "fixed decay",
}


def read_linear(owner: str, layer: int, graph: CapturedGraph) -> list[AttentionSite]:
    """The candidates for what the module `owner` computes, the likeliest first. Raises `Stop`."""
    found = _projections(owner, graph)
    width = found.output.inputs
    decay = _decay(found)
    gates = _openers(found, width)
    after = after_heads(found.output, {node for node, _ in gates}, width, graph)
    taken = [] if decay is None else [decay.x]
    if after.gate is not None:
        taken.append(next(x for node, x in gates if node is after.gate))
    convolutions, streams = _streams(found, taken, after.gate, width)
    v, others = _values(streams, width, found)
    heads = len(v)
    beta, limit = _beta(found, heads, convolutions)
    mixer = _mixer(decay, beta, heads, others[0].shape[-1], found)
    return _candidates(found, layer, mixer, decay, (beta, limit), after, gates, convolutions, (v, *others))


def _projections(owner: str, graph: CapturedGraph) -> Layer:
    """The module's projections: of its input, of those (low rank), and the one that it returns."""
    members = [n for n in inside_of(owner, graph) if graph.is_open(n)]
    same = padding_factors(members, graph)
    linears = [r.facts["projection"] for n in members if isinstance(r := match_linear(n, graph), Found)]
    linears = [a for a in linears if not any(a.out is not b.out and a.out in b.nodes for b in linears)]
    if len(linears) < 2:
        raise Stop("projection", "fewer than two projections", members[-1])
    output, rest, inside = linears[-1], linears[:-1], set(members)
    _check_leaving(output, set(inside_of(owner, graph)), graph)
    entry: fx.Node | None = None
    sources: list[Source] = []
    known: dict[fx.Node, Tensor] = {}
    total = sum(linear.outputs for linear in rest)
    tokens = graph.token_numbers()
    for linear in rest:
        start = _walk_back(linear.x, inside, same, graph)
        first = sum(s.linear.outputs for s in sources)
        down = next((s.linear for s in sources if s.linear.out is start), None)
        if down is None and start in inside:
            raise Stop("projection", f"a projection of what {op_name(start)} gives", linear.out)
        if down is None and entry not in (None, start):
            raise Stop("projection", "its projections read different tensors", linear.out)
        entry = start if down is None else entry
        sources.append(Source(linear=linear, first=first, down=down))
        dims = shape(linear.out) or ()
        if len(dims) != 3 or dims[:2] != tokens.shape[:2]:
            raise Stop("projection", f"a projection of shape {list(dims)}, expected [batch, time, width]", linear.out)
        known[linear.out] = tokens * total + first + torch.arange(linear.outputs)
    if entry is None or len(shape(entry) or ()) != 3:
        raise Stop("owner", "no hidden states come in, [batch, time, width]", output.out)
    for node in members:
        for value in graph.open_inputs(node):
            if value not in inside and value is not entry:
                raise Stop("owner", f"it also reads {value.name}", node)
    moved = Moved(known=known, total=total, same=same, graph=graph)
    found = Layer(owner=owner, graph=graph, members=members, output=output, hidden=entry, sources=sources, moved=moved)
    for linear in (*rest, output):
        stored = [linear.weight, linear.bias, *(s for a in linear.adapters for s in (a.down, a.up))]
        found.used |= {s.name for s in stored if s is not None}
    return found


def _walk_back(node: fx.Node, inside: set[fx.Node], same: dict[fx.Node, fx.Node], graph: CapturedGraph) -> fx.Node:
    while node in inside and (node in same or (node.target in QUIET and len(graph.open_inputs(node)) == 1)):
        node = same[node] if node in same else graph.open_inputs(node)[0]
    return node


def _check_leaving(output: Linear, inside: set[fx.Node], graph: CapturedGraph) -> None:
    """Only the output projection is read outside, as it is."""
    walk = output.out
    while users := [u for u in readers(walk) if u in inside]:
        if len(users) > 1 or users[0].target not in QUIET:
            raise Stop("output", f"{op_name(users[0])} after the last projection", users[0])
        walk = users[0]
    for node in inside:
        if (
            node is not walk
            and graph.is_open(node)
            and any(u not in inside and u.op == "call_function" for u in readers(node))
        ):
            raise Stop("owner", f"it also returns {op_name(node)}, which is read", node)


def _decay(found: Layer) -> Decay | None:
    nodes = [n for n in found.members if is_softplus(n, found.graph)]
    if not nodes:
        return None
    if len(nodes) > 1:
        raise Stop("decay", f"{len(nodes)} softplus in one layer", nodes[1])
    decay = read_decay(nodes[0], found.graph)
    found.used |= {ref.name for ref in (decay.rate, decay.dt_bias) if ref is not None}
    return decay


def _openers(found: Layer, width: int) -> list[tuple[fx.Node, fx.Node]]:
    """(activation, its input) of as many projected channels as the output projection reads."""
    reads = found.moved.readers(found.members)
    return [(n, x) for n, x in reads if n.target in OPENERS and len(found.moved.row(x)) == width]


def _beta(found: Layer, heads: int, convolutions: Sequence[ShortConvolution]) -> tuple[fx.Node | None, float]:
    """The input of the write strength, one channel a head, and the strength's limit."""
    reads = found.moved.readers(found.members)
    nodes = [(n, x) for n, x in reads if n.target in SIGMOID and len(found.moved.row(x)) == heads]
    if not nodes:
        return None, 1.0
    if len(nodes) > 1:
        raise Stop("beta", f"{len(nodes)} sigmoids of one channel a head", nodes[1][0])
    node, x = nodes[0]
    users = readers(node)
    factor = split_factor(users[0], found.graph) if len(users) == 1 else None
    return x, 1.0 if factor is None else factor[0]


def _streams(
    found: Layer, taken: Sequence[fx.Node], gate: fx.Node | None, width: int
) -> tuple[list[ShortConvolution], list[tuple[Tensor, fx.Node]]]:
    """The convolutions, or activations of all channels, and what is first computed with: channels [heads, width] of
    those that come out of them, and where."""
    reads = found.moved.readers(found.members)
    convolutions = [read_convolution(n, found.moved, ACTIVATIONS) for n, _ in reads if n.target in CONVOLUTION]
    known: dict[fx.Node, Tensor] = {}
    tokens = found.graph.token_numbers()
    total = found.moved.total
    for conv in convolutions:
        numbers = tokens * total + conv.inputs
        lies = (shape(conv.out) or (0,))[-1] == len(conv.inputs)
        known[conv.out] = numbers if lies else numbers.transpose(1, 2)
        found.used |= {conv.weight.name, *([conv.bias.name] if conv.bias else [])}
    if not convolutions:
        for node, x in reads:
            if node.target in SILU and node is not gate:
                at, channels = found.moved.at(x)
                known[node] = at * total + channels
    moved = Moved(known=known or found.moved.known, total=total, same=found.moved.same, graph=found.graph)
    tables: dict[frozenset[int], tuple[Tensor, fx.Node]] = {}
    for _, x in moved.readers(found.members):
        if x in taken:
            continue
        table = moved.heads(x)
        key = frozenset(table.flatten().tolist())
        if key not in tables or table.shape[-1] < tables[key][0].shape[-1]:
            tables[key] = (table, x)
    if not known:  # neither a convolution nor an activation: leave out what is read for gates
        rows = [frozenset(found.moved.row(x).tolist()) for n, x in reads if n.target in OPENERS]
        rows += [frozenset(found.moved.row(x).tolist()) for x in taken]
        tables = {key: value for key, value in tables.items() if key not in rows}
    return convolutions, list(tables.values())


def _values(streams: Sequence[tuple[Tensor, fx.Node]], width: int, found: Layer) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The heads of v (or of what may be v) and of the other two, as the shapes tell; all of heads' own channels."""
    if len(streams) != 3:
        raise Stop("recurrence", f"{len(streams)} groups of channels go into it, expected q, k and v", found.output.out)
    distinct = []
    for table, node in streams:
        try:
            distinct.append(group(table, len(table))[0])
        except HeadsRefused as refused:
            raise Stop("recurrence", str(refused), node) from refused
    fits = [i for i, t in enumerate(distinct) if t.numel() == width]
    if not fits:
        raise Stop("recurrence", f"no {width} channels of values for the output projection", found.output.out)
    found.graph.known["linear leaves", found.owner] = {
        tuple(t.flatten().tolist()): node for t, (_, node) in zip(distinct, streams, strict=True)
    }
    for i in reversed(fits):  # the last, where several fit
        others = [t for j, t in enumerate(distinct) if j != i]
        if others[0].shape == others[1].shape and len(distinct[i]) % len(others[0]) == 0:
            return distinct[i], tuple(others)
    raise Stop("recurrence", f"q and k of shapes {[tuple(t.shape) for t in distinct]}", found.output.out)


def _mixer(decay: Decay | None, beta: fx.Node | None, heads: int, key_width: int, found: Layer) -> str:
    if decay is None:
        if beta is not None:
            raise Stop("decay", "a write strength without a decay", beta)
        return "lightning"
    count = len(found.moved.row(decay.x))
    if count == heads:
        return "mamba2" if beta is None else "gated_deltanet"
    if count == heads * key_width and beta is not None:
        return "kda"
    raise Stop("decay", f"{count} decays for {heads} heads of {key_width} key channels", decay.x)


def _candidates(
    found: Layer,
    layer: int,
    mixer: str,
    decay: Decay | None,
    strength: tuple[fx.Node | None, float],
    after: After,
    gates: Sequence[tuple[fx.Node, fx.Node]],
    convolutions: Sequence[ShortConvolution],
    tables: tuple[Tensor, ...],
) -> list[AttentionSite]:
    """Sites for every way to read what the graph leaves open."""
    graph, end = found.graph, found.output.out
    own: dict[str, object] = {}
    gate = None
    if after.gate is not None:
        x = next(x for node, x in gates if node is after.gate)
        gate, down = projection_of(found.sources, found.moved.row(x), x)
        own |= dict(zip(("gate_down", "gate_rank"), whole(down), strict=True))
    if decay is not None:
        made, down = projection_of(found.sources, found.moved.row(decay.x), decay.x)
        own |= {"decay": made, "rate": decay.rate, "dt_bias": decay.dt_bias, "step_limits": decay.limits}
        own |= dict(zip(("decay_down", "decay_rank"), whole(down), strict=True))
    if strength[0] is not None:
        beta, down = projection_of(found.sources, found.moved.row(strength[0]), strength[0])
        if down is not None:
            raise Stop("beta", "a write strength of low rank", strength[0])
        own |= {"beta": beta, "beta_limit": strength[1]}
    if after.norm is not None and after.norm.weight is not None:
        found.used |= set(after.norm.weight.names)
    own |= {"skip": _skip(found, mixer, len(tables[0]))}
    recurrence = Recurrence(
        mixer=mixer,
        rule=RULES[mixer],
        qk_heads=1,
        norm=after.norm,
        norm_width=after.norm_width,
        gate=gate,
        gate_activation=None if after.gate is None else OPENERS[after.gate.target],
        gate_first=after.gate_first,
        **own,  # type: ignore[arg-type]
    )
    rates = fixed_rates(found.owner, len(tables[0]), graph) if decay is None else [recurrence.rate]
    if not rates:
        raise Stop("decay", "no stored rate for each head", end)
    sites = []
    for v, q, k in _orders(tables, mixer):
        leaves = graph.known["linear leaves", found.owner]
        for scale, unit in scale_and_unit(leaves[tuple(q.flatten().tolist())], q.shape[-1], mixer, graph):
            for rate in rates:
                facts = {"scale": scale, "unit": unit, "rate": rate, "qk_heads": len(q)}
                read = dataclasses.replace(recurrence, **facts)
                sites.append(site_of(found, layer, read, (q, k, v), convolutions))
    return sites


def _orders(tables: tuple[Tensor, ...], mixer: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(v, q, k): the projection's order says more often than not which is which; state spaces have keys first."""
    v, a, b = tables
    orders = [(v, b, a), (v, a, b)] if mixer == "mamba2" else [(v, a, b), (v, b, a)]
    if v.shape == a.shape == b.shape:
        orders += [(a, v, b), (a, b, v), (b, v, a), (b, a, v)]
    return orders


def _skip(found: Layer, mixer: str, heads: int) -> WeightRef | None:
    """The one parameter without a place, if it is a vector with a number for each head. Raises `Stop` for others."""
    graph = found.graph
    inner = [n for m in inside_of(found.owner, graph) for n in m.all_input_nodes if n.op == "placeholder"]
    read = {graph.weights[n.name]: n for n in inner if n.name in graph.weights}
    left = {
        name: node
        for name, node in read.items()
        if name not in found.used and isinstance(graph.values[node.name], torch.nn.Parameter)
    }
    if not left:
        return None
    name, node = next(iter(left.items()))
    if mixer == "mamba2" and len(left) == 1 and torch.Size(shape(node) or ()).numel() == heads:
        return WeightRef(name=name)
    raise Stop("recurrence", f"it reads the parameters {sorted(left)}, whose part in it is not known", found.output.out)
