"""A Dynamo graph compiled layer by layer: equal layers are compiled once.

A Transformer's graph is the same few layers over and over. Inductor's time grows with the nodes that it is given, so
the graph is cut where one layer of a list of layers ends and the next begins; of pieces that are equal but for the
tensors that they read (structure, constants, shapes, strides, dtypes) only the first is compiled.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.node import map_aggregate

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
_LAYER = re.compile(r"(?:\.|\[)(?:_modules\[')?(\d+)(?:'\])?\]?$")


@dataclass
class Region:
    """Part of a graph: nodes in order, the values that it reads from outside and those that others read of it."""

    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


class Pieces:
    """Runs compiled regions one after the other; called as the graph was."""

    def __init__(self, module: fx.GraphModule, compiler: Compiler):
        nodes = list(module.graph.nodes)
        self.places = {node: place for place, node in enumerate(n for n in nodes if n.op == "placeholder")}
        self.constants: list[Any] = []
        for node in nodes:
            if node.op == "get_attr" and not isinstance(_attribute(module, node), nn.Module):
                self.places[node] = len(self.places)
                self.constants.append(_attribute(module, node))
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.steps: list[tuple[Callable[..., Any], list[int], list[int], list[int]]] = []
        numbers = [n for n in nodes if n.op == "placeholder" and isinstance(value_of(n), torch.SymInt)]
        regions = cut(nodes)
        last = {node: step for step, region in enumerate(regions) for node in region.inputs}
        (output,) = nodes[-1].args
        kept = set(nodes[-1].all_input_nodes)
        for step, region in enumerate(regions):
            for node in region.outputs:
                self.places[node] = len(self.places)
            inputs = region.inputs + [n for n in numbers if n not in region.inputs]
            made = (n for n in region.inputs if n.op not in ("placeholder", "get_attr"))
            dead = [self.places[n] for n in made if last[n] == step and n not in kept]
            run = self._compile(module, region, inputs, compiler)
            self.steps.append(
                (run, [self.places[n] for n in inputs], [self.places[n] for n in region.outputs], dead),
            )
        self.output = fx.map_arg(output, lambda node: cast(Any, _Place(self.places[node])))

    def _compile(
        self, module: fx.GraphModule, region: Region, inputs: list[fx.Node], compiler: Compiler
    ) -> Callable[..., Any]:
        piece = extract(module, region, inputs)
        key = describe(piece)
        if key not in self.compiled:
            values = [value_of(node) for node in inputs]
            mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
            with tracing(TracingContext(mode)):
                self.compiled[key] = compiler(piece, values)
        return self.compiled[key]

    def __call__(self, *args: Any) -> Any:
        values: list[Any] = [*args, *self.constants]
        values += [None] * (len(self.places) - len(values))
        for run, inputs, outputs, dead in self.steps:
            results = run(*[values[i] for i in inputs])
            for place, result in zip(outputs, results, strict=True):
                values[place] = result
            for place in dead:
                values[place] = None
        return map_aggregate(self.output, lambda leaf: values[leaf.number] if isinstance(leaf, _Place) else leaf)


@dataclass(frozen=True)
class _Place:
    number: int


def compile_regions(module: fx.GraphModule, compiler: Compiler) -> Callable[..., Any]:
    """Compile a graph of Dynamo's in pieces; `compiler` gets each distinct piece and its fake inputs.

    A piece returns a tuple, also of one value.
    """
    return Pieces(module, compiler)


def cut(nodes: Sequence[fx.Node]) -> list[Region]:
    """Consecutive nodes of one layer, or of none, make a region; its inputs stand in the order of their first use."""
    regions: list[Region] = []
    current: object = None
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_number(node):
            continue
        layer = layer_of(node)
        if not regions or (layer is not _SAME and layer != current):
            regions.append(Region())
            current = None if layer is _SAME else layer
        regions[-1].nodes.append(node)
    owner = {node: region for region in regions for node in region.nodes}
    for region in regions:
        seen = dict.fromkeys(a for n in region.nodes for a in n.all_input_nodes if owner.get(a) is not region)
        region.inputs = [n for n in seen if not _is_module(n) and not is_number(n)]
        region.outputs = [n for n in region.nodes if any(owner.get(user) is not region for user in n.users)]
    return regions


_SAME = object()


def is_number(node: fx.Node) -> bool:
    """Whether a node computes a size of sizes: every region that needs it computes it again."""
    return (
        node.op == "call_function"
        and isinstance(value_of(node), (int, torch.SymInt))
        and all(isinstance(value_of(a), (int, torch.SymInt)) and a.op != "call_method" for a in node.all_input_nodes)
        and not any(user.op == "output" for user in node.users)
    )


def layer_of(node: fx.Node) -> object:
    """The path of the outermost numbered module that a node belongs to, None outside; _SAME when nothing is known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return _SAME
    for path, _ in stack.values():
        if _LAYER.search(path):
            return path
    return None


def extract(module: fx.GraphModule, region: Region, inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """A region as a graph of its own."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    holder = nn.Module()
    for number, node in enumerate(inputs):
        known[node] = graph.placeholder(f"arg{number}")
        known[node].meta = dict(node.meta)

    def copy(node: fx.Node) -> fx.Node:
        for source in node.all_input_nodes:
            if source not in known and is_number(source):
                copy(source)
            elif source not in known:  # a graph in the graph
                name = str(source.target)
                setattr(holder, name, _attribute(module, source))
                known[source] = graph.get_attr(name)
        known[node] = graph.node_copy(node, known.__getitem__)
        return known[node]

    for node in region.nodes:
        copy(node)
    result = graph.output(tuple(known[node] for node in region.outputs))
    result.meta["example_value"] = tuple(value_of(node) for node in region.outputs)
    return fx.GraphModule(holder, graph)


def describe(piece: fx.GraphModule) -> str:
    """Equal for pieces that compile to the same code."""
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in piece.graph.nodes:
        numbers[node] = len(numbers)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: cast(Any, _Place(numbers[n])))
        target = node.target if isinstance(node.target, str) else _name(node.target)
        if node.op == "placeholder":
            target = ""
        if node.op == "get_attr":
            target = str(getattr(_attribute(piece, node), "graph", target))
        lines.append(f"{node.op} {target} {args} {kwargs} {_shape(value_of(node))}")
    return "\n".join(lines)


def value_of(node: fx.Node) -> Any:
    """The fake tensor or number that Dynamo computed for a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def _name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"{tuple(value.shape)} {value.stride() if value.layout == torch.strided else value.layout} {value.dtype} "
            f"{value.device} {value.requires_grad} {value.storage_offset() if value.layout == torch.strided else 0}"
            f"{type(value).__name__}"
        )
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_shape(v) for v in value)}]"
    return str(value)


def _attribute(module: nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _is_module(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(cast(nn.Module, node.graph.owning_module), node), nn.Module)
