"""A softmax in any spelling: the operator, exp over its sum, exp of a log-softmax, weights multiplied by a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fla_swap.patterns.graph import CAST, CapturedGraph, _ops, argument, shape
from fla_swap.patterns.steps import ADD, DIV, MUL, SUB

SOFTMAX = _ops("softmax", "_softmax", "special_softmax", "_safe_softmax")
LOG_SOFTMAX = _ops("log_softmax", "_log_softmax", "special_log_softmax")
EXP, SUM, RECIPROCAL, LOGSUMEXP = _ops("exp"), _ops("sum"), _ops("reciprocal"), _ops("logsumexp")
WIDEN = _ops("unsqueeze", "expand", "expand_as")


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """A softmax over the axis `dim` (from the end, negative) of `x`.

    `same`: its nodes, each with the one it takes its place from. `kept`: (closed table, node) multiplied with the
    exponentials before they are summed. `refused`: why it is one, but not exactly.
    """

    x: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    same: Mapping[fx.Node, fx.Node]
    kept: tuple[tuple[fx.Node, fx.Node], ...] = ()
    refused: str | None = None


@dataclass(kw_only=True)
class _Exponentials:
    x: fx.Node
    same: dict[fx.Node, fx.Node]
    kept: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def find_softmax(node: fx.Node, graph: CapturedGraph) -> Normalised | None:
    """The softmax whose result is `node`; None when there is none."""
    if not graph.is_open(node):
        return None
    if node.target in SOFTMAX:
        return _operator(node, node, graph)
    if node.target in EXP:
        inner = graph.peel(node.all_input_nodes[0], CAST)[-1]
        if inner.target in LOG_SOFTMAX:
            return _operator(node, inner, graph)
        return _minus_logsumexp(node, inner, graph)
    if node.target in DIV | MUL:
        return _ratio(node, graph)
    return None


def _operator(node: fx.Node, inner: fx.Node, graph: CapturedGraph) -> Normalised | None:
    dims, dim = shape(inner), argument(inner, 1, "dim")
    if dims is None or len(dims) < 2 or not isinstance(dim, int):
        return None
    x = inner.all_input_nodes[0]
    return Normalised(x=x, dim=_from_end(dim, len(dims)), nodes=tuple({node: 0, inner: 0}), same={node: x, inner: x})


def _minus_logsumexp(node: fx.Node, inner: fx.Node, graph: CapturedGraph) -> Normalised | None:
    if inner.target not in SUB or len(inner.all_input_nodes) != 2:
        return None
    x, total = inner.args[:2]
    total = graph.peel(total, CAST | WIDEN)[-1] if isinstance(total, fx.Node) else None
    if (
        not isinstance(x, fx.Node)
        or total is None
        or total.target not in LOGSUMEXP
        or total.all_input_nodes[0] is not x
    ):
        return None
    dim = _axis(total)
    if dim is None:
        return None
    return Normalised(x=x, dim=dim, nodes=(node, inner, total), same={node: x, inner: x})


def _ratio(node: fx.Node, graph: CapturedGraph) -> Normalised | None:
    """e / sum(e), or e times the reciprocal of the sum."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    above, below = node.args[:2]
    if node.target in MUL:
        above, below = (above, below) if below.target in RECIPROCAL else (below, above)  # type: ignore[union-attr]
        if below.target not in RECIPROCAL:  # type: ignore[union-attr]
            return None
        below = below.all_input_nodes[0]  # type: ignore[union-attr]
    assert isinstance(above, fx.Node) and isinstance(below, fx.Node)
    refused = None
    total = graph.peel(below, CAST | WIDEN)[-1]
    if total.target in ADD and len(graph.open_inputs(total)) == 1:
        refused = "a number is added to the sum that the exponentials are divided by"
        total = graph.peel(graph.open_inputs(total)[0], CAST | WIDEN)[-1]
    above = graph.peel(above, CAST)[-1]
    if total.target not in SUM:
        return None
    found = _exponentials(above, graph)
    dim = _axis(total)
    if found is None or dim is None:
        return None
    summed = graph.peel(total.all_input_nodes[0], CAST)[-1]
    if not _alike(above, summed, 6):
        refused = "the exponentials are divided by the sum of others"
    same = {node: above, **found.same}
    nodes = (node, above, total)
    return Normalised(x=found.x, dim=dim, nodes=nodes, same=same, kept=tuple(found.kept), refused=refused)


def _exponentials(node: fx.Node, graph: CapturedGraph) -> _Exponentials | None:
    """exp(x), possibly times closed tables."""
    found = _Exponentials(x=node, same={})
    while node.target in MUL and len(node.all_input_nodes) == 2 and len(graph.open_inputs(node)) == 1:
        (opened,) = graph.open_inputs(node)
        closed = next(n for n in node.all_input_nodes if n is not opened)
        found.kept.append((closed, node))
        found.same[node] = opened
        node = graph.peel(opened, CAST)[-1]
    if node.target not in EXP:
        return None
    found.x = node.all_input_nodes[0]
    found.same[node] = found.x
    return found


def _axis(total: fx.Node) -> int | None:
    """The one axis of a sum, from the end."""
    dims, axes = shape(total.all_input_nodes[0]), argument(total, 1, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if dims is None or not isinstance(axes, list | tuple) or len(axes) != 1:
        return None
    return _from_end(int(axes[0]), len(dims))


def _from_end(dim: int, rank: int) -> int:
    return dim if dim < 0 else dim - rank


def _alike(a: object, b: object, depth: int) -> bool:
    """Whether two values are the same node, or are computed alike from the same nodes."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or a.target is not b.target or a.kwargs.keys() != b.kwargs.keys():
        return False
    kwargs = all(_alike(v, b.kwargs[n], depth - 1) for n, v in a.kwargs.items())
    return kwargs and _alike(a.args, b.args, depth - 1)
