"""Exact rewrites of a compiled piece that sees few tokens: a decode step.

At a few tokens a model's time is that of reading its weights and of starting kernels. In the piece's ATen graph, linear
maps of one input become one operator (`few_linears`), which takes an RMS norm in front, a gated product or a residual
behind along; attention of one query becomes one that splits the keys (`attend_one`). What is not recognised stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from fla_swap.kernels.fused.attend_one import MAX_WIDTH, attend_one
from fla_swap.kernels.fused.matvec import MAX_MATRICES, MAX_TOKENS, few_linears, fits

aten = torch.ops.aten
Node: TypeAlias = Any
"""An `fx.Node`: what its arguments are, no type says."""


@dataclass(frozen=True)
class Norm:
    """x / rms(x) · (weight + offset)."""

    x: Node
    weight: Node
    offset: float
    eps: float


def rewrite(graph: fx.Graph) -> int:
    """Rewrite a graph of ATen operators in place; returns how many operators were put in."""
    for node in list(graph.nodes):
        _drop_identity(node)
    made, written = 0, _written(graph)
    for x, linears in _by_input(graph).items():
        if not written & {_storage(n) for n in (x, *(a for n in linears for a in n.all_input_nodes))}:
            made += _merge(graph, linears)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        made += _add_residual(graph, node) + _attend(graph, node)
    graph.eliminate_dead_code()
    return made


def few(tensors: Sequence[Tensor]) -> bool:
    """Whether a piece with these inputs may hold a step of few tokens: hidden states [B, T, D] of at most 16."""
    hidden = [t.shape for t in tensors if t.dim() == 3 and t.dtype in (torch.bfloat16, torch.float16)]
    static = all(isinstance(size, int) for t in tensors for size in t.shape)
    return static and any(shape[0] * shape[1] <= MAX_TOKENS for shape in hidden)


def val(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def _storage(node: Node) -> StorageWeakRef:
    return StorageWeakRef(val(node).untyped_storage())


def _written(graph: fx.Graph) -> set[StorageWeakRef]:
    """What operators of the graph write in place: such values are not read anywhere else than where they were."""
    found = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found |= {
                    _storage(n) for n in (given if isinstance(given, (list, tuple)) else [given]) if n is not None
                }
    return found


def _calls(node: Any, *targets: Any) -> Any:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _drop_identity(node: Node) -> None:
    """Dropout that drops nothing, conversions that convert nothing."""
    source: Any = None
    idle = _calls(node, aten.dropout.default) and (node.args[1] == 0 or not node.args[2])
    if idle or _calls(node, aten.alias.default):
        source = node.args[0]
    elif _calls(node, aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default):
        before, after = val(node.args[0]), val(node)
        alike = isinstance(before, Tensor) and before.dtype == after.dtype and before.device == after.device
        source = (
            node.args[0] if alike and not node.kwargs.get("copy") and node.target != aten._to_copy.default else None
        )
    if source is not None:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _by_input(graph: fx.Graph) -> dict[Node, list[Node]]:
    """The linear maps of few tokens by weights that are the graph's inputs, by what they read."""
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if _calls(node, aten.linear.default) and _is_few(node):
            found.setdefault(node.args[0], []).append(node)
    return found


