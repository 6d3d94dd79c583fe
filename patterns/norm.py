"""Norms on q, k or v: RMS, layer and L2 norm, fused or spelled out, with any stored weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CAST, LAYOUT, CapturedGraph, NotLayout, _ops, argument, shape
from fla_swap.patterns.scores import ADD, DIV, MUL, split_factor
from fla_swap.patterns.weights import Spread, WeightsRefused, read_spread, weights_behind
from fla_swap.types import Norm

RMS = _ops("rms_norm")
LAYER = _ops("layer_norm", "native_layer_norm")
POW, MEAN, SUM, SUB = _ops("pow", "square"), _ops("mean"), _ops("sum"), _ops("sub")
RSQRT, SQRT, INVERSE = _ops("rsqrt"), _ops("sqrt"), _ops("reciprocal")
LENGTH, AT_LEAST = _ops("linalg_vector_norm", "norm"), _ops("clamp_min", "clamp")
JOIN = _ops("cat", "concat", "stack")
SPREAD_OUT = _ops("expand", "expand_as", "broadcast_to", "view", "reshape", "unsqueeze")


class NormRefused(Exception):
    """The norm acts on something else than each head, or on all heads together, or has weights that do not fit them."""


@dataclass(frozen=True, kw_only=True)
class NormFacts:
    """A norm over the last dimension of `x`, `size` channels; `weight` and `bias` stand against `x`."""

    kind: str
    eps: float
    weight: Spread | None
    bias: Spread | None
    size: int
    x: fx.Node


@dataclass(frozen=True, kw_only=True)
class _Core:
    """x normalised without weights, and a factor on it."""

    kind: str
    eps: float
    x: fx.Node
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """x → w · x / rms(x), w · (x − mean) / std + b, or w · x / ‖x‖, over the last dimension; also head by head."""

    name: str = "norm"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target in JOIN:
            return self._each_head(node, graph)
        weight, bias, factor, walk = None, None, 1.0, node
        if (split := _weighted(walk, ADD, graph)) is not None:
            bias, walk = split
            walk = graph.peel(walk, CAST)[-1]
        if (split := _weighted(walk, MUL, graph)) is not None:
            weight, walk = split
            walk = graph.peel(walk, CAST)[-1]
        if (constant := split_factor(walk, graph)) is not None and not weights_behind_factor(walk, graph):
            factor, walk = constant[0], graph.peel(constant[1], CAST)[-1]
        if walk.target in RMS | LAYER:
            return self._fused(node, walk, weight, bias, factor, graph)
        core = _normalised(walk, graph)
        if core is None:
            return ABSENT
        if isinstance(core, Refused):
            return core
        return self._found(core, weight, bias, factor, (node, walk), graph)

    def _fused(
        self, node: fx.Node, norm: fx.Node, weight: Any, bias: Any, factor: float, graph: CapturedGraph
    ) -> Result:
        x, dims = norm.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(dims, list | tuple) or len(dims) != 1:
            return Refused("a norm over several dimensions", norm)
        rms = norm.target in RMS
        own_bias = None if rms else argument(norm, 3, "bias")
        own_weight = argument(norm, 2, "weight")
        if (own_weight is not None or own_bias is not None) and norm is not node:
            return ABSENT
        eps = argument(norm, 3, "eps") if rms else argument(norm, 4, "eps", 1e-5)
        if eps is None:
            eps = 1.1920928955078125e-07
        core = _Core(kind="rms" if rms else "layer", eps=float(eps), x=x)
        weight = own_weight if weight is None else weight
        return self._found(core, weight, own_bias if bias is None else bias, factor, (node, norm), graph)

    @staticmethod
    def _found(core: _Core, weight: Any, bias: Any, factor: float, nodes: tuple, graph: CapturedGraph) -> Result:
        dims = shape(core.x)
        assert dims is not None
        factor *= core.factor
        if bias is not None and factor != 1.0:
            return Refused("a bias after a norm that is multiplied by a constant", nodes[0])
        spreads: list[Spread | None] = [None, None]
        for number, value in enumerate((weight, bias)):
            if value is None:
                continue
            spreads[number] = read_spread(value, graph)
            if spreads[number] is None:
                return Refused("a norm whose weight is computed", nodes[0])
        facts = NormFacts(kind=core.kind, eps=core.eps, weight=spreads[0], bias=spreads[1], size=dims[-1], x=core.x)
        found = {"norm": facts} if factor == 1.0 else {"norm": facts, "scale": factor}
        return Found(facts=found, nodes=nodes, next=core.x)

    def _each_head(self, node: fx.Node, graph: CapturedGraph) -> Result:
        """Parts of one tensor, each with a norm of its own, put together again in their places."""
        given = node.args[0]
        pieces = [p for p in given if isinstance(p, fx.Node)] if isinstance(given, list | tuple) else []
        results = [self.match(p, graph) for p in pieces]
        if not results or not all(isinstance(r, Found) and "scale" not in r.facts for r in results):
            return ABSENT
        found = [r for r in results if isinstance(r, Found)]
        norms: list[NormFacts] = [r.facts["norm"] for r in found]
        x = _common([graph.peel(n.x, LAYOUT | CAST) for n in norms])
        dims = shape(x)
        same = {piece: norm.x for piece, norm in zip(pieces, norms, strict=True)}
        if x is None or dims is None or len({(n.kind, n.eps, n.size) for n in norms}) != 1:
            return Refused("parts of q or k with different norms", node)
        numbers = torch.arange(torch.Size(dims).numel()).reshape(dims)
        try:
            if not torch.equal(graph.trace(x, numbers, node, same), numbers):
                raise NotLayout(node)
            weights = _joined(node, [(n, n.weight) for n in norms])
            bias = _joined(node, [(n, n.bias) for n in norms])
        except (NotLayout, WeightsRefused):
            return Refused("parts of q or k are normed apart, and put together in another order", node)
        facts = NormFacts(kind=norms[0].kind, eps=norms[0].eps, weight=weights, bias=bias, size=norms[0].size, x=x)
        return Found(facts={"norm": facts}, nodes=(node, *(n for r in found for n in r.nodes)), next=x)


def _common(chains: list[list[fx.Node]]) -> fx.Node | None:
    """The nearest node that all chains pass."""
    return next((n for n in chains[0] if shape(n) is not None and all(n in c for c in chains[1:])), None)


def _joined(join: fx.Node, parts: list[tuple[NormFacts, Spread | None]]) -> Spread | None:
    """The parts' weights as one, against the joined tensor."""
    spreads = [s for _, s in parts]
    if all(s is None for s in spreads):
        return None
    names: list[str] = []
    dims: list[tuple[int, ...]] = []
    tables, start = [], 0
    for facts, spread in parts:
        if spread is None or spread.offset != parts[0][1].offset:  # type: ignore[union-attr]
            raise WeightsRefused("parts with and without weights")
        tables.append(spread.entries.expand(shape(facts.x) or ()) + start)
        names += spread.names
        dims += spread.dims
        start += sum(torch.Size(d).numel() for d in spread.dims)
    assert callable(join.target)
    entries = join.target(tables, *join.args[1:], **join.kwargs)
    return Spread(names=tuple(names), dims=tuple(dims), entries=entries, offset=spreads[0].offset)  # type: ignore[union-attr]


