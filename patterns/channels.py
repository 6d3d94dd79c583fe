"""Projected channels sent through movement of data, in a layer whose heads no softmax tells: which channel of which
projection stands where, and which operation is the first that computes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.graph import (
    CAST,
    DROPOUT,
    LAYOUT,
    CapturedGraph,
    NotLayout,
    argument,
    op_name,
    read_inputs,
    shape,
)
from fla_swap.patterns.parts import Stop
from fla_swap.patterns.projection import Linear, Stored, stored_vector
from fla_swap.patterns.reach import CONVOLUTION
from fla_swap.patterns.steps import MUL
from fla_swap.patterns.weights import weights_behind
from fla_swap.types import Projection, WeightRef

QUIET = LAYOUT | CAST | DROPOUT


@dataclass(frozen=True, kw_only=True)
class Source:
    """A projection of the hidden states, its outputs numbered from `first`; `down` makes its input if it has rank."""

    linear: Linear
    first: int
    down: Linear | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Channels that stand at `known` nodes as token · total + channel; `same` maps steps that change no value."""

    known: Mapping[fx.Node, Tensor]
    total: int
    same: Mapping[fx.Node, fx.Node]
    graph: CapturedGraph

    def at(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        """(tokens, channels) at `node`. Raises `Stop` when they are not just moved there."""
        try:
            numbers = self.graph.trace_from(self.known, node, self.same)
        except NotLayout as stop:
            raise Stop("recurrence", f"{op_name(stop.node)} between a projection and its use", stop.node) from stop
        return numbers // self.total, numbers % self.total

    def row(self, node: fx.Node) -> Tensor:
        """The channels [n] that stand at every token of `node`, in order. Raises `Stop`."""
        tokens, channels = (x.flatten() for x in self.at(node))
        order = torch.argsort(tokens, stable=True)
        count = len(tokens.unique())
        if len(order) % count or not torch.equal(tokens[order], tokens.unique().repeat_interleave(len(order) // count)):
            raise Stop("recurrence", "tokens do not all have the same channels", node)
        table = channels[order].view(count, -1)
        if not bool((table == table[:1]).all()):
            raise Stop("recurrence", "tokens do not all have the same channels", node)
        return table[0]

    def heads(self, node: fx.Node) -> Tensor:
        """The channels [heads, width] at every token of `node`, which holds heads in its last two or three dimensions.

        Raises `Stop`.
        """
        tokens, _ = self.at(node)
        flat = tokens.dim() > 0 and bool((tokens == tokens[..., :1]).all())
        width = tokens.shape[-1] if flat or tokens.dim() < 2 else tokens.shape[-2]
        row = self.row(node)
        if len(row) % width:
            raise Stop("recurrence", "channels of several tokens in one head", node)
        return row.view(-1, width)

    def readers(self, members: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """(operation, what it reads) wherever one of `members`, in order, computes with what was moved."""
        there, found = set(self.known), []
        for node in members:
            inputs = [n for n in read_inputs(node) if self.graph.is_open(n)]
            read = [n for n in dict.fromkeys(inputs) if n in there]
            if not read or node in there:
                continue
            if node in self.same or (node.target in QUIET and len(read) == len(set(inputs))):
                there.add(node)
            else:
                found += [(node, n) for n in read]
        return found


def padding_factors(members: Iterable[fx.Node], graph: CapturedGraph) -> dict[fx.Node, fx.Node]:
    """Products with a mask of the tokens, [..., 1] of zeros and ones: product → what is multiplied."""
    found = {}
    for node in members:
        if node.target not in MUL or len(node.all_input_nodes) != 2:
            continue
        for closed, opened in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if graph.is_open(closed) or not graph.is_open(opened) or (shape(closed) or (0,))[-1] != 1:
                continue
            if shape(node) != shape(opened) or weights_behind(closed, graph):
                continue
            value = graph.evaluate(closed)
            if bool(((value == 0) | (value == 1)).all()):
                found[node] = opened
    return found


def projection_of(sources: Sequence[Source], channels: Tensor, node: fx.Node) -> tuple[Projection, Linear | None]:
    """The rows of a projection that make `channels` [n], and the first half of a low-rank one. Raises `Stop`."""
    ends = [(s, s.first + s.linear.outputs) for s in sources]
    pieces = [s for s, end in ends if bool(((channels >= s.first) & (channels < end)).any())]
    if len(pieces) != 1:
        raise Stop("recurrence", f"one input is made by {len(pieces)} projections", node)
    source = pieces[0]
    return source.linear.projection(channels - source.first), source.down


def whole(linear: Linear | None) -> tuple[Projection | None, int | None]:
    """A map with all its outputs, and how many they are."""
    return (None, None) if linear is None else (linear.projection(torch.arange(linear.outputs)), linear.outputs)


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """A causal convolution of every channel: `inputs` [C] is the channel that each of its rows reads; `out` what it
    gives, [B, C, T] or [B, T, C], `activation` behind it included."""

    node: fx.Node
    out: fx.Node
    inputs: Tensor
    weight: Stored
    bias: Stored | None
    taps: int
    activation: str | None


def read_convolution(node: fx.Node, moved: Moved, activations: Mapping[object, str]) -> ShortConvolution:
    """The depthwise causal convolution at `node`. Raises `Stop`."""
    graph, dims = moved.graph, shape(node.args[1])
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if dims is None or len(dims) != 3 or dims[1] != 1 or node.target not in CONVOLUTION:
        raise Stop("conv", "a convolution that is not one of every channel on its own", node)
    origin = _origin(node.args[1])
    weight = None if origin is None else graph.weights.get(origin.name)
    if weight is None or (shape(origin) or (0,))[0] != dims[0]:
        raise Stop("conv", "the convolution's weight is computed", node)
    given = argument(node, 2, "bias")
    bias = None if given is None else stored_vector(given, graph)
    if given is not None and bias is None:
        raise Stop("conv", "the convolution's bias is computed", node)
    tokens, channels = moved.at(x)
    inputs = channels[:1, :, :1]
    length, batch = graph.length, graph.batch
    wanted = torch.arange(batch * length).view(batch, 1, length)
    if tokens.shape[-1] != length or not bool((tokens == wanted).all()) or not bool((channels == inputs).all()):
        raise Stop("conv", "the convolution does not run over the tokens in order", node)
    out, activation = _activated(node, graph, activations)
    rows = torch.arange(dims[0])
    stored = Stored(name=weight, rows=rows, whole=dims[0], dims=((0,), (1, 2)))
    return ShortConvolution(
        node=node,
        out=out,
        inputs=inputs.flatten(),
        weight=stored,
        bias=bias,
        taps=dims[2],
        activation=activation,
    )


def _origin(node: object) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _activated(node: fx.Node, graph: CapturedGraph, activations: Mapping[object, str]) -> tuple[fx.Node, str | None]:
    """The activation behind a convolution, or the convolution cut to the tokens."""
    walk = node
    while True:
        users = list(walk.users)
        if len(users) == 1 and users[0].target in activations:
            return users[0], activations[users[0].target]
        if len(users) != 1 or users[0].target not in QUIET or (shape(users[0]) or (0, 0)).count(graph.length) != 1:
            return walk, None
        walk = users[0]


def joined(parts: Sequence[tuple[Stored, Tensor]]) -> WeightRef:
    """Rows of several parameters as one reference: (parameter, rows [n]) in order."""
    refs = [stored.ref(rows) for stored, rows in parts]
    first, rest = refs[0], tuple(refs[1:])
    return WeightRef(name=first.name, rows=first.rows, dims=first.dims, transposed=first.transposed, more=rest)
