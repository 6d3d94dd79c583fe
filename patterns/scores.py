"""Small steps on the scores: a constant scale, a softcap, a mask. Each is tried at one node, walking backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fla_swap.arguments import HIDDEN
from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.core import FILL, MaskTerm
from fla_swap.patterns.graph import CAST, CapturedGraph, _ops, argument, op_name
from fla_swap.patterns.reach import before_product, is_product, made_of_map
from fla_swap.patterns.steps import ADD, DIV, MUL, SUB

TANH = _ops("tanh")
WHERE = _ops("where")
FULL = _ops("full", "full_like", "new_full")
FLOOR = _ops("max", "maximum", "clamp_min")


def split_factor(node: fx.Node, graph: CapturedGraph) -> tuple[float, fx.Node] | None:
    """(c, x) when `node` is x · c or x / c with a constant c."""
    if node.target in MUL:
        for x, c in (node.args[:2], node.args[1::-1]):
            factor = graph.constant(c)
            if factor is not None and isinstance(x, fx.Node) and graph.is_open(x):
                return factor, x
    if node.target in DIV and argument(node, 2, "rounding_mode") is None:
        x, c = node.args[:2]
        divisor = graph.constant(c)
        if divisor and isinstance(x, fx.Node) and graph.is_open(x):
            return 1.0 / divisor, x
    return None


def learned_factor(node: fx.Node, graph: CapturedGraph) -> Refused | None:
    """The refusal when the factor in x · c or x / c is a parameter, or made of one: a site states a number."""
    closed = [a for a in node.args[:2] if isinstance(a, fx.Node) and not graph.is_open(a)]
    names = [name for c in closed for name in graph.parameters_of(c)]
    return Refused(f"a learned factor of the scores, made of the parameter {names[0]!r}", node) if names else None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A constant factor: scores · c, scores / c, or q · c on the way to the core."""

    name: str = "scale"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        found = split_factor(node, graph)
        if found is None:
            return ABSENT
        if (learned := learned_factor(node, graph)) is not None:
            return learned
        return Found(facts={"scale": found[0]}, nodes=(node,), next=found[1])


@dataclass(frozen=True, kw_only=True)
class Softcap:
    """`c · tanh(scores / c)` (Gemma 2)."""

    name: str = "softcap"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        outer = split_factor(node, graph)
        if outer is None:
            return Refused("a tanh without a factor after it", node) if node.target in TANH else ABSENT
        cap, inner = outer
        inner = graph.peel(inner, CAST)[-1]
        if inner.target not in TANH:
            return ABSENT
        x = graph.peel(inner.all_input_nodes[0], CAST)[-1]
        divided = split_factor(x, graph)
        factor, x_in = divided if divided is not None else (1.0, x)
        nodes = (node, inner) if divided is None else (node, inner, x)
        return Found(facts={"softcap": cap, "scale": factor * cap}, nodes=nodes, next=x_in)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A closed tensor added to the scores, or deciding by `where` or `masked_fill` which of them count."""

    name: str = "mask"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target in ADD:
            return self._added(node, graph)
        if node.target in WHERE and len(node.args) == 3:
            return self._where(node, graph)
        if node.target in FILL:
            return self._filled(node, graph)
        if node.target in MUL:
            return self._multiplied(node, graph)
        if node.target in SUB:
            return self._subtracted(node, graph)
        return ABSENT

    def _subtracted(self, node: fx.Node, graph: CapturedGraph) -> Result:
        scores, closed = node.args[:2]
        if not isinstance(closed, fx.Node) or graph.is_open(closed) or not graph.is_open(scores):
            return ABSENT
        if float(argument(node, 2, "alpha", 1)) != 1.0 or not isinstance(scores, fx.Node):
            return Refused("a mask subtracted with a factor (alpha)", node)
        term = MaskTerm(kind="add", node=closed, factor=-1.0)
        return Found(facts={"mask": [term]}, nodes=(node,), next=scores)

    def _multiplied(self, node: fx.Node, graph: CapturedGraph) -> Result:
        closed = [n for n in node.all_input_nodes if not graph.is_open(n)]
        if len(closed) != 1 or len(graph.open_inputs(node)) != 1:
            return ABSENT
        term = MaskTerm(kind="times", node=closed[0])
        return Found(facts={"mask": [term]}, nodes=(node,), next=graph.open_inputs(node)[0])

    def _added(self, node: fx.Node, graph: CapturedGraph) -> Result:
        inputs = node.all_input_nodes
        opened = [n for n in inputs if graph.is_open(n)]
        closed = [n for n in inputs if not graph.is_open(n)]
        if float(argument(node, 2, "alpha", 1)) != 1.0:
            return Refused("a mask added with a factor (alpha)", node)
        if len(opened) == 1 and len(closed) == 1:
            return Found(facts={"mask": [MaskTerm(kind="add", node=closed[0])]}, nodes=(node,), next=opened[0])
        if len(opened) == 2:
            return Refused(_why_open(opened, graph), node)
        if len(opened) == 1 and graph.constant(next(a for a in node.args[:2] if a is not opened[0])) == 0:
            return Found(nodes=(node,), next=opened[0])
        return ABSENT

    def _where(self, node: fx.Node, graph: CapturedGraph) -> Result:
        keep, scores, fill = node.args
        kind = "keep"
        if _fill(scores, graph) is not None:
            scores, fill, kind = fill, scores, "drop"
        if graph.is_open(keep):
            return Refused("the mask depends on the values that the model reads", node)
        return self._closed(node, keep, scores, _fill(fill, graph), kind)

    def _filled(self, node: fx.Node, graph: CapturedGraph) -> Result:
        scores, drop, fill = node.args
        if graph.is_open(drop):
            return Refused("the mask depends on the values that the model reads", node)
        return self._closed(node, drop, scores, graph.constant(fill), "drop")

    @staticmethod
    def _closed(node: fx.Node, mask: Any, scores: Any, fill: float | None, kind: str) -> Result:
        if fill is None or fill > HIDDEN or not isinstance(scores, fx.Node):
            return Refused(f"masked scores are set to {fill}, which does not hide them", node)
        return Found(facts={"mask": [MaskTerm(kind=kind, node=mask)]}, nodes=(node,), next=scores)


def _why_open(terms: list[fx.Node], graph: CapturedGraph) -> str:
    """What two open tensors are whose sum goes into the softmax."""
    if all(is_product(t, graph) or before_product(t, graph) for t in terms):
        return "the scores are a sum of several products (relative positions)"
    if all(is_product(t, graph) or before_product(t, graph) or made_of_map(t, graph) for t in terms):
        return "the hidden states times stored weights are added to the scores (relative positions, n-gram streams)"
    return "what is added to the scores depends on the values that the model reads"


def _fill(value: Any, graph: CapturedGraph) -> float | None:
    """`value` as a number: a constant, or a tensor filled with one."""
    if isinstance(value, fx.Node) and value.target in FULL and not graph.is_open(value):
        position = {"full": 1, "full_like": 1, "new_full": 2}[op_name(value).split(".")[0]]
        return graph.constant(argument(value, position, "fill_value"))
    return graph.constant(value)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """`max(scores, the smallest number)`, which keeps masked scores finite and changes no other."""

    name: str = "floor"
    slot: str = "scores"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in FLOOR or len(node.args) != 2:
            return ABSENT
        floor, x = graph.constant(node.args[1]), node.args[0]
        if floor is None or not isinstance(x, fx.Node):
            return ABSENT
        if floor > HIDDEN:
            return Refused(f"scores are kept above {floor}", node)
        return Found(nodes=(node,), next=x)