def _weighted(node: fx.Node, ops: frozenset, graph: CapturedGraph) -> tuple[fx.Node, fx.Node] | None:
    """(closed, open) operands of a binary operation with stored weights, one for each channel (or head, or one)."""
    if node.target not in ops or len(node.all_input_nodes) != 2:
        return None
    for closed, opened in (node.all_input_nodes, node.all_input_nodes[::-1]):
        if graph.is_open(closed) or not graph.is_open(opened):
            continue
        dims, wide = shape(closed), shape(opened)
        fits = dims is not None and bool(wide) and graph.length not in dims and (not dims or dims[-1] in (1, wide[-1]))
        if fits and weights_behind(closed, graph):
            return closed, opened
    return None


def weights_behind_factor(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a factor is a stored weight, and so no constant."""
    return any(weights_behind(n, graph) for n in node.all_input_nodes if not graph.is_open(n))


def _normalised(node: fx.Node, graph: CapturedGraph) -> _Core | Refused | None:
    """x · rsqrt(mean(x²) + eps), x / sqrt(mean(x²) + eps), the same with a sum, or x / max(‖x‖, eps)."""
    if node.target not in MUL | DIV or len(node.args) < 2 or argument(node, 2, "rounding_mode") is not None:
        return None
    sides = [node.args[:2], node.args[1::-1]] if node.target in MUL else [node.args[:2]]
    for x, inverse in sides:
        if not (isinstance(x, fx.Node) and isinstance(inverse, fx.Node) and graph.is_open(inverse)):
            continue
        root, divides = graph.peel(inverse, CAST | SPREAD_OUT)[-1], node.target in DIV
        if root.target in INVERSE:
            root, divides = graph.peel(root.all_input_nodes[0], CAST)[-1], not divides
        x = graph.peel(x, CAST)[-1]
        if divides and root.target in LENGTH | AT_LEAST:
            return _by_length(x, root, graph)
        found = _mean_square(root, divides, graph)
        if found is None or not _equal(graph.peel(found[2], CAST)[-1], x, graph):
            continue
        eps, summed, _ = found
        width = (shape(x) or (1,))[-1]
        if summed:
            return _Core(kind="rms", eps=eps / width, x=x, factor=width**-0.5)
        centred = _centred(x, graph)
        return _Core(kind="layer", eps=eps, x=centred) if centred is not None else _Core(kind="rms", eps=eps, x=x)
    return None


def _by_length(x: fx.Node, root: fx.Node, graph: CapturedGraph) -> _Core | Refused | None:
    eps = 0.0
    if root.target in AT_LEAST:
        least = graph.constant(argument(root, 1, "min"))
        if least is None or argument(root, 2, "max") is not None:
            return None
        eps, root = least, graph.peel(root.all_input_nodes[0], CAST)[-1]
    if root.target not in LENGTH or graph.peel(root.all_input_nodes[0], CAST)[-1] is not x:
        return None
    dims = argument(root, 2, "dim")
    order = argument(root, 1, "ord", argument(root, 1, "p", 2))
    if graph.constant(order) != 2.0 or not _last(dims, x):
        return Refused("a norm of another order than 2, or over another dimension than the last", root)
    return _Core(kind="l2", eps=eps, x=x)


def _mean_square(root: fx.Node, divides: bool, graph: CapturedGraph) -> tuple[float, bool, fx.Node] | None:
    """(eps, whether it is a sum, x) when `root` is the (inverse) square root of mean(x²) + eps."""
    wanted = SQRT if divides else RSQRT
    power = graph.constant(argument(root, 1, "exponent")) if root.target in POW else None
    if power != (0.5 if divides else -0.5) and root.target not in wanted:
        return None
    walk, eps = graph.peel(root.all_input_nodes[0], CAST)[-1], 0.0
    if walk.target in ADD:
        constant = graph.constant(walk.args[1])
        if constant is None:
            return None
        eps, walk = constant, graph.peel(walk.all_input_nodes[0], CAST)[-1]
    if walk.target not in MEAN | SUM or not _last(argument(walk, 1, "dim"), walk.all_input_nodes[0]):
        return None
    square = graph.peel(walk.all_input_nodes[0], CAST)[-1]
    if square.target in POW and (len(square.args) == 1 or graph.constant(square.args[1]) == 2.0):
        return eps, walk.target in SUM, square.all_input_nodes[0]
    if square.target in MUL and len(square.all_input_nodes) == 1:
        return eps, walk.target in SUM, square.all_input_nodes[0]
    return None


def _centred(node: fx.Node, graph: CapturedGraph) -> fx.Node | None:
    """x when `node` is x − mean(x)."""
    if node.target not in SUB or len(node.all_input_nodes) != 2:
        return None
    x, mean = node.all_input_nodes
    over_last = mean.target in MEAN and mean.all_input_nodes[0] is x and _last(argument(mean, 1, "dim"), x)
    return x if over_last else None


def _equal(a: fx.Node, b: fx.Node, graph: CapturedGraph, depth: int = 4) -> bool:
    """Whether two nodes compute the same: one node, or the same operations on the same nodes."""
    if a is b:
        return True
    if not depth or a.op != "call_function" or a.target != b.target or a.kwargs != b.kwargs:
        return False
    if a.target not in SUB | MEAN | CAST | LAYOUT or len(a.args) != len(b.args):
        return False

    def same(x: Any, y: Any) -> bool:
        both = isinstance(x, fx.Node) and isinstance(y, fx.Node)
        return _equal(x, y, graph, depth - 1) if both else type(x) is type(y) and x == y

    return all(same(x, y) for x, y in zip(a.args, b.args, strict=True))


def _last(dims: Any, x: fx.Node) -> bool:
    """Whether a reduction runs over the last dimension of `x` alone."""
    wide = shape(x)
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    return wide is not None and dims in ([-1], [len(wide) - 1])


def state_norm(facts: NormFacts, rows_at: Tensor, rows: Tensor) -> Norm:
    """The `Norm` that a site states. Raises `NormRefused`.

    `rows_at`: the projection's row at each entry of the norm's input; `rows` [H, K]: the rows of each head.
    """
    heads, width = rows.shape
    if facts.size not in (width, heads * width):
        raise NormRefused(f"acts on {facts.size} channels, a head has {width}")
    across = facts.size != width
    normed = {tuple(g) for g in rows_at.reshape(-1, facts.size).unique(dim=0).sort(-1).values.tolist()}
    wanted = {tuple(sorted(r)) for r in (rows.flatten()[None] if across else rows).tolist()}
    if not wanted <= normed:
        raise NormRefused("acts on channels of several heads, or on parts of heads")
    spreads = (facts.weight, facts.bias)
    used = [None if s is None else _entries(s, rows_at, rows) for s in spreads]
    apart = not across and any(u is not None and not bool((u == u[:1]).all()) for u in used)
    try:
        refs = [
            None if s is None or u is None else s.ref(u.flatten() if apart or across else u[0])
            for s, u in zip(spreads, used, strict=True)
        ]
    except WeightsRefused as refused:
        raise NormRefused(f"has weights that a site cannot state: {refused}") from refused
    if facts.bias is not None and facts.bias.offset:
        raise NormRefused(f"adds {facts.bias.offset} to its bias")
    offset = 0.0 if facts.weight is None else facts.weight.offset
    return Norm(
        kind=facts.kind,
        eps=facts.eps,
        weight=refs[0],
        bias=refs[1],
        offset=offset,
        across_heads=across,
        per_head=apart,
    )


def _entries(spread: Spread, rows_at: Tensor, rows: Tensor) -> Tensor:
    """[H, K]: the entry that stands against each channel of each head."""
    entries = spread.entries.expand(rows_at.shape).flatten()
    table = torch.full((int(rows_at.max()) + 1,), -1)
    table[rows_at.flatten()] = entries
    if not torch.equal(table[rows_at.flatten()], entries):
        raise NormRefused("has weights that differ between tokens, or between copies of a head")
    return table[rows]
