"""Weights that are no softmax: exp without a sum that divides it, a sigmoid, a relu, between two products of data."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from fla_swap.patterns.base import ABSENT, Refused, Result
from fla_swap.patterns.core import FILL, SDPA
from fla_swap.patterns.graph import CAST, DROPOUT, LAYOUT, CapturedGraph, _ops, op_name, shape
from fla_swap.patterns.normalise import find_softmax
from fla_swap.patterns.reach import products_before, sums_values
from fla_swap.patterns.steps import ADD, DIV, MUL, SUB

EXP = _ops("exp", "exp_", "exp2", "exp2_")
KEEPS_SCORES = (
    LAYOUT | CAST | DROPOUT | ADD | SUB | MUL | DIV | FILL | _ops("neg", "neg_", "where", "nan_to_num", "rsub")
)
UNTAGGED = _ops("hardswish", "hardswish_", "log_sigmoid", "special_expit", "special_exp2", "special_log_softmax")


@dataclass(frozen=True, kw_only=True)
class UnnormalisedCore:
    """`f(scores) @ v` with an elementwise f in a softmax's place: seen, never a site."""

    name: str = "unnormalised"
    slot: str = "core"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if not _acts_on_each(node, graph) or not _may_be_scores(node, graph) or _is_softmax(node, graph):
            return ABSENT

        def ends(walk: fx.Node) -> bool:
            return _is_softmax(walk, graph) or _acts_on_each(walk, graph)

        if not any(_size(node) == _size(product) for product in products_before(node, graph, ends)):
            return ABSENT
        if not sums_values(node, graph, lambda n: _is_softmax(n, graph)):
            return ABSENT
        name = op_name(node).split(".")[0].rstrip("_")
        if node.target in EXP:
            reason = f"the weights are {name} of the scores without the sum that makes them a softmax before the values"
            return Refused(f"{reason}: not normalised, or normalised otherwise", node)
        return Refused(f"the weights are {name} of the scores, not their softmax", node)


def _acts_on_each(node: fx.Node, graph: CapturedGraph) -> bool:
    """A function of each entry of one tensor of data that is more than a scale, a sum or a mask."""
    if node.op != "call_function" or node.target in KEEPS_SCORES or len(graph.open_inputs(node)) != 1:
        return False
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or not val.is_floating_point():
        return False
    return node.target in UNTAGGED or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _may_be_scores(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether two of its dimensions count tokens: the last two are equal, or two are lengths of the model's inputs."""
    dims, lengths = tuple(shape(node) or ()), _lengths(graph)
    known = [isinstance(d, int) for d in dims]  # a size that depends on the data counts no tokens
    square = all(known[-2:]) and dims[-1:] == dims[-2:-1]
    return square or sum(k and d in lengths for k, d in zip(known, dims, strict=True)) > 1


def _lengths(graph: CapturedGraph) -> set[int]:
    if "lengths" not in graph.known:
        read = [tuple(shape(n) or ()) for n in graph.nodes if n.op == "placeholder" and n.name in graph.data]
        graph.known["lengths"] = {graph.length, *(d[1] for d in read if len(d) in (2, 3) and d[1] > graph.batch)}
    return graph.known["lengths"]


def _is_softmax(node: fx.Node, graph: CapturedGraph) -> bool:
    return node.target in SDPA or "softmax" in op_name(node) or find_softmax(node, graph) is not None


def _size(node: fx.Node) -> tuple[int, tuple[str, ...]]:
    """How many entries: the known sizes multiplied, and the names of those that depend on the data."""
    dims = shape(node) or (0,)
    return prod(d for d in dims if isinstance(d, int)), tuple(sorted(str(d) for d in dims if not isinstance(d, int)))
