"""Norms on q or k: RMS and layer norm, fused or spelled out, with a weight, a bias, and Gemma's weight + 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.graph import CAST, CapturedGraph, _ops, argument, shape
from fla_swap.patterns.scores import ADD, DIV, MUL
from fla_swap.types import Norm, WeightRef

RMS = _ops("rms_norm")
LAYER = _ops("layer_norm", "native_layer_norm")
POW, MEAN, RSQRT, SQRT, SUB = _ops("pow", "square"), _ops("mean"), _ops("rsqrt"), _ops("sqrt"), _ops("sub")


@dataclass(frozen=True, kw_only=True)
class NormFacts:
    """A norm and the size of the dimension it acts on."""

    norm: Norm
    size: int
    weight_dims: int


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """x → w · x / rms(x), or w · (x − mean) / std + b, over the last dimension."""

    name: str = "norm"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target in RMS | LAYER:
            return self._fused(node, graph)
        nodes, bias, weight, offset = [node], None, None, 0.0
        walk = node
        if (split := _closed_vector(walk, ADD, graph)) is not None:
            bias, walk = split
            walk = graph.peel(walk, CAST)[-1]
        if (split := _closed_vector(walk, MUL, graph)) is not None:
            weight, walk = split
            weight, offset = _offset(weight, graph)
            walk = graph.peel(walk, CAST)[-1]
        core = self._normalise(walk, graph)
        if core is None:
            return ABSENT
        kind, eps, x = core
        return self._found(kind, eps, weight, bias, offset, x, (*nodes, walk), graph)

    def _fused(self, node: fx.Node, graph: CapturedGraph) -> Result:
        x, dims = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(dims, list | tuple) or len(dims) != 1:
            return Refused("a norm over several dimensions", node)
        rms = node.target in RMS
        bias = None if rms else argument(node, 3, "bias")
        eps = argument(node, 3, "eps") if rms else argument(node, 4, "eps", 1e-5)
        if eps is None:
            eps = 1.1920928955078125e-07
        weight, offset = _offset(argument(node, 2, "weight"), graph)
        return self._found("rms" if rms else "layer", float(eps), weight, bias, offset, x, (node,), graph)

    def _found(
        self,
        kind: str,
        eps: float,
        weight: Any,
        bias: Any,
        offset: float,
        x: fx.Node,
        nodes: tuple,
        graph: CapturedGraph,
    ) -> Result:
        dims = shape(x)
        assert dims is not None
        refs = []
        for value in (weight, bias):
            name = _parameter(value, graph)
            if value is not None and name is None:
                return Refused("a norm whose weight is computed", nodes[0])
            refs.append(None if name is None else WeightRef(name=name))
        weight_dims = 1 if weight is None else len(shape(graph.peel_closed(weight)) or ())
        norm = Norm(kind=kind, eps=eps, weight=refs[0], bias=refs[1], offset=offset)
        return Found(facts={"norm": NormFacts(norm=norm, size=dims[-1], weight_dims=weight_dims)}, nodes=nodes, next=x)

    def _normalise(self, node: fx.Node, graph: CapturedGraph) -> tuple[str, float, fx.Node] | None:
        """("rms" or "layer", eps, x) when `node` is x · rsqrt(mean(x²) + eps) or the same with x / sqrt(…)."""
        if node.target not in MUL | DIV:
            return None
        sides = [node.args[:2], node.args[1::-1]] if node.target in MUL else [node.args[:2]]
        for x, inverse in sides:
            if not (isinstance(x, fx.Node) and isinstance(inverse, fx.Node)):
                continue
            root = graph.peel(inverse, CAST)[-1]
            eps, square = self._mean_square(root, node.target in DIV, graph)
            if square is None:
                continue
            x = graph.peel(x, CAST)[-1]
            if graph.peel(square, CAST)[-1] is not x:
                continue
            centred = self._centred(x, graph)
            return ("layer", eps, centred) if centred is not None else ("rms", eps, x)
        return None

    @staticmethod
    def _mean_square(root: fx.Node, divides: bool, graph: CapturedGraph) -> tuple[float, fx.Node | None]:
        wanted = SQRT if divides else RSQRT
        if root.target in POW and graph.constant(root.args[1]) == (0.5 if divides else -0.5):
            pass
        elif root.target not in wanted:
            return 0.0, None
        walk, eps = graph.peel(root.all_input_nodes[0], CAST)[-1], 0.0
        if walk.target in ADD:
            constant = graph.constant(walk.args[1])
            if constant is None:
                return 0.0, None
            eps, walk = constant, graph.peel(walk.all_input_nodes[0], CAST)[-1]
        if walk.target not in MEAN or list(argument(walk, 1, "dim") or []) not in ([-1], [_last(walk)]):
            return 0.0, None
        square = graph.peel(walk.all_input_nodes[0], CAST)[-1]
        if square.target in POW and (len(square.args) == 1 or graph.constant(square.args[1]) == 2.0):
            return eps, square.all_input_nodes[0]
        if square.target in MUL and len(square.all_input_nodes) == 1:
            return eps, square.all_input_nodes[0]
        return 0.0, None

    @staticmethod
    def _centred(node: fx.Node, graph: CapturedGraph) -> fx.Node | None:
        """x when `node` is x − mean(x)."""
        if node.target not in SUB or len(node.all_input_nodes) != 2:
            return None
        x, mean = node.all_input_nodes
        return x if mean.target in MEAN and mean.all_input_nodes[0] is x else None


def _last(mean: fx.Node) -> int:
    dims = shape(mean.all_input_nodes[0])
    return -1 if dims is None else len(dims) - 1


def _closed_vector(node: fx.Node, ops: frozenset, graph: CapturedGraph) -> tuple[fx.Node, fx.Node] | None:
    """(closed, open) operands of a binary operation with one vector of weights."""
    if node.target not in ops or len(node.all_input_nodes) != 2:
        return None
    for closed, opened in (node.all_input_nodes, node.all_input_nodes[::-1]):
        if not graph.is_open(closed) and graph.is_open(opened):
            dims, wide = shape(closed), shape(opened)
            if dims and wide and dims[-1] == wide[-1] and _weighted(closed, graph):
                return closed, opened
    return None


def _weighted(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a closed value comes from a single weight (and not, say, from positions)."""
    weight, _ = _offset(node, graph)
    return _parameter(weight, graph) is not None


def _offset(weight: Any, graph: CapturedGraph) -> tuple[Any, float]:
    """Take apart w + constant."""
    if isinstance(weight, fx.Node):
        inner = graph.peel_closed(weight)
        if inner.target in ADD and len(inner.all_input_nodes) == 1:
            for x, c in (inner.args[:2], inner.args[1::-1]):
                constant = graph.constant(c)
                if constant is not None and isinstance(x, fx.Node):
                    return x, constant
    return weight, 0.0


def _parameter(value: Any, graph: CapturedGraph) -> str | None:
    if not isinstance(value, fx.Node):
        return None
    return graph.weights.get(graph.peel_closed(value).name)
