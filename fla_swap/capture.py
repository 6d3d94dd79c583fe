"""nn.Module → CapturedGraph: one export of the whole forward pass at a fixed length."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fla_swap.arguments import undisturbed
from fla_swap.errors import CaptureError
from fla_swap.patterns.graph import CapturedGraph

BATCH = 2
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
CLOSED_INPUTS = ("attention_mask", "position_ids", "cache_position")


def capture(model: nn.Module, inputs: Inputs, *, length: int, limit: int = 2**31) -> CapturedGraph:
    """Export `model(*args, **kwargs)` in eval mode and return its graph. The model is left as it was.

    `limit` is the longest input that the model takes.

    Raises CaptureError when the model is on the meta device, or when `torch.export` cannot follow it: the message
    says where, and how to capture a submodule instead.
    """
    on_meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise CaptureError(
            f"parameter {on_meta!r} is on the meta device: it has no values to prove a site with; "
            "load the model's weights first"
        )
    args, kwargs = inputs
    try:
        with undisturbed(model, use_cache=False):
            exported = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(_advice(model, error)) from error
    return _graph(exported, inputs, length, limit)


def _advice(model: nn.Module, error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    where = ""
    trace = error.__traceback__
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if "/torch/" not in file:
            where = f"{file}:{line}"
        trace = trace.tb_next
    return (
        f"torch.export could not follow {type(model).__name__}: {first} (last line outside torch: {where}). "
        "Inspect the part that holds the attention instead: fs.inspect(model.get_submodule(NAME), example_inputs)."
    )


def _graph(exported: torch.export.ExportedProgram, inputs: Inputs, length: int, limit: int) -> CapturedGraph:
    module = exported.graph_module
    inline_regions(module)
    signature = exported.graph_signature
    weights: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values: dict[str, Any] = {}
    stored = {**exported.state_dict, **exported.constants}
    for placeholder, name in {**weights, **signature.inputs_to_lifted_tensor_constants}.items():
        values[placeholder] = stored[name]
    data = set()
    leaves = tree_leaves(inputs)
    users = [n for n in module.graph.nodes if n.op == "placeholder" and n.name not in values]
    for node, leaf in zip(users, leaves, strict=False):
        if isinstance(leaf, Tensor) and not any(node.name.startswith(name) for name in CLOSED_INPUTS):
            data.add(node.name)
        else:
            values[node.name] = leaf
    return CapturedGraph(
        module=module,
        weights=weights,
        values=values,
        data=frozenset(data),
        batch=BATCH,
        length=length,
        limit=limit,
    )


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


def default_inputs(model: nn.Module, length: int, *, padded: int = 0) -> Inputs:
    """Token ids [2, length], an attention mask whose second row has `padded` positions of left padding, no cache.

    Raises CaptureError when the model's forward takes no token ids.
    """
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        raise CaptureError(
            f"{type(model).__name__}.forward takes no 'input_ids' (it takes {list(names)}): pass example_inputs"
        )
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        vocabulary = max(tables, default=2)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (BATCH, length), generator=generator).to(device)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in names:
        mask = torch.ones_like(ids)
        mask[1, :padded] = 0
        kwargs["attention_mask"] = mask
        if padded and "position_ids" in names:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "use_cache" in names:
        kwargs["use_cache"] = False
    return (), kwargs


def inputs_of_length(example: Mapping[str, Any] | Sequence[Any] | Tensor, length: int, *, padded: int = 0) -> Inputs:
    """The user's example inputs (tensors [B, T, …] or [B, T]) repeated or cut to two rows and `length` tokens.

    An `attention_mask` [B, T] among them becomes ones, with `padded` zeros at the start of the second row.
    """
    if isinstance(example, Tensor):
        example = (example,)
    times = [v.shape[1] for v in _tensors(example) if v.dim() >= 2]
    if not times:
        raise CaptureError("example_inputs holds no tensor [batch, time, …]")

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != times[0]:
            return value
        value = value.repeat(-(-BATCH // value.shape[0]), *[1] * (value.dim() - 1))[:BATCH]
        return value.repeat(1, -(-length // value.shape[1]), *[1] * (value.dim() - 2))[:, :length]

    if isinstance(example, Mapping):
        kwargs = {k: resize(v) for k, v in example.items()}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            kwargs["attention_mask"] = torch.ones_like(mask)
            kwargs["attention_mask"][1, :padded] = 0
        return (), kwargs
    return tuple(resize(v) for v in example), {}


def _tensors(example: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    values = example.values() if isinstance(example, Mapping) else example
    return [v for v in values if isinstance(v, Tensor)]
