"""nn.Module → CapturedGraph: one export of the whole forward pass at a fixed length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fla_swap.arguments import undisturbed
from fla_swap.errors import CaptureError
from fla_swap.exporting import Exported, exports
from fla_swap.model_inputs import BATCH, Inputs, closed_input, own_failure
from fla_swap.patterns.contractions import expand_contractions
from fla_swap.patterns.graph import CapturedGraph, _ops

NUMBER = _ops("item", "_local_scalar_dense", "nonzero", "is_nonzero")


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    length: int,
    limit: int = 2**31,
    name: str = "",
    closed: Callable[[str, Any], bool] = closed_input,
) -> CapturedGraph:
    """Export `model(*args, **kwargs)` in eval mode and return its graph. The model is left as it was.

    `limit` is the longest input that the model takes. `name`: where it stands in a larger model, by whose names modules
    and weights are called in the graph. `closed(name, value)`: which inputs do not carry what the model reads.

    Raises CaptureError when the model itself does not run on the inputs, or `torch.export` cannot follow it: the
    message says where, and how to capture a submodule instead.
    """
    first: Exception | None = None
    for found in exports(model, inputs):
        if isinstance(found, Exception):
            first = first or found
            continue
        graph = _graph(found, inputs, length, limit, name, closed)
        if not found.branched or not _decides_on_data(graph):
            return graph
    assert first is not None
    try:
        with undisturbed(model, use_cache=False):
            model(*inputs[0], **inputs[1])
    except Exception as error:
        raise CaptureError(own_failure(model, inputs, error)) from error
    raise CaptureError(_advice(model, first)) from first


def _decides_on_data(graph: CapturedGraph) -> bool:
    """Whether some value that the model read was turned into a number: another input takes another path."""
    return any(n.target in NUMBER and any(graph.is_open(i) for i in n.all_input_nodes) for n in graph.nodes)


def _advice(model: nn.Module, error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    where, inside = "", ""
    names = {id(module): name for name, module in model.named_modules()}
    trace = error.__traceback__
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if "/torch/" not in file:
            where = f"{file}:{line}"
        inside = names.get(id(trace.tb_frame.f_locals.get("self")), inside)
        trace = trace.tb_next
    inside = f" in the submodule {inside!r}" if inside else ""
    part = next((repr(name) for name, module in model.named_modules() if name and _projections(module) >= 3), "NAME")
    return (
        f"torch.export could not follow {type(model).__name__}{inside}: {first} (last line outside torch: {where}). "
        f"Inspect the parts that hold the attention: fs.inspect(model, example_inputs, within=[{part}, …]) exports "
        "those submodules alone, called as the model calls them."
    )


def _projections(module: nn.Module) -> int:
    """How many of its children hold a matrix."""
    weights = (getattr(child, "weight", None) for child in module.children())
    return sum(isinstance(w, Tensor) and w.dim() == 2 for w in weights)


def _graph(
    found: Exported, inputs: Inputs, length: int, limit: int, name: str, closed: Callable[[str, Any], bool]
) -> CapturedGraph:
    exported = found.program
    module = exported.graph_module
    inline_regions(module)
    signature = exported.graph_signature
    weights: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    expand_contractions(module, weights)
    values: dict[str, Any] = {}
    stored = {**exported.state_dict, **exported.constants}
    for placeholder, weight in {**weights, **signature.inputs_to_lifted_tensor_constants}.items():
        values[placeholder] = stored[weight]
    data = set()
    leaves = tree_leaves(inputs)
    users = [n for n in module.graph.nodes if n.op == "placeholder" and n.name not in values]
    passed: dict[int, fx.Node] = {}
    for node, leaf in zip(users, leaves, strict=False):
        leaf = inputs[1].get(node.name, leaf)
        if isinstance(leaf, Tensor):
            first = passed.setdefault(id(leaf), node)
            if first is not node:  # the same tensor in two places is one tensor
                node.replace_all_uses_with(first)
        if closed(node.name, leaf):
            values[node.name] = leaf
        else:
            data.add(node.name)
    if name:
        _qualify(module, name)
        weights = {placeholder: f"{name}.{weight}" for placeholder, weight in weights.items()}
    return CapturedGraph(
        module=module,
        weights=weights,
        values=values,
        data=frozenset(data),
        batch=BATCH,
        length=length,
        limit=limit,
        branched=found.branched,
        opaque=found.opaque,
    )


def _qualify(module: fx.GraphModule, name: str) -> None:
    """Call the modules in the graph by their names in the model around it."""
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {
            key: (f"{name}.{path}" if path else name, kind) for key, (path, kind) in stack.items()
        }


def inline_regions(module: fx.GraphModule) -> None:
    """Put the bodies of `no_grad` and autocast regions back into the graph, in place."""
    graph = module.graph
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            if node.op != "call_function" or not str(node.target).startswith(
                ("wrap_with_set_grad", "wrap_with_autocast")
            ):
                continue
            bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            body = getattr(module, str(bodies[0].target)) if bodies else None
            if isinstance(body, fx.GraphModule):
                _inline(graph, node, body, node.args[node.args.index(bodies[0]) + 1 :])
                again = True
    for node in reversed(list(graph.nodes)):
        if "_assert_tensor_metadata" in str(node.target) and not node.users:
            graph.erase_node(node)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, operands: Sequence[Any]) -> None:
    stack = node.meta.get("nn_module_stack", {})
    copies: dict[fx.Node, Any] = {}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    copies.update(zip(placeholders, operands, strict=True))
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = map_arg(inner.args[0], lambda n: copies[n])
                break
            copies[inner] = graph.node_copy(inner, lambda n: copies[n])
            if not copies[inner].meta.get("nn_module_stack"):
                copies[inner].meta["nn_module_stack"] = stack
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(result[index])
        graph.erase_node(user)
    graph.erase_node(node)
