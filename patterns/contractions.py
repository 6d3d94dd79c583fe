"""Contractions in one spelling: einsum, matmul by a stack of stored matrices, 1x1 convolutions become plain products.

The new nodes compute the same function at the graph's own shapes; the recognisers then see one kind of product.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fla_swap.patterns.graph import _ops, argument, aten, shape

CONV = _ops("conv1d", "conv2d")
EINSUM, MATMUL, EXPAND = _ops("einsum"), _ops("matmul"), _ops("expand")

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def expand_contractions(module: fx.GraphModule, stored: Collection[str]) -> None:
    """Rewrite, in place, einsums, products with [heads, in, out] of stored matrices, and convolutions of one token.

    `stored` names the placeholders of weights. An einsum that repeats a letter in an operand, or sums a letter that
    stands in one operand only, stays.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in EINSUM | MATMUL | CONV:
            continue
        writer = _Writer(module.graph, node)
        with module.graph.inserting_before(node):
            rewrite = _einsum if node.target in EINSUM else _stack if node.target in MATMUL else _convolution
            result = rewrite(writer, node, stored)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)


def _einsum(writer: _Writer, node: fx.Node, stored: Collection[str]) -> fx.Node | None:
    operands: Any = node.args[1]
    spec = _Spec.read(str(node.args[0]), [len(shape(n) or ()) for n in operands])
    while spec is not None and len(operands) > 2:
        # From the left, two at a time; letters that nothing later asks for are summed.
        asked = set(spec.output).union(*spec.inputs[2:])
        kept = "".join(dict.fromkeys(c for c in "".join(spec.inputs[:2]) if c in asked))
        first = _binary(writer, _Spec(inputs=spec.inputs[:2], output=kept), *operands[:2])
        spec = None if first is None else _Spec(inputs=(kept, *spec.inputs[2:]), output=spec.output)
        operands = [first, *operands[2:]]
    if spec is None:
        return None
    if len(operands) == 1:
        return _unary(writer, spec, operands[0])
    if _is_stored(operands[0], stored) and not _is_stored(operands[1], stored):
        spec, operands = _Spec(inputs=spec.inputs[::-1], output=spec.output), operands[::-1]
    return _binary(writer, spec, *operands)


def _stack(writer: _Writer, node: fx.Node, stored: Collection[str]) -> fx.Node | None:
    """x [..., 1, T, in] @ W [heads, in, out]: one linear map whose outputs are heads."""
    x, w = node.args[:2]
    inner, outer = shape(x), shape(w)
    if outer is None or inner is None or len(outer) < 3 or len(inner) < 2 or not _is_stored(w, stored):
        return None
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    if x.target in EXPAND:
        before = x.all_input_nodes[0]
        x, inner = (before, shape(before) or ()) if len(shape(before) or ()) == len(inner) else (x, inner)
    rank = max(len(inner), len(outer))
    inner, outer = (1,) * (rank - len(inner)) + tuple(inner), (1,) * (rank - len(outer)) + outer
    lead = _LETTERS[: rank - 2]
    heads = [c for c, size in zip(lead, outer, strict=False) if size > 1]
    others = [c for c, size in zip(lead, inner, strict=False) if size > 1]
    if not heads or set(heads) & set(others):
        return None
    spec = _Spec(inputs=("".join(others) + "XY", "".join(heads) + "YZ"), output="".join(sorted(heads + others)) + "XZ")
    x = writer.reshape(x, [*(d for d in inner[:-2] if d > 1), *inner[-2:]])
    w = writer.reshape(w, [*(d for d in outer[:-2] if d > 1), *outer[-2:]])
    out = _binary(writer, spec, x, w)
    return None if out is None else writer.reshape(out, shape(node) or ())


def _convolution(writer: _Writer, node: fx.Node, stored: Collection[str]) -> fx.Node | None:
    """A convolution [B, C, …] with kernels of one place: a linear map of the channels."""
    x, weight = node.args[:2]
    bias, stride, padding = argument(node, 2, "bias"), argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    groups = argument(node, 6, "groups", 1)
    dims, kernel = shape(x), shape(weight)
    plain = all(n == 1 for n in _many(stride)) and all(n == 0 for n in _many(padding)) and groups == 1
    if not plain or dims is None or kernel is None or any(k != 1 for k in kernel[2:]) or len(dims) != len(kernel):
        return None
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    flat = writer.reshape(x, [*dims[:2], prod(dims[2:])])
    out = writer.call(aten.linear.default, writer.permute(flat, "bcn", "bnc"), writer.reshape(weight, kernel[:2]), bias)
    return writer.reshape(writer.permute(out, "bno", "bon"), [dims[0], kernel[0], *dims[2:]])


