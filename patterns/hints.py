"""Numbers behind a closed tensor at which it may change: windows, chunks, clamps and the sizes of stored tables.

A captured graph says what a mask or a rotary table is at its own length. The numbers in its code say up to where it has
to be looked at.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fla_swap.patterns.graph import (
    CAST,
    CONTRACTION,
    LAYOUT,
    CapturedGraph,
    _is_mutable,
    _ops,
    alias_root,
)

SMALL = 64
_COMPARED = 2**23
_LARGEST = 2**31
_FILL = _ops(
    *("masked_fill", "masked_fill_", "where", "fill", "fill_", "mul", "mul_", "constant_pad_nd", "new_full"),
    *("add", "add_", "scaled_dot_product_attention"),
)
_MADE = _ops("full", "full_like", "scalar_tensor")
_QUOTIENT = _ops("div", "div_", "floor_divide", "remainder", "fmod", "mul", "mul_")
_SHIFT = _ops("__rshift__", "__lshift__", "bitwise_right_shift", "bitwise_left_shift")
_ROOT, _POWER = _ops("sqrt", "sqrt_"), _ops("pow", "pow_", "square", "square_")
_KEPT = CAST | LAYOUT | _ops("triu", "triu_", "tril", "tril_")
_HIDES = 1e4


def cone(nodes: Iterable[fx.Node], graph: CapturedGraph) -> list[fx.Node]:
    """The nodes and everything closed that they are computed from, the bodies of functions (FlexAttention's) too."""
    seen: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        stack.extend(node.all_input_nodes)
        body = getattr(graph.module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            seen |= dict.fromkeys(body.graph.nodes)
            others = (n for user in node.users for group in user.args[7:9] for n in group)  # type: ignore[union-attr]
            stack.extend(n for n in others if isinstance(n, fx.Node) and not graph.is_open(n))
    return list(seen)


def before_projections(nodes: Iterable[fx.Node], graph: CapturedGraph) -> list[fx.Node]:
    """The nodes and what they are computed from, back to the products with weights (q, k and v: to their projections).

    What is closed is followed to its start.
    """
    seen: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen and not (graph.is_open(node) and node.target in CONTRACTION):
            seen[node] = None
            stack.extend(node.all_input_nodes)
    return list(seen)


def thresholds(nodes: Iterable[fx.Node], graph: CapturedGraph, above: int) -> set[int]:
    """Whole numbers above `above` at which what the nodes compute may change.

    They are the constants of the code (whole or not, positional or by keyword), the elements of stored tensors of up to
    64, and what these come to: 2ⁿ for a shift by n, quotient times bound for a division, roots and squares. Numbers
    that fill a mask are none.
    """
    found: set[float] = set()
    steps: set[float] = set()
    members = list(nodes)
    inside = set(members)
    for node in members:
        numbers = _numbers(node, inside, graph)
        found |= numbers
        if node.target in _QUOTIENT:
            steps |= {n if n >= 1 else 1 / n for n in numbers if n}
        if node.target in _SHIFT:
            steps |= {2.0**n for n in numbers if n < 31}
    found |= steps | {a * b for a, b in itertools.product(steps, found)}
    targets = {node.target for node in members}
    if targets & _POWER:
        found |= {math.sqrt(n) for n in found}
    if targets & _ROOT:
        found |= {n * n for n in found if n < 2**16}
    return {math.ceil(n) for n in found if above < n < _LARGEST}


def table_sizes(nodes: Iterable[fx.Node], graph: CapturedGraph, above: int) -> set[int]:
    """Dimensions above `above` of the stored tensors among the nodes: a model takes no more tokens than its tables."""
    values = [_stored(node, graph) for node in nodes]
    return {d for v in values if v is not None for d in v.shape if d > above}


def _stored(node: fx.Node, graph: CapturedGraph) -> Tensor | None:
    value = graph.values.get(node.name) if node.op == "placeholder" else None
    if node.op == "get_attr":
        value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _numbers(node: fx.Node, inside: set[fx.Node], graph: CapturedGraph) -> set[float]:
    stored = _stored(node, graph)
    if stored is not None:
        plain = type(stored) in (Tensor, torch.nn.Buffer) and not stored.is_meta and 0 < stored.numel() <= SMALL
        values = stored.detach().flatten().tolist() if plain and not stored.is_complex() else []
        fills = _only_fills(node, inside)
    else:
        values = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float)]
        fills = node.target in _FILL or (node.target in _MADE and _only_fills(node, inside))
    sizes = {abs(float(v)) for v in values if not isinstance(v, bool) and math.isfinite(v)}
    return {n for n in sizes if not (fills and n >= _HIDES)}


def _only_fills(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the value is written into masks, or is one, and decides nothing."""
    users = [u for u in node.users if u in inside]
    return all(u.target in _FILL or (u.target in _KEPT and _only_fills(u, inside)) for u in users)


def repeats(graph: CapturedGraph) -> bool:
    """Whether one line of the model's code was run about as often as there are tokens: a loop over them, unrolled.

    Each call of a module counts by itself: a stack of layers that is run again and again loops over no tokens. Nor does
    what only moves data.
    """
    lines = Counter(
        (n.target, n.meta.get("stack_trace"), *n.meta.get("nn_module_stack", {}))
        for n in graph.nodes
        if n.op == "call_function" and n.target not in LAYOUT
    )
    return max(lines.values(), default=0) >= graph.length - 1


def spelled(graph: CapturedGraph) -> dict[fx.Node, int]:
    """A number for each closed node, equal where two compute the same of the same values.

    Nothing for what is written to, drawn at random, or made of a weight.
    """
    if "spelled" not in graph.known:
        graph.known["spelled"] = _spell(graph)
    return graph.known["spelled"]


def _spell(graph: CapturedGraph) -> dict[fx.Node, int]:
    numbers: dict[fx.Node, int] = {}
    known: dict[Any, int] = {}
    written = {alias_root(n) for n in graph.nodes if n.op == "call_function" and _is_mutable(n)}
    for node in graph.nodes:
        if graph.is_open(node) or node in written:
            continue
        if node.op == "placeholder":
            key = _content(node, graph)
        elif node.op == "call_function" and all(n in numbers for n in node.all_input_nodes):
            if _is_mutable(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            operands = map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
            key = (str(node.target), str(operands))
        else:
            continue
        if key is not None:
            numbers[node] = known.setdefault(key, len(known))
    return numbers


def _content(node: fx.Node, graph: CapturedGraph) -> Any:
    """The value of a placeholder as something to compare; None for a weight."""
    value = graph.values.get(node.name)
    if not isinstance(value, Tensor):
        return node.name
    plain = type(value) in (Tensor, torch.nn.Buffer) and not value.is_meta and value.numel() <= _COMPARED
    if not plain:
        return None
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tuple(value.shape), str(value.dtype), hashlib.sha256(flat).hexdigest()
