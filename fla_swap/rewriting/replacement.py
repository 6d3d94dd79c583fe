"""The operator that computes what a core computes, and how it is written: into a graph, or on tensors (for the proof).

Legend: B batch, H query heads, HK key/value heads, G = H / HK, T tokens, K key width, V value width.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

import fla_swap.kernels.window.ops  # noqa: F401  registers the operator
from fla_swap.patterns.graph import _ops, argument, shape
from fla_swap.rewriting.cores import Core, CoreRefused, sizes
from fla_swap.rewriting.masks import Visible

aten = torch.ops.aten
WINDOW, SDPA = "window_attention", "scaled_dot_product_attention"
WIDEST = 256
_HALF = (torch.float16, torch.bfloat16)
_RESHAPE = _ops("view", "reshape", "_unsafe_view", "contiguous", "clone")
_SAME = _ops("slice", "alias", "contiguous", "clone")


class Calls(Protocol):
    """Applies an operator: to tensors at once, or to nodes by adding one."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any: ...


def eagerly(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


class Insert:
    """Adds nodes before `anchor`, with their values on fake tensors."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node):
        self.graph, self.anchor = graph, anchor

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            if name in self.anchor.meta:
                node.meta[name] = self.anchor.meta[name]
        values, keywords = map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = getattr(self.anchor.meta.get("val"), "fake_mode", None)
        shapes = None if mode is None else mode.shape_env
        with mode or nullcontext(), nullcontext() if shapes is None else shapes.suppress_guards():
            node.meta["val"] = target(*values, **keywords)
        return node


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """`name` is the operator. `rank` of q in the graph; `heads` splits the leading dimension of a q of rank 3.

    `window` counts the token itself; `chunk`: tokens see only their own chunk of that many. `slopes`: [H], ALiBi.
    """

    name: str
    causal: bool
    scale: float
    rank: int
    k_transposed: bool
    heads: int | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    groups: int = 1

    def facts(self) -> dict[str, Any]:
        """What it was built from, for the record."""
        mask = "chunked" if self.chunk else "window" if self.window else "causal" if self.causal else "bidirectional"
        own = {"window": self.window or self.chunk, "softcap": self.softcap, "alibi": self.slopes}
        return {"mask": mask, "scale": self.scale} | {n: v for n, v in own.items() if v is not None}


def choose(core: Core, visible: Visible) -> Replacement:
    """The operator for a core whose mask was classified; CoreRefused where none computes it."""
    q, k, v = (list(sizes(n)) for n in (core.q, core.k, core.v))
    mask, slopes, heads = visible.mask, visible.slopes, None
    if len(q) > 5 or len(k) != len(q) or len(v) != len(q) or k[0] != q[0] or v[0] != q[0]:
        raise CoreRefused(f"q, k and v have shapes {q}, {k} and {v}", core.anchor)
    if len(q) > 3 and (k[1:-2] != v[1:-2] or (len(q) == 5 and k[1] != q[1])):
        raise CoreRefused(f"q, k and v have shapes {q}, {k} and {v}", core.anchor)
    if slopes is not None:
        heads = _period(slopes) if len(q) == 3 else torch.Size(q[1:-2]).numel()
        rows = [slopes[i : i + heads] for i in range(0, len(slopes), heads)]
        if any(row != rows[0] for row in rows):
            raise CoreRefused("the bias on the scores differs between rows of the batch", core.anchor)
        slopes = rows[0]
    if core.sinks is not None and len(q) == 3:
        heads = sizes(core.sinks)[0]
    if mask.kind == "local":
        raise CoreRefused("no operator computes attention to a window on either side", core.anchor)
    plain = core.softcap is None and slopes is None and core.sinks is None
    fused = plain and mask.kind in ("causal", "bidirectional")
    if mask.kind == "bidirectional" and not plain:
        raise CoreRefused("no operator computes bidirectional attention with softcap, sinks or ALiBi", core.anchor)
    if not fused and core.q.meta["val"].device.type == "cuda" and max(q[-1], v[-1]) > WIDEST:
        raise CoreRefused(f"heads of {max(q[-1], v[-1])} channels are wider than {WIDEST}", core.anchor)
    return Replacement(
        name=SDPA if fused else WINDOW,
        causal=mask.kind != "bidirectional",
        scale=core.scale,
        rank=len(q),
        k_transposed=core.k_transposed,
        heads=heads if len(q) == 3 else None,
        window=mask.window if mask.kind == "window" else None,
        chunk=mask.window if mask.kind == "chunked" else None,
        softcap=core.softcap,
        slopes=slopes,
        groups=_groups(q, k),
    )


def _groups(q: list[int], k: list[int]) -> int:
    """Query heads for each key/value head, as the operands stand in the graph."""
    if len(q) == 3:
        return 1
    return q[1] // k[1] if len(q) == 4 else q[2] // k[2]


def _period(slopes: tuple[float, ...]) -> int:
    count = len(slopes)
    return next(p for p in range(1, count + 1) if count % p == 0 and slopes[:p] * (count // p) == slopes)


def write(call: Calls, spec: Replacement, q: Any, k: Any, v: Any, sinks: Any, like: Mapping[str, Any]) -> Any:
    """The attention of `spec`. `like`: "device", "lead" [B, …], "dtype" (of the computation) and "out_dtype"."""
    if spec.k_transposed:
        k = call(aten.transpose.int, k, -2, -1)
    q, k, v = (_four(call, spec, x, own) for x, own in ((q, True), (k, False), (v, False)))
    if spec.name == SDPA:
        shared = spec.groups > 1 and like["dtype"] in _HALF  # the kernel for fp32 does not share heads
        if spec.groups > 1 and not shared:
            k, v = (call(aten.repeat_interleave.self_int, x, spec.groups, 1) for x in (k, v))
        masked = (q, k, v, None, 0.0, spec.causal)
        o = call(aten.scaled_dot_product_attention.default, *masked, scale=spec.scale, enable_gqa=shared)
    else:
        q, k, v = (call(aten.transpose.int, x, 1, 2) for x in (q, k, v))
        o = call(aten.transpose.int, _window(call, spec, (q, k, v), sinks, like), 1, 2)
    if spec.rank == 3:
        o = call(aten.squeeze.dim, o, 1) if spec.heads is None else call(aten.flatten.using_ints, o, 0, 1)
    elif spec.rank == 5:
        o = call(aten.unflatten.int, o, 1, list(like["lead"][1:]))
    return o if like["dtype"] == like["out_dtype"] else call(aten.to.dtype, o, like["out_dtype"])


def _four(call: Calls, spec: Replacement, x: Any, own: bool) -> Any:
    """[B, H, T, D], whatever the rank in the graph."""
    if spec.rank == 3:
        return call(aten.unsqueeze.default, x, 1) if spec.heads is None else _split(call, x, spec.heads)
    if spec.rank == 5:
        size = (x.shape if isinstance(x, Tensor) else x.meta["val"].shape)[2]
        return call(aten.squeeze.dim, x, 2) if not own and size == 1 else call(aten.flatten.using_ints, x, 1, 2)
    return x


def _split(call: Calls, x: Any, heads: int) -> Any:
    return call(aten.unflatten.int, x, 0, [-1, heads])


def _window(call: Calls, spec: Replacement, heads: tuple, sinks: Any, like: Mapping[str, Any]) -> Any:
    """[B, T, H, V] from q, k, v [B, T, ·, ·]."""
    slopes, bounds, window = None, None, spec.window
    if spec.slopes is not None:
        number = {"dtype": torch.float32, "device": like["device"]}
        slopes = call(aten.stack.default, [call(aten.scalar_tensor.default, s, **number) for s in spec.slopes])
    batch, length = _size(call, heads[0], 0), _size(call, heads[0], 1)
    if spec.chunk is not None:
        bounds, window = _chunk_bounds(call, spec.chunk, batch, length, like["device"]), spec.chunk
        heads = tuple(call(aten.unsqueeze.default, call(aten.flatten.using_ints, x, 0, 1), 0) for x in heads)
    op = torch.ops.fla_swap.window_attention_fwd.default
    pair = call(op, *heads, sinks, slopes, None, bounds, window, spec.softcap, spec.scale, None)
    o = call(operator.getitem, pair, 0)
    if spec.chunk is not None:
        o = call(aten.unflatten.int, call(aten.squeeze.dim, o, 0), 0, [batch, length])
    return o


def _size(call: Calls, x: Any, dim: int) -> Any:
    size = (x if isinstance(x, Tensor) else x.meta["val"]).shape[dim]
    return size if type(size) is int else call(aten.sym_size.int, x, dim)


def _chunk_bounds(call: Calls, chunk: int, batch: Any, length: Any, device: torch.device) -> Any:
    """int64 [B · ceil(T / C) + 1]: the borders of every chunk of every row of the batch."""
    starts = call(aten.arange.start_step, 0, length, chunk, device=device)
    rows = call(aten.mul.Tensor, call(aten.arange.default, batch, device=device), length)
    borders = call(aten.add.Tensor, call(aten.unsqueeze.default, rows, 1), starts)
    total = batch * length if isinstance(batch, int) and isinstance(length, int) else call(operator.mul, batch, length)
    end = call(aten.full.default, [1], total, dtype=torch.int64, device=device)
    return call(aten.cat.default, [call(aten.reshape.default, borders, [-1]), end])


def unrepeated(node: fx.Node, transposed: bool) -> fx.Node | None:
    """The [B, HK, T, D] that `node` [B, H, T, D] (or [B, H, D, T]) repeats for each head of a group, or None."""
    if transposed:
        if node.target not in _ops("transpose") or {d % 4 for d in node.args[1:3]} != {2, 3}:  # type: ignore[operator]
            return None
        node = node.args[0]  # type: ignore[assignment]
    wanted = shape(node)
    if node.target in _ops("repeat_interleave") and isinstance(argument(node, 1, "repeats"), int):
        source = node.args[0]
        return source if isinstance(source, fx.Node) and argument(node, 2, "dim") in (1, -3) else None
    while node.target in _RESHAPE and shape(node) == wanted:
        node = node.all_input_nodes[0]
    grouped = shape(node)
    while node.target in _RESHAPE and shape(node) == grouped:
        node = node.all_input_nodes[0]
    if wanted is None or grouped is None or len(wanted) != 4 or len(grouped) != 5:
        return None
    batch, kv, groups, *rest = grouped
    if node.target not in _ops("expand") or wanted != (batch, kv * groups, *rest):
        return None
    node = _back(node.all_input_nodes[0])
    if shape(node) != (batch, kv, 1, *rest) or node.target not in _ops("unsqueeze") or node.args[1] not in (2, -3):
        return None
    source = _back(node.all_input_nodes[0])
    return source if shape(source) == (batch, kv, *rest) else None


def _back(node: fx.Node) -> fx.Node:
    while node.target in _SAME and shape(node.all_input_nodes[0]) == shape(node):
        node = node.all_input_nodes[0]
    return node