def _many(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_stored(node: Any, stored: Collection[str]) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.name in stored


@dataclass(frozen=True, kw_only=True)
class _Spec:
    inputs: tuple[str, ...]
    output: str

    @staticmethod
    def read(equation: str, ranks: Sequence[int]) -> _Spec | None:
        """The letters of each operand, an ellipsis written out; None for what is not rewritten."""
        equation = equation.replace(" ", "")
        sides, arrow, output = equation.partition("->")
        terms = sides.split(",")
        if len(terms) != len(ranks):
            return None
        dots = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks, strict=True)]
        free = [c for c in _LETTERS if c not in equation][: max(dots)]
        written = [t.replace("...", "".join(free[len(free) - d :])) for t, d in zip(terms, dots, strict=True)]
        if arrow:
            output = output.replace("...", "".join(free))
        else:
            once = sorted(c for c in set(sides) - set("...,") if sides.count(c) == 1)
            output = "".join(free) + "".join(once)
        if any(len(set(t)) != len(t) for t in (*written, output)):
            return None
        return _Spec(inputs=tuple(written), output=output)


@dataclass(frozen=True, kw_only=True)
class _Operand:
    node: Any
    letters: str


class _Writer:
    """Inserts calls that carry the meta data of the node they replace."""

    def __init__(self, graph: fx.Graph, replaced: fx.Node):
        self.graph, self.replaced = graph, replaced

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in self.replaced.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
        return node

    def permute(self, node: fx.Node, letters: str, wanted: str) -> fx.Node:
        if letters == wanted:
            return node
        return self.call(aten.permute.default, node, [letters.index(c) for c in wanted])

    def reshape(self, node: fx.Node, dims: Sequence[int]) -> fx.Node:
        if tuple(node.meta["val"].shape) == tuple(dims):
            return node
        return self.call(aten.reshape.default, node, list(dims))


def _unary(writer: _Writer, spec: _Spec, x: fx.Node) -> fx.Node | None:
    (letters,) = spec.inputs
    return writer.permute(x, letters, spec.output) if set(letters) == set(spec.output) else None


def _binary(writer: _Writer, spec: _Spec, left: fx.Node, right: fx.Node) -> fx.Node | None:
    a, b = spec.inputs
    sizes = _sizes(spec, left, right)
    summed = [c for c in a if c in b and c not in spec.output]
    only = [c for c in a + b if (c in a) != (c in b)]
    if not summed or any(c not in spec.output for c in only) or sizes is None:
        return None
    batch = "".join(c for c in spec.output if c in a and c in b)
    rows, columns = ("".join(c for c in spec.output if c in s and c not in batch) for s in (a, b))
    inner = "".join(summed)
    dims = {name: [sizes[c] for c in name] for name in (batch, rows, columns, inner)}
    x = writer.permute(left, a, batch + rows + inner)
    y = writer.permute(right, b, batch + inner + columns)
    # Without shared batch letters the left operand keeps its own dimensions, as the input of a linear map does.
    kept = dims[rows] if rows and not batch else [prod(dims[rows])]
    x = writer.reshape(x, [*dims[batch], *kept, prod(dims[inner])])
    y = writer.reshape(y, [*dims[batch], prod(dims[inner]), prod(dims[columns])])
    out = writer.call(aten.matmul.default, x, y)
    out = writer.reshape(out, [*dims[batch], *dims[rows], *dims[columns]])
    return writer.permute(out, batch + rows + columns, spec.output)


def _sizes(spec: _Spec, left: fx.Node, right: fx.Node) -> dict[str, int] | None:
    """The size of each letter; None where one is broadcast, or depends on the data."""
    sizes: dict[str, int] = {}
    for letters, node in zip(spec.inputs, (left, right), strict=True):
        for letter, size in zip(letters, node.meta["val"].shape, strict=True):
            if not isinstance(size, int) or sizes.setdefault(letter, size) != size:
                return None
    return sizes
