"""Which row of a projection feeds which channel of which head, and which score belongs to which query, head and key.

Numbered entries are sent through the movement of data, so it does not matter where the code keeps its heads, in which
order it writes its dimensions, and whether a product is q kᵀ or k qᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.patterns.axes import Axes, AxesRefused, axes_of
from fla_swap.patterns.graph import CapturedGraph, NotLayout, op_name, shape
from fla_swap.patterns.projection import Linear


class HeadsRefused(Exception):
    """The movement between a projection and the core is not a split into heads. `side`: whose movement, if known."""

    def __init__(self, reason: str, side: str | None = None):
        super().__init__(reason)
        self.side = side


@dataclass(frozen=True, kw_only=True)
class Operand:
    """`tokens` [..., N] and `rows` [..., N, C]: the token and the projection's output at each place of an operand.

    `rows_at`: the output that stands at each entry of a node on the way, where one was asked for.
    """

    tokens: Tensor
    rows: Tensor
    batch: int
    length: int
    rows_at: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HeadTables:
    """`q`, `k`, `v` [heads, width]: the projections' outputs that stand at (head, channel), in the order of q's heads.

    `swapped`: the product's right operand holds the queries. `axes`: how the scores lie where each mask term acts.
    `out`: (token · heads + head) · width + channel at each entry of the core's output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    swapped: bool
    axes: tuple[Axes, ...]


