"""Which row of a projection feeds which channel of which head: numbered entries are sent through the data movement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fla_swap.patterns.graph import CapturedGraph, NotLayout, op_name, shape
from fla_swap.patterns.projection import Linear


class HeadsRefused(Exception):
    """The movement between a projection and the core is not a split into heads."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """`rows` [H, K]: the projection's output that stands at (head, channel) of the core's operand.

    `batch_of` [L]: the batch row of each leading index of that operand, flattened. `rows_at`: the output that stands
    at each entry of a node on the way, where one was asked for.
    """

    rows: Tensor
    batch_of: Tensor
    rows_at: Tensor | None = None


def hidden_numbers(linear: Linear, hidden: fx.Node, graph: CapturedGraph) -> Tensor:
    """int [..., outputs]: token · outputs + output, for each entry of the projection's output."""
    dims = shape(hidden)
    tokens = graph.token_numbers()
    if dims is None or len(dims) != 3 or dims[:2] != tokens.shape[:2]:
        raise HeadsRefused(f"the projection's input has shape {dims}, expected [batch, time, hidden]")
    tokens = tokens.expand(dims)
    try:
        moved = graph.trace(hidden, tokens, linear.x, {})
    except NotLayout as stop:
        raise HeadsRefused(f"{op_name(stop.node)} between the input and the projection") from stop
    if not bool((moved == moved[..., :1]).all()):
        raise HeadsRefused("the projection's input mixes tokens")
    return moved[..., :1] * linear.outputs + torch.arange(linear.outputs)


def trace_heads(
    linear: Linear,
    hidden: fx.Node,
    target: fx.Node,
    same: Mapping[fx.Node, fx.Node],
    graph: CapturedGraph,
    *,
    transposed: bool = False,
    also: fx.Node | None = None,
) -> Heads:
    """The rows behind `target` [..., T, K] (or [..., K, T] when `transposed`), and behind `also` on the way to it.

    Raises `HeadsRefused`.
    """
    start = hidden_numbers(linear, hidden, graph)
    try:
        numbers = graph.trace(linear.out, start, target, same)
        rows_at = None if also is None else graph.trace(linear.out, start, also, same) % linear.outputs
    except NotLayout as stop:
        raise HeadsRefused(f"{op_name(stop.node)} between the projection and the core") from stop
    if transposed:
        numbers = numbers.transpose(-1, -2)
    batch_of = numbers.reshape(-1, *numbers.shape[-2:])[:, 0, 0] // linear.outputs // graph.length
    return Heads(rows=rows_of(numbers, linear.outputs, graph), batch_of=batch_of, rows_at=rows_at)


def rows_of(numbers: Tensor, outputs: int, graph: CapturedGraph) -> Tensor:
    """[H, K] from entries [..., T, K]; checked: tokens in their places, the same rows for all tokens and batch rows."""
    flat = numbers.reshape(-1, *numbers.shape[-2:])
    token, row = flat // outputs, flat % outputs
    batch, time = token // graph.length, token % graph.length
    if flat.shape[1] != graph.length or not bool((time == torch.arange(graph.length)[:, None]).all()):
        raise HeadsRefused("the core does not see the tokens in order, one each")
    if not bool((batch == batch[:, :1, :1]).all()):
        raise HeadsRefused("a head mixes rows of the batch")
    if not bool((row == row[:, :1]).all()):
        raise HeadsRefused("a head reads other channels at other tokens")
    per_batch = [row[batch[:, 0, 0] == b, 0] for b in range(graph.batch)]
    if any(p.shape != per_batch[0].shape or not torch.equal(p, per_batch[0]) for p in per_batch):
        raise HeadsRefused("the rows of the batch have different heads")
    return per_batch[0]


def group(rows: Tensor, heads: int) -> tuple[Tensor, int]:
    """(rows of the distinct key/value heads, how often each is used), for `rows` already repeated to `heads`.

    Raises `HeadsRefused` unless query head h uses key/value head h // repeats.
    """
    if len(rows) != heads:
        if not len(rows) or heads % len(rows):
            raise HeadsRefused(f"{heads} query heads and {len(rows)} key/value heads")
        rows = rows.repeat_interleave(heads // len(rows), 0)
    kept = [0] + [h for h in range(1, heads) if not torch.equal(rows[h], rows[h - 1])]
    unique = rows[kept]
    if heads % len(kept):
        raise HeadsRefused("key/value heads are shared unevenly")
    repeats = heads // len(kept)
    if not torch.equal(unique.repeat_interleave(repeats, 0), rows) or len(unique.unique(dim=0)) != len(unique):
        raise HeadsRefused("query heads that share a key/value head do not stand together")
    return unique, repeats
