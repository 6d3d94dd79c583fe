"""What combines parts of an attention's output with each other, or with what is computed from it: named, not stated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fla_swap.patterns.base import Found, Refused
from fla_swap.patterns.graph import CAST, DROPOUT, LAYOUT, SHAPE_ONLY, CapturedGraph, op_name
from fla_swap.patterns.projection import Project
from fla_swap.patterns.steps import ADD, MUL, SUB

_FURTHEST = 64


def combined(walk: fx.Node, users: Sequence[fx.Node], graph: CapturedGraph) -> Refused | None:
    """Why the output `walk` of an attention, which all `users` read, is more than one tensor for a projection.

    Differential attention (2410.05258) subtracts a part of the heads from another; exclusive self-attention takes
    from the output what lies along the values. None when no sum or difference before a projection joins them again.
    """
    plain: dict[fx.Node, bool] = {walk: True}
    frontier = list(users)
    while frontier and len(plain) < _FURTHEST:
        node = min(frontier, key=graph.order)
        frontier = [n for n in frontier if n is not node]
        before = [n for n in graph.open_inputs(node) if n in plain]
        if node in plain or isinstance(Project().match(node, graph), Found):
            continue
        if node.target in ADD | SUB and len(before) == 2:
            if all(plain[n] for n in before):
                what = "combines parts of the attention's output, as differential attention does"
            else:
                what = "combines the attention's output with what is computed from it"
            return Refused(f"{op_name(node)} {what}, and a site cannot state that", node)
        quiet = node.target in LAYOUT | CAST | DROPOUT | MUL and len(graph.open_inputs(node)) == 1
        plain[node] = quiet and all(plain[n] for n in before)
        frontier += [u for u in node.users if u.target not in SHAPE_ONLY]
    return None