def _is_few(node: Node) -> bool:
    x, weight = val(node.args[0]), val(node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    static = all(isinstance(size, int) for size in x.shape)
    if not static or not fits(math.prod(x.shape[:-1]), x.shape[-1], x.dtype):
        return False
    plain = type(weight) is torch._subclasses.FakeTensor and weight.is_contiguous() and weight.dtype == x.dtype
    return plain and _is_input(node.args[1]) and (bias is None or _is_input(bias))


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _merge(graph: fx.Graph, linears: list[Node]) -> int:
    x = linears[0].args[0]
    norm = match_norm(x)
    made = 0
    for pair, kind in _pairs(linears):
        gate, up, product = pair
        with graph.inserting_before(product):
            merged = _put(graph, x, norm, [gate, up], val(product), activation=kind)
        product.replace_all_uses_with(merged)
        linears = [n for n in linears if n not in (gate, up)]
        made += 1
    for start in range(0, len(linears), MAX_MATRICES):
        some = linears[start : start + MAX_MATRICES]
        width = sum(val(n).shape[-1] for n in some)
        like = val(some[0])
        with graph.inserting_before(some[0]):
            merged = _put(graph, x, norm, some, like.new_empty((*like.shape[:-1], width)))
            first = 0
            for node in some if len(some) > 1 else ():
                size = val(node).shape[-1]
                part = graph.call_function(aten.slice.Tensor, (merged, -1, first, first + size))
                if math.prod(like.shape[:-1]) > 1:
                    part = graph.call_function(aten.contiguous.default, (part,))
                part.meta["val"] = val(node)
                node.replace_all_uses_with(part)
                first += size
        if len(some) == 1:
            some[0].replace_all_uses_with(merged)
        made += 1
    return made


def _put(
    graph: fx.Graph,
    x: Node,
    norm: Norm | None,
    linears: Sequence[Node],
    value: Any,
    activation: str | None = None,
) -> Node:
    weights = [n.args[1] for n in linears]
    biases = [n.args[2] if len(n.args) > 2 else None for n in linears]
    source = x if norm is None else norm.x
    facts = {} if norm is None else {"norm": norm.weight, "norm_offset": norm.offset, "eps": norm.eps}
    node = graph.call_function(_operator, (source, weights, biases), {**facts, "activation": activation})
    node.meta["val"] = value
    return node


def _operator(x: Tensor, weights: Any, biases: Any, **facts: Any) -> Tensor:
    return few_linears(x, weights, biases, **facts)


def _pairs(linears: Sequence[Node]) -> list[tuple[tuple[Node, Node, Node], str]]:
    """(gate, up, act(gate) · up) and the activation, where nothing else reads the first two."""
    found = []
    for gate in linears:
        act = _only_user(gate)
        kind = _activation(act)
        product = _only_user(act) if act is not None and kind else None
        if product is None or not kind or not _calls(product, aten.mul.Tensor):
            continue
        up: Node = next((a for a in product.args if a is not act), None)
        if up not in linears or len(up.users) != 1 or any(_bias(n) is not None for n in (gate, up)):
            continue
        if val(gate).shape == val(up).shape:
            found.append(((gate, up, product), kind))
    return found


def _activation(node: Node | None) -> str | None:
    if _calls(node, aten.silu.default):
        return "silu"
    if node is not None and _calls(node, aten.gelu.default) and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return None


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _add_residual(graph: fx.Graph, node: Node) -> int:
    """x + few_linears(…) → few_linears(…, residual=x)."""
    if not _calls(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return 0
    for mine, other in (node.args[:2], node.args[1::-1]):
        if not (_calls(mine, _operator) and isinstance(other, fx.Node)) or len(mine.users) != 1:
            continue
        if mine.kwargs.get("residual") is not None or val(other).shape != val(mine).shape:
            continue
        if val(other).dtype != val(mine).dtype:
            continue
        with graph.inserting_before(node):
            merged = graph.call_function(_operator, mine.args, {**mine.kwargs, "residual": other})
        merged.meta["val"] = val(node)
        node.replace_all_uses_with(merged)
        return 1
    return 0


def _attend(graph: fx.Graph, node: Node) -> int:
    """Attention of one query over keys of a fixed number, repeated heads read where they are."""
    if not _calls(node, aten.scaled_dot_product_attention.default) or val(node).device.type == "meta":
        return 0
    q, k, v, mask, dropout, causal = (*node.args, *(None, 0.0, False)[max(len(node.args) - 3, 0) :])[:6]
    shape = val(q).shape
    if len(shape) != 4 or shape[2] != 1 or dropout or causal or not all(isinstance(s, int) for s in val(k).shape):
        return 0
    seen = val(mask)
    if mask is not None and (seen.dtype != torch.bool or seen.dim() != 4 or tuple(seen.shape[1:3]) != (1, 1)):
        return 0
    k, v = _unrepeated(k), _unrepeated(v)
    if val(k).shape[:3] != val(v).shape[:3] or shape[1] % val(k).shape[1]:
        return 0
    if max(shape[3], val(v).shape[3]) > MAX_WIDTH or val(k).dtype != val(q).dtype or val(q).dtype == torch.float64:
        return 0
    with graph.inserting_before(node):
        merged = graph.call_function(attend_one, (q, k, v, mask), {"scale": node.kwargs.get("scale")})
    merged.meta["val"] = val(node)
    node.replace_all_uses_with(merged)
    graph.erase_node(node)
    return 1


def _unrepeated(heads: Node) -> Node:
    """k [B, HK, L, D] of k[:, :, None].expand(B, HK, n, L, D).reshape(B, HK·n, L, D); anything else as it is."""
    wide: Node = (
        heads.args[0] if _calls(heads, aten.reshape.default, aten.view.default, aten._unsafe_view.default) else None
    )
    wide = wide.args[0] if _calls(wide, aten.clone.default, aten.contiguous.default) else wide
    single: Node = wide.args[0] if _calls(wide, aten.expand.default) else None
    if not _calls(single, aten.unsqueeze.default) or single.args[1] != 2:
        return heads
    kept = single.args[0]
    batch, count, length, width = val(kept).shape
    if tuple(val(wide).shape[:2]) != (batch, count) or tuple(val(wide).shape[3:]) != (length, width):
        return heads
    return kept if tuple(val(heads).shape) == (batch, count * val(wide).shape[2], length, width) else heads


def match_norm(node: Node) -> Norm | None:
    """An RMS norm with a weight, as models spell it: in fp32, rounded before or after the weight; or None."""
    dtype = val(node).dtype
    whole = _fused_norm(_converted(node))
    if whole is not None:
        return whole if val(whole.x).dtype == dtype else None
    node = _converted(node)
    if not _calls(node, aten.mul.Tensor):
        return None
    for normed, scale in (node.args[:2], node.args[1::-1]):
        weight, offset = _weight(scale)
        x = _normalised(_converted(normed))
        if weight is not None and x is not None and val(x[0]).dtype == dtype:
            return Norm(x[0], weight, offset, x[1])
    return None


def _converted(node: Any) -> Any:
    """What a conversion to another precision converts."""
    while _calls(node, aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout):
        node = node.args[0]
    return node


def _weight(node: Any) -> tuple[Node | None, float]:
    """A vector among the graph's inputs, or 1 + one."""
    node, offset = _converted(node), 0.0
    if _calls(node, aten.add.Tensor) and 1.0 in node.args:
        node, offset = _converted(next(a for a in node.args if a != 1.0)), 1.0
    fine = _is_input(node) and val(node).dim() == 1
    return (node, offset) if fine else (None, 0.0)


def _fused_norm(node: Any) -> Norm | None:
    if not _calls(node, aten.rms_norm.default):
        return None
    x, shape, weight, eps = (*node.args, None, None)[:4]
    weight, offset = _weight(weight)
    x = _converted(x)
    if weight is None or eps is None or shape is None or len(shape) != 1:
        return None
    return Norm(x, weight, offset, eps)


def _normalised(node: Any) -> tuple[Node, float] | None:
    """x and eps of x · rsqrt(mean(x²) + eps), the mean over the last dimension and kept."""
    if not _calls(node, aten.mul.Tensor):
        return None
    for x, factor in (node.args[:2], node.args[1::-1]):
        eps = _inverse_length(factor, x)
        if eps is not None and val(x).dtype == torch.float32:
            return _converted(x), eps
    return None


def _inverse_length(node: Any, x: Any) -> float | None:
    power = _calls(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5
    if not power and not _calls(node, aten.rsqrt.default):
        return None
    total = node.args[0]
    if not _calls(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    if not _calls(mean, aten.mean.dim) or list(mean.args[1]) not in ([-1], [val(x).dim() - 1]):
        return None
    if not (mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim")):
        return None
    square = mean.args[0]
    squared = _calls(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
    squared = squared or (_calls(square, aten.mul.Tensor) and square.args == (x, x))
    return eps if squared else None
