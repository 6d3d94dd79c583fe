"""Why a path from the core back to its projection stops, by the name of what stands there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fla_swap.patterns.adapters import match_linear
from fla_swap.patterns.base import Found
from fla_swap.patterns.graph import CapturedGraph, _ops, argument, op_name, shape
from fla_swap.patterns.steps import ADD

ROUTED = _ops("index_add", "index_add_", "scatter_add", "scatter_add_", "index_copy", "index_copy_", "_grouped_mm")
CONVOLUTION = _ops("conv1d", "conv2d", "convolution")
CAT = _ops("cat", "concat")
_REACH = 32


def name_stop(node: fx.Node, graph: CapturedGraph) -> str:
    """What `node`, which no recogniser walks past, does to the queries, keys or values of an attention."""
    if node.op == "placeholder":
        return f"the model is given them (its input {node.name!r}): no projection of its own makes them"
    inputs = graph.open_inputs(node)
    near = _before(node, graph)
    if any(n.target in ROUTED for n in near):
        return "each token is projected by experts that a router chooses (mixture-of-experts attention)"
    convolution = next((n for n in near if n.target in CONVOLUTION), None)
    if convolution is not None:
        return _convolution(convolution)
    if node.target in CAT and _joins_tokens(node, inputs, graph):
        return "tokens are parted, pass through different steps and are joined again (a rotation of some tokens only?)"
    where = "between the projection and the core"
    if len(inputs) > 1 and node.target in CAT:
        return f"{op_name(node)} of {len(inputs)} tensors {where}"
    if len(inputs) > 1 and not _of_one(inputs, graph):
        what = " (a value residual or embedding?)" if node.target in ADD else ""
        return f"{op_name(node)} mixes {len(inputs)} tensors {where}{what}: a site has one projection there"
    return f"{op_name(node)} {where} is not understood"


def _before(node: fx.Node, graph: CapturedGraph) -> list[fx.Node]:
    """`node` and what it is made of since the last projections, nearest first."""
    found: list[fx.Node] = []
    waiting = [node]
    while waiting and len(found) < _REACH:
        step = waiting.pop(0)
        if step not in found and not isinstance(match_linear(step, graph), Found):
            found.append(step)
            waiting += graph.open_inputs(step)
    return found


def _convolution(node: fx.Node) -> str:
    sizes, groups = (shape(node.args[1]) or ())[2:], argument(node, 8 if len(node.args) > 7 else 6, "groups", 1)
    if any(size != 1 for size in sizes):
        over = "×".join(str(size) for size in sizes)
        return f"a convolution over {over} tokens stands before the core: a site's projections act on each token alone"
    grouped = f" in {groups} groups" if groups != 1 else ""
    return f"q, k and v are made by a convolution of size 1{grouped}, where a site states one matrix for each"


def _joins_tokens(node: fx.Node, inputs: Sequence[fx.Node], graph: CapturedGraph) -> bool:
    """Whether a concatenation is along the tokens, of parts that come from one tensor."""
    dims, dim = shape(node) or (), argument(node, 1, "dim", 0)
    return len(inputs) > 1 and bool(dims) and dims[dim] == graph.length and graph.join(node)[0] is not None


def _of_one(inputs: Sequence[fx.Node], graph: CapturedGraph) -> bool:
    """Whether one of the inputs is computed from another, after its projection (x and the size of x)."""
    for start in inputs:
        seen: set[fx.Node] = set()
        stack = [start]
        while stack and len(seen) < _REACH:
            node = stack.pop()
            if node in seen or isinstance(match_linear(node, graph), Found):
                continue
            seen.add(node)
            stack += graph.open_inputs(node)
        if seen.intersection(i for i in inputs if i is not start):
            return True
    return False