def read_operand(
    linear: Linear,
    hidden: fx.Node,
    target: fx.Node,
    same: Mapping[fx.Node, fx.Node],
    graph: CapturedGraph,
    *,
    transposed: bool = False,
    also: fx.Node | None = None,
) -> Operand:
    """What stands in `target` [..., N, C] (or [..., C, N] when `transposed`), and in `also` on the way to it.

    Raises `HeadsRefused`.
    """
    dims, tokens = shape(hidden), graph.token_numbers()
    if dims is None or len(dims) != 3 or dims[:2] != tokens.shape[:2]:
        raise HeadsRefused(f"the projection's input has shape {dims}, expected [batch, time, hidden]")
    try:
        moved = graph.trace(hidden, tokens.expand(dims), linear.x, {})
    except NotLayout as stop:
        raise HeadsRefused(f"{op_name(stop.node)} between the input and the projection") from stop
    if not bool((moved == moved[..., :1]).all()):
        raise HeadsRefused("the projection's input mixes tokens")
    numbers = moved[..., :1] * linear.outputs + torch.arange(linear.outputs)
    try:
        rows_at = None if also is None else graph.trace(linear.out, numbers, also, same) % linear.outputs
        numbers = graph.trace(linear.out, numbers, target, same)
    except NotLayout as stop:
        raise HeadsRefused(f"{op_name(stop.node)} between the projection and the core") from stop
    if transposed:
        numbers = numbers.transpose(-1, -2)
    token, rows = numbers // linear.outputs, numbers % linear.outputs
    if not bool((token == token[..., :1]).all()):
        raise HeadsRefused("the core does not see the tokens in order, one each")
    return Operand(tokens=token[..., 0], rows=rows, batch=graph.batch, length=graph.length, rows_at=rows_at)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`code`: (query token · heads + head) · keys + key token, at each entry of the product q kᵀ."""

    code: Tensor
    q: Tensor
    k: Tensor
    heads: int
    keys: int
    key_length: int
    length: int

    @staticmethod
    def of(q: Operand, k: Operand) -> Scores:
        """Of q [..., M, C] and k [..., N, C]. Raises `HeadsRefused` where they are not heads over the same batch."""
        lead = torch.broadcast_shapes(q.tokens.shape[:-1], k.tokens.shape[:-1])
        tokens, keys = (x.tokens.expand(*lead, x.tokens.shape[-1]) for x in (q, k))
        if not bool((tokens[..., :, None] // q.length == keys[..., None, :] // k.length).all()):
            raise HeadsRefused("a head mixes rows of the batch")
        order, count = _by_token(tokens, q.batch * q.length)
        rank = torch.empty(tokens.numel(), dtype=torch.long)
        rank[order] = torch.arange(count).repeat(q.batch * q.length)
        numbers = tokens * count + rank.reshape(tokens.shape)
        total = k.batch * k.length
        code = numbers[..., :, None] * total + keys[..., None, :]
        shared = _rows_of_lead(k.rows, "k").expand(*lead, -1)[..., None, :].expand(*tokens.shape, -1)
        q_rows = q.rows.expand(*tokens.shape, -1)
        return Scores(
            code=code,
            q=_table(q_rows.reshape(len(order), -1)[order], count, "q"),
            k=_table(shared.reshape(len(order), -1)[order], count, "k"),
            heads=count,
            keys=total,
            key_length=k.length,
            length=q.length,
        )

    def over_keys(self, code: Tensor, dim: int) -> bool:
        """Whether each line along `dim` is one query of one head against all keys of its batch row, once each."""
        code = code.movedim(dim, -1)
        owner, key = code // self.keys, code % self.keys
        if not bool((owner == owner[..., :1]).all()):
            return False
        first = owner[..., :1] // self.heads // self.length * self.key_length
        wanted = first + torch.arange(self.key_length)
        return key.shape[-1] == self.key_length and bool((key.sort(-1).values == wanted).all())


def _by_token(tokens: Tensor, total: int) -> tuple[Tensor, int]:
    """(the order that sorts the places by token, how many each token has)."""
    flat = tokens.flatten()
    count = flat.numel() // total
    order = torch.argsort(flat, stable=True)
    if count * total != flat.numel() or not torch.equal(flat[order], torch.arange(total).repeat_interleave(count)):
        raise HeadsRefused("the core does not see every token once in each head", "q")
    return order, count


def _rows_of_lead(rows: Tensor, side: str) -> Tensor:
    """[..., C] of rows [..., N, C] that do not depend on the token."""
    if not bool((rows == rows[..., :1, :]).all()):
        raise HeadsRefused("a head reads other channels at other tokens", side)
    return rows[..., 0, :]


def _table(rows: Tensor, heads: int, side: str) -> Tensor:
    """[heads, C] of rows [tokens · heads, C], the same for every token."""
    table = rows.unflatten(0, (-1, heads))
    if not bool((table == table[:1]).all()):
        raise HeadsRefused("a head reads other channels at other tokens, or in other rows of the batch", side)
    return table[0]


def read_heads(core: Mapping[str, Any], left: Operand, right: Operand, v: Operand, graph: CapturedGraph) -> HeadTables:
    """The tables of one core, whose product is left · rightᵀ. Raises `HeadsRefused`."""
    scores, swapped = _orient(core, left, right, graph)
    where = [term.at or core.get("product") for term in core["mask"]]
    codes = [scores.code if n is None else _moved(core, scores, n, graph) for n in where]
    try:
        axes = tuple(axes_of(c, scores) for c in codes)
    except AxesRefused as refused:
        raise HeadsRefused(str(refused)) from refused
    mixed = scores.code if core.get("product") is None else _moved(core, scores, core["mixed"], graph)
    if core.get("v_first"):
        mixed = mixed.transpose(-1, -2)
    rows, owner = _values(mixed, v, scores, fused=core.get("product") is None)
    width = rows.shape[-1]
    out = owner[..., None] * width + torch.arange(width)
    return HeadTables(
        q=scores.q,
        k=scores.k,
        v=rows,
        out=out.transpose(-1, -2) if core.get("v_first") else out,
        swapped=swapped,
        axes=axes,
    )


def _orient(core: Mapping[str, Any], left: Operand, right: Operand, graph: CapturedGraph) -> tuple[Scores, bool]:
    if core.get("product") is None:
        return Scores.of(left, _repeated(right, left.tokens.shape[-2]) if left.tokens.dim() > 2 else right), False
    reasons = []
    for swapped in (False, True):
        q, k = (right, left) if swapped else (left, right)
        try:
            scores = Scores.of(q, k)
        except HeadsRefused as refused:
            reasons.append(refused)
            continue
        if swapped:
            scores = _transposed(scores)
        code = _moved(core, scores, core["scores"], graph)
        if scores.over_keys(code, core["dim"]):
            return scores, swapped
    if reasons:
        raise reasons[0]
    raise HeadsRefused("the softmax does not run over the keys of one query and one head")


def _transposed(scores: Scores) -> Scores:
    return dataclasses.replace(scores, code=scores.code.transpose(-1, -2))


def _repeated(x: Operand, heads: int) -> Operand:
    """Fewer key/value heads than query heads in a fused call: each serves the query heads that follow one another."""
    if x.tokens.dim() < 3 or x.tokens.shape[-2] in (1, heads):
        return x
    if heads % x.tokens.shape[-2]:
        raise HeadsRefused(f"{heads} query heads and {x.tokens.shape[-2]} key/value heads", "k")
    times = heads // x.tokens.shape[-2]
    return dataclasses.replace(
        x, tokens=x.tokens.repeat_interleave(times, -2), rows=x.rows.repeat_interleave(times, -3)
    )


def _moved(core: Mapping[str, Any], scores: Scores, target: fx.Node, graph: CapturedGraph) -> Tensor:
    """The codes where they stand at `target`, after the product."""
    try:
        code = graph.trace(core["product"], scores.code, target, core["same"])
    except NotLayout as stop:
        raise HeadsRefused(f"{op_name(stop.node)} between q kᵀ and the values") from stop
    dims = shape(target) or ()
    return code.reshape((1,) * (len(dims) - code.dim()) + tuple(code.shape))


def _values(mixed: Tensor, v: Operand, scores: Scores, *, fused: bool) -> tuple[Tensor, Tensor]:
    """v's rows [heads, width], and token · heads + head of each line, of the product mixed [..., M, N] · v."""
    if fused and mixed.dim() > 3:
        v = _repeated(v, mixed.shape[-3])
    lead = torch.broadcast_shapes(mixed.shape[:-2], v.tokens.shape[:-1])
    mixed = mixed.expand(*lead, *mixed.shape[-2:])
    owner, key = mixed // scores.keys, mixed % scores.keys
    if not bool((owner == owner[..., :1]).all()):
        raise HeadsRefused("the softmax runs over another axis than the one that is summed with the values", "v")
    if mixed.shape[-1] != scores.key_length or not bool((key == v.tokens.expand(*lead, -1)[..., None, :]).all()):
        raise HeadsRefused("the values do not stand at the tokens of their keys", "v")
    owner = owner[..., 0]
    order, count = _by_token(owner // scores.heads, owner.numel() // scores.heads)
    wanted = torch.arange(owner.numel())
    if count != scores.heads or not torch.equal(owner.flatten().sort().values, wanted):
        raise HeadsRefused("the values are not read once by each query of each head", "v")
    rows = _rows_of_lead(v.rows, "v").expand(*lead, -1)[..., None, :].expand(*owner.shape, -1)
    return _table(rows.reshape(len(order), -1)[owner.flatten().argsort()], scores.heads, "v"), owner


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


def share(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v rows of the key/value heads: as few as both allow. Raises `HeadsRefused` as `group` does."""
    heads = len(k)
    (k_rows, k_times), (v_rows, v_times) = group(k, heads), group(v, heads)
    if k_times == v_times:
        return k_rows, v_rows
    times = min(k_times, v_times)
    if max(k_times, v_times) % times:
        raise HeadsRefused(f"keys are shared by {k_times} query heads, values by {v_times}", "v")
    return k[::times], v[::times]


def number_outputs(outs: Sequence[tuple[fx.Node, HeadTables]], order: Tensor | None = None) -> dict[fx.Node, Tensor]:
    """token · width + channel at each core's output, the heads of several cores numbered one core after the other.

    `order`: the heads in the order in which they get the channels 0, 1, … (None: as they are numbered).
    """
    total, width = sum(len(t.q) for _, t in outs), outs[0][1].v.shape[-1]
    place = torch.arange(total) if order is None else order.argsort()
    known, offset = {}, 0
    for node, tables in outs:
        count = len(tables.q)
        owner, channel = tables.out // width, tables.out % width
        token, head = owner // count, owner % count
        known[node] = ((token * total + place[head + offset]) * width + channel).reshape(shape(node) or ())
        offset += count
    return known


def read_order(channels: Tensor, heads: int) -> Tensor:
    """The heads in the order in which they stand in `channels` [..., heads · width]. Raises `HeadsRefused`."""
    order = channels.reshape(-1, channels.shape[-1])[0]
    width = len(order) // heads
    found = order[:: max(width, 1)] // max(width, 1)
    wanted = (found[:, None] * width + torch.arange(width)).flatten()
    if not bool((channels == order).all()) or not torch.equal(order, wanted) or len(found.unique()) != heads:
        raise HeadsRefused("the heads enter the output projection mixed with each other, or not all of them")
    return found
