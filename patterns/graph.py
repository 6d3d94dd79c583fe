"""The captured graph and the one shared place that walks, evaluates and traces it.

Words used here: a node is *open* when its value depends on what the model reads (token ids, embeddings), and *closed*
when it depends on nothing but lengths, positions, the padding mask and weights. Masks and rotary tables are closed
subgraphs, so they are evaluated, not pattern-matched. Pure data movement (view, split, expand …) is traced by sending
numbered entries through it, so every spelling of a fused or repeated projection gives the same table of rows.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fla_swap.errors import NoValue
from fla_swap.patterns.running import levels_closed, moved, no_half, stand_in, upcast

aten = torch.ops.aten


def _ops(*names: str) -> frozenset[Any]:
    """Every overload of the named aten operators (names that this torch lacks are skipped)."""
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)


LAYOUT = _ops(
    *("view", "reshape", "_unsafe_view", "transpose", "permute", "t", "numpy_T", "expand", "expand_as", "unsqueeze"),
    *("squeeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "contiguous", "clone", "alias"),
    *("cat", "concat", "stack", "repeat", "repeat_interleave", "flatten", "unflatten", "movedim", "narrow", "detach"),
    *("index_select", "index", "flip", "roll", "view_as", "swapaxes", "swapdims", "tile", "tensor_split", "mT"),
    *("adjoint", "broadcast_to"),
) | frozenset({operator.getitem})
CAST = _ops("to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "detach_")
REINTERPRET = _ops("view_as_complex", "view_as_real")
DROPOUT = _ops("dropout", "native_dropout", "feature_dropout")
SHAPE_ONLY = _ops(
    *("new_ones", "new_zeros", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"),
    *("rand_like", "sym_size", "_assert_tensor_metadata"),
)
FIRST_ONLY = _ops("type_as", "expand_as", "view_as")
CONTRACTION = _ops("linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum")


BATCHED = ("_add_batch_dim", "_remove_batch_dim")
_LEVELS = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions")


class NotLayout(Exception):
    """A trace met an operation that is not pure data movement; `.node` is that operation."""

    def __init__(self, node: fx.Node):
        super().__init__(f"{node.target} is not a movement of data")
        self.node = node


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """One exported forward pass at fixed lengths.

    `weights` maps placeholder names to qualified parameter or buffer names; `values` holds the tensors behind
    placeholders (weights, buffers, constants, and the closed inputs such as the padding mask); `data` names the
    placeholders that carry what the model reads. `limit`: the longest input that the model takes.

    `batch` and `length` are the model's; one attention's own may be others: `sized` gives the graph as that site sees
    it, with `keys` beside `length` queries and `time_first` where its hidden states are [T, B, D].

    `branched`: the model's code decides by the length. `opaque`: modules that were not looked into.
    """

    module: fx.GraphModule
    weights: Mapping[str, str]
    values: Mapping[str, Any]
    data: frozenset[str]
    batch: int
    length: int
    limit: int = 2**31
    keys: int | None = None
    time_first: bool = False
    branched: bool = False
    opaque: tuple[str, ...] = ()
    known: dict[Any, Any] = field(default_factory=dict, repr=False)
    _memo: dict[fx.Node, Any] = field(default_factory=dict, repr=False)
    _order: dict[fx.Node, int] = field(default_factory=dict, repr=False)
    _open: set[fx.Node] = field(default_factory=set, repr=False)
    _mutators: list[fx.Node] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for number, node in enumerate(self.module.graph.nodes):
            self._order[node] = number
            if node.op == "placeholder" and node.name in self.data:
                self._open.add(node)
            elif node.op == "call_function":
                if _is_mutable(node):
                    self._mutators.append(node)
                if self._propagates(node):
                    self._open.add(node)
                    if _is_mutable(node):
                        self._open.add(alias_root(node))

    def _propagates(self, node: fx.Node) -> bool:
        return any(n in self._open for n in read_inputs(node))

    def sized(
        self, *, length: int, batch: int | None = None, keys: int | None = None, time_first: bool = False
    ) -> CapturedGraph:
        """The same graph with another batch, query and key count (`keys` None: as `length`). Shares all it knows."""
        view = copy.copy(self)
        own = {"length": length, "batch": batch or self.batch, "keys": keys, "time_first": time_first}
        for name, value in own.items():
            object.__setattr__(view, name, value)
        return view

    @property
    def key_length(self) -> int:
        """How many keys a query could see."""
        return self.length if self.keys is None else self.keys

    def token_numbers(self) -> Tensor:
        """int [B, T, 1] (or [T, B, 1] when `time_first`): row · length + token."""
        numbers = torch.arange(self.batch * self.length).reshape(self.batch, self.length, 1)
        return numbers.transpose(0, 1) if self.time_first else numbers

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self._order)

    def is_open(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self._open

    def open_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The distinct inputs of `node` that carry data."""
        return [n for n in read_inputs(node) if n in self._open]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The operations that write data into a buffer or into views of it."""
        return [m for m in self._mutators if m is not node and self.is_open(m) and alias_root(m) is node]

    def order(self, node: fx.Node) -> int:
        return self._order[node]

    def join(self, node: fx.Node) -> tuple[fx.Node | None, set[fx.Node]]:
        """The nearest single node through which all data reaches `node`, and the nodes strictly between.

        A node with several outputs (split, chunk) is stepped over, so that the result is one tensor.
        """
        frontier, between = set(self.open_inputs(node)), set()
        while frontier:
            latest = max(frontier, key=self.order)
            if len(frontier) == 1 and shape(latest) is not None:
                return latest, between
            frontier.discard(latest)
            between.add(latest)
            inputs = self.open_inputs(latest)
            if not inputs:
                return None, between
            frontier.update(inputs)
        return None, between

    def constant(self, value: Any) -> float | None:
        """`value` as a number: a Python scalar, or a closed node with a single element."""
        if isinstance(value, bool) or value is None:
            return None
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node) or self.is_open(value):
            return None
        dims = shape(value)
        if dims is None or any(d != 1 for d in dims):
            return None
        try:
            return float(self.evaluate(value).double().reshape(()))
        except NoValue:
            return None

    def evaluate(self, node: fx.Node) -> Any:
        """The value of a closed node, with half precision computed in fp32 instead."""
        if node not in self._memo:
            self._memo[node] = self.run(node, {})
        return self._memo[node]

    def run(self, target: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """Evaluate `target` with the nodes in `given` replaced by values; everything else it needs must be closed."""
        known = dict(given)
        with levels_closed():
            for node in self._needed(target, known):
                known[node] = self._execute(node, known)
        return known[target]

    def parameters_of(self, node: fx.Node) -> list[str]:
        """Names of the trainable (floating) parameters whose values a closed node is made of."""
        found = [n for n in self._needed(node, {}) if n.op == "placeholder" and n.name in self.weights]
        values = ((self.weights[n.name], self.values[n.name]) for n in found)
        return [name for name, v in values if isinstance(v, torch.nn.Parameter) and v.is_floating_point()]

    def _needed(self, target: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
        needed: set[fx.Node] = set()
        self._collect(target, known, needed)
        changed = True
        while changed:
            changed = False
            for node in self._mutators:
                if node in needed or self.is_open(node) or alias_root(node) not in needed:
                    continue
                self._collect(node, known, needed)
                changed = True
        if any(_name(n) in BATCHED for n in needed):  # inside torch.vmap: its levels are opened and closed in between
            needed.update(n for n in self.nodes if _name(n) in _LEVELS)
        return sorted(needed, key=self.order)

    def _collect(self, target: fx.Node, known: Mapping[fx.Node, Any], needed: set[fx.Node]) -> None:
        stack = [target]
        while stack:
            node = stack.pop()
            if node in needed or node in known:
                continue
            needed.add(node)
            stack.extend(read_inputs(node))

    def _execute(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            if node.name not in self.values:
                raise ValueError(f"{node.name} carries data: it cannot be evaluated")
            return upcast(self.values[node.name], self.weights.get(node.name, node.name))
        if node.op == "get_attr":
            return upcast(operator.attrgetter(str(node.target))(self.module), str(node.target))
        if node.op != "call_function":
            raise ValueError(f"cannot evaluate {node.op} {node.target}")

        def value(n: fx.Node) -> Any:
            return known[n] if n in known else stand_in(n)

        args, kwargs = map_arg((node.args, node.kwargs), value)
        args, kwargs = no_half(args), no_half(kwargs)
        call = node.target
        assert callable(call)
        return call(*args, **kwargs)

    def trace(self, start: fx.Node, value: Tensor, target: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Tensor:
        """Send `value` (numbered entries) from `start` to `target` through movements of data.

        `same` maps the output of a recognised step to its input, which counts as no movement. Raises `NotLayout`.
        """
        return self.trace_from({start: value}, target, same)

    def trace_from(self, known: Mapping[fx.Node, Any], target: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Tensor:
        """As `trace`, from the values of several nodes at once."""
        known = dict(known)

        def visit(node: fx.Node) -> Any:
            if node not in known:
                known[node] = step(node)
            return known[node]

        def step(node: fx.Node) -> Any:
            if node in same:
                return visit(same[node])
            if not self.is_open(node):
                value = self.evaluate(node)
                if not (isinstance(value, Tensor) and value.is_floating_point()):
                    return value
                if value.numel():  # numbers of places and values do not mix
                    raise NotLayout(node)
                return value.long()
            if node.op != "call_function":
                raise NotLayout(node)
            if node.target in CAST or node.target in DROPOUT:
                return visit(node.all_input_nodes[0])
            if node.target not in LAYOUT:
                raise NotLayout(node)
            if node.target in FIRST_ONLY:
                rest = tuple(stand_in(a) if isinstance(a, fx.Node) else a for a in node.args[1:])
                args, kwargs = (visit(node.all_input_nodes[0]), *rest), dict(node.kwargs)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), visit)
            try:
                return moved(node.target, args, kwargs)
            except RuntimeError as error:
                raise NotLayout(node) from error

        return visit(target)

    def trace_closed(self, start: fx.Node, value: Tensor, target: fx.Node) -> Tensor:
        """As `trace`, for numbered entries of a weight."""
        if target is start:
            return value
        if target.target in CAST:
            return self.trace_closed(start, value, target.all_input_nodes[0])
        if target.target not in LAYOUT or len(target.all_input_nodes) != 1:
            raise NotLayout(target)
        before = self.trace_closed(start, value, target.all_input_nodes[0])
        args, kwargs = map_arg((target.args, target.kwargs), lambda _: before)
        assert callable(target.target)
        return target.target(*args, **kwargs)

    def peel(self, node: fx.Node, ops: Iterable[Any] = LAYOUT | CAST | DROPOUT) -> list[fx.Node]:
        """`node` and what lies before it as long as it is a movement (or cast) of a single open tensor."""
        chain = [node]
        while chain[-1].target in ops:
            inputs = self.open_inputs(chain[-1])
            if len(inputs) != 1:
                break
            chain.append(inputs[0])
        return chain

    def peel_closed(self, node: fx.Node) -> fx.Node:
        """A closed value before its casts."""
        while node.target in CAST and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def read_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values a node reads; of the others it reads the shape or the dtype alone."""
    if node.target in SHAPE_ONLY:  # a size may be a number that was computed
        return [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)]
    return node.all_input_nodes[:1] if node.target in FIRST_ONLY else node.all_input_nodes


def shape(node: Any) -> tuple[int, ...] | None:
    """The static shape of a node, None when its value is not one tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(val.shape) if isinstance(val, Tensor) else None


def modules_of(node: fx.Node) -> list[str]:
    """Qualified names of the modules that were being called, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def source_of(node: fx.Node) -> str:
    """`file:line` of the model code that produced the node (what it reads, for code without a file), or ""."""
    lines = [t.strip() for t in (node.meta.get("stack_trace") or "").splitlines() if t.strip().startswith("File ")]
    if not lines or "<eval_with_key>" in lines[-1]:
        return source_of(node.all_input_nodes[0]) if lines else ""
    where = lines[-1].removeprefix("File ").split(", ")
    return f"{where[0].strip(chr(34))}:{where[1].removeprefix('line ')}" if len(where) > 1 else where[0]


def op_name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it stands."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose memory an in-place operation writes."""
    first = node.args[0]
    while isinstance(first, fx.Node) and first.op == "call_function" and first.args:
        if first.target not in LAYOUT and not _is_mutable(first):
            break
        before = first.args[0]
        if not isinstance(before, fx.Node):
            break
        first = before
    return first if isinstance(first, fx.Node) else node


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
