"""From what was read of a linear layer to the site that states it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fla_swap.patterns.channels import Moved, ShortConvolution, Source, joined, projection_of
from fla_swap.patterns.graph import CAST, CapturedGraph, _ops, shape, source_of
from fla_swap.patterns.parts import Stop
from fla_swap.patterns.projection import Linear
from fla_swap.types import ArgPath, AttentionSite, CallContract, Mask, Recurrence

SILU = _ops("silu", "silu_")


@dataclass(kw_only=True)
class Layer:
    """What was read of one module."""

    owner: str
    graph: CapturedGraph
    members: list[fx.Node]
    output: Linear
    hidden: fx.Node
    sources: list[Source]
    moved: Moved
    used: set[str] = field(default_factory=set)


def site_of(
    found: Layer,
    layer: int,
    recurrence: Recurrence,
    tables: tuple[Tensor, Tensor, Tensor],
    convolutions: Sequence[ShortConvolution],
) -> AttentionSite:
    end = found.output.out
    q, _, v = tables
    sides = [projection_of(found.sources, t.flatten(), end) for t in tables]
    if any(down is not None for _, down in sides):
        raise Stop("projection", "q, k or v of low rank", end)
    if convolutions:
        recurrence = _with_convolution(recurrence, torch.cat([t.flatten() for t in tables]), convolutions, end)
    elif any(n.target in SILU for n, _ in found.moved.readers(found.members) if n is not None):
        recurrence = dataclasses.replace(recurrence, activation=_activation(found, tables))
    dims = shape(found.hidden) or (0,)
    output = found.output
    return AttentionSite(
        fqn=found.owner,
        layer=layer,
        q=sides[0][0],
        k=sides[1][0],
        v=sides[2][0],
        o=output.projection(torch.arange(output.outputs)),
        hidden_size=dims[-1],
        heads=len(v),
        kv_heads=len(v),
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        scale=recurrence.scale,
        mask=Mask(kind="causal"),
        call=CallContract(hidden=ArgPath(position=0)),
        output_size=None if output.outputs == dims[-1] else output.outputs,
        kind=f"linear ({recurrence.rule})",
        anchor=end.name,
        recurrence=recurrence,
        source=source_of(found.graph.peel(output.x, CAST)[-1]),
    )


def _activation(found: Layer, tables: Sequence[Tensor]) -> str | None:
    """What acts on q, k and v alike before they fall into heads."""
    channels = {c for t in tables for c in t.flatten().tolist()}
    for node, x in found.moved.readers(found.members):
        if node.target in SILU and channels & set(found.moved.row(x).tolist()):
            return "silu"
    return None


def _with_convolution(
    recurrence: Recurrence, channels: Tensor, convolutions: Sequence[ShortConvolution], end: fx.Node
) -> Recurrence:
    """The convolutions' rows in the order of `channels` [n]."""
    if len({(c.taps, c.activation, c.bias is None) for c in convolutions}) != 1:
        raise Stop("conv", "convolutions of different kinds", convolutions[1].node)
    place = {int(c): (conv, row) for conv in convolutions for row, c in enumerate(conv.inputs)}
    if any(int(c) not in place for c in channels):
        raise Stop("conv", "some of q, k and v go through a convolution, others do not", end)
    pieces: list[tuple[ShortConvolution, list[int]]] = []
    for c in channels.tolist():
        conv, row = place[c]
        if not pieces or pieces[-1][0] is not conv:
            pieces.append((conv, []))
        pieces[-1][1].append(row)
    rows = [(conv, torch.tensor(numbers)) for conv, numbers in pieces]
    first = convolutions[0]
    return dataclasses.replace(
        recurrence,
        conv=joined([(conv.weight, numbers) for conv, numbers in rows]),
        conv_bias=None if first.bias is None else joined([(c.bias, n) for c, n in rows if c.bias is not None]),
        taps=first.taps,
        activation=first.activation,
    )
