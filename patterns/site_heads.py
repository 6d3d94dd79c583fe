"""The heads of one attention: what stands in each, the projections of all of them, and their norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fla_swap.patterns.graph import CapturedGraph
from fla_swap.patterns.heads import HeadsRefused, read_heads, read_operand, share
from fla_swap.patterns.joining import Joined
from fla_swap.patterns.norm import NormRefused, state_norm
from fla_swap.patterns.output import Boundary
from fla_swap.patterns.parts import Part, Stop
from fla_swap.patterns.path import Path
from fla_swap.types import Norm, Projection


def number_heads(part: Part, boundary: Boundary, graph: CapturedGraph) -> Part:
    """The part with the tables of its heads; q and k change places where the right operand holds the queries.

    `graph`: as the site sees it. Raises `Stop` where the movement of data is not a split into heads.
    """
    core, operands, node = part.core, {}, part.nodes[0]
    for side, path in (("q", part.q), ("k", part.k), ("v", part.v)):
        assert path.linear is not None
        entry, view = boundary.hidden, graph
        if side != "q":
            entry = boundary.memory or boundary.hidden
            view = graph.sized(length=graph.key_length, batch=graph.batch, time_first=graph.time_first)
        flipped = core["k_transposed"] if side == "k" else side == "v" and core.get("v_first", False)
        also = None if path.norm is None else path.norm.x
        try:
            operands[side] = read_operand(
                path.linear, entry, core[side], path.same, view, transposed=flipped, also=also
            )
        except HeadsRefused as refused:
            raise Stop(side, str(refused), path.linear.out) from refused
    try:
        tables = read_heads(core, operands["q"], operands["k"], operands["v"], graph)
    except HeadsRefused as refused:
        raise Stop(refused.side or "heads", str(refused), node) from refused
    rows_at = {side: operand.rows_at for side, operand in operands.items()}
    if tables.swapped:
        part = dataclasses.replace(part, q=part.k, k=part.q)
        rows_at["q"], rows_at["k"] = rows_at["k"], rows_at["q"]
    if part.k.temperature is not None:
        raise Stop("k", "the keys are scaled by an amount that depends on the position", node)
    if tables.swapped and boundary.memory is not None:
        raise Stop("heads", "the queries of a cross-attention are made of the memory", node)
    return dataclasses.replace(part, heads=tables, rows_at=rows_at)


def join_projections(parts: Sequence[Part], order: Tensor) -> tuple[dict[str, Projection], dict[str, Tensor]]:
    """q, k and v, and the rows [heads, width] of each head, in the order of the output projection. Raises `Stop`."""
    joined, rows = {}, {}
    for side in "qkv":
        linears = [getattr(p, side).linear for p in parts]
        joined[side] = Joined(linears)
        tables = [getattr(p.heads, side) + joined[side].offset(x) for p, x in zip(parts, linears, strict=True)]
        rows[side] = torch.cat(tables)[order]
    node = parts[0].nodes[0]
    try:
        rows["k"], rows["v"] = share(rows["k"], rows["v"])
    except HeadsRefused as refused:
        raise Stop(refused.side or "k", str(refused), node) from refused
    found = {side: joined[side].projection(rows[side].flatten()) for side in "qkv"}
    for side, projection in found.items():
        if isinstance(projection, str):
            raise Stop(side, projection, node)
    return {s: p for s, p in found.items() if isinstance(p, Projection)}, rows


def norm_of(side: str, parts: Sequence[Part], rows: Mapping[str, Tensor]) -> Norm | None:
    """The norm of q, k or v; heads with projections of their own must share it. Raises `Stop`."""
    found = []
    for part in parts:
        path: Path = getattr(part, side)
        if path.norm is None:
            return None
        rows_at = part.rows_at[side]
        assert path.linear is not None and rows_at is not None
        own = rows[side] if len(parts) == 1 else getattr(part.tables, side)
        try:
            found.append(state_norm(path.norm, rows_at, own))
        except NormRefused as refused:
            raise Stop("norm", f"the norm of {side} {refused}", path.linear.out) from refused
    if any(norm != found[0] or norm.per_head for norm in found[1:]):
        raise Stop("norm", f"the heads have different norms of {side}", parts[0].nodes[0])
    return found[0]
