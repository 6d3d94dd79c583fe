"""`torch.compile(model, backend="fla_swap")`: exact rewrites of attention, then Inductor.

Dynamo hands over a graph of torch functions. It is lowered to ATen before decomposition, under the graph's own fake
mode (so that dynamic shapes and training stay as they are), rewritten, and compiled. A graph in which nothing can be
rewritten goes to Inductor as it came.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_scalar

from fla_swap.errors import RewriteError
from fla_swap.rewriting.exact import rewrite_graph
from fla_swap.rewriting.records import Rewrite
from fla_swap.rewriting.twins import Traced

_log = logging.getLogger(__name__)
_HISTORY: deque[Rewrite] = deque(maxlen=64)
_ATTENTION = ("softmax", "scaled_dot_product_attention")


def last_rewrites() -> tuple[Rewrite, ...]:
    """What the backend did in its last compilations (64 at most), oldest first."""
    return tuple(_HISTORY)


def fla_swap_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend. `mode` and `options` are Inductor's; `options={"inductor": False}` runs the rewritten graph.

    Raises RewriteError, when the compiled graph runs, if a buffer that a mask was read from has changed.
    """
    own = dict(options or {})
    inductor = own.pop("inductor", True)
    result, read = _rewritten(module, inputs)
    _HISTORY.append(result)
    _log.log(logging.INFO if result.records else logging.WARNING, "%s", result.summary())
    graph = result.program
    assert isinstance(graph, fx.GraphModule)
    compiled: Any = torch._TorchCompileInductorWrapper(mode, own, None)(graph, inputs) if inductor else graph.forward
    return _Watched(compiled, read, inputs) if read else compiled


def _rewritten(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Rewrite, dict[int, str]]:
    """The rewrite, and the inputs (by number) whose values it relies on."""
    if not any(name in str(node.target) for node in module.graph.nodes for name in _ATTENTION):
        return Rewrite(program=module, note="the graph has no attention and is compiled as it came"), {}
    try:
        lowered = lower(module)
    except Exception as error:
        note = f"the graph could not be lowered ({type(error).__name__}: {error}) and is compiled as it came"
        return Rewrite(program=module, note=note.replace("\n", " ")[:400]), {}
    traced = _traced(module, lowered, inputs)
    found = rewrite_graph(traced)
    if not found.records:
        return Rewrite(program=module, skipped=found.skipped, note="the graph is compiled as it came"), {}
    numbers = [n.name for n in lowered.graph.nodes if n.op == "placeholder"]
    _name_constants(lowered)
    read = {numbers.index(name): traced.weights.get(name, name) for name in found.read}
    return Rewrite(program=lowered, records=found.records, skipped=found.skipped), read


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph in ATen operators before decomposition, with what Dynamo noted on its placeholders."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["example_value"] for n in placeholders]
    for fake in fakes:
        _guard_number(fake)
    mode = next((f.fake_mode for f in fakes if isinstance(f, torch._subclasses.FakeTensor)), None)
    shapes = None if mode is None else mode.shape_env
    with mode or nullcontext(), nullcontext() if shapes is None else shapes.suppress_guards():
        lowered = make_fx(module, pre_dispatch=True)(*fakes)
    _plain_numbers(lowered)
    lowered.meta.update(module.meta)
    sources: Any = dict(getattr(module, "_param_name_to_source", {}))
    lowered._param_name_to_source = sources
    own = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    for node, before in zip(own, placeholders, strict=True):
        for name in ("tensor_dict", "grapharg", "example_value"):
            if name in before.meta:
                node.meta[name] = before.meta[name]
        node._dynamo_source = getattr(before, "_dynamo_source", None)
    return lowered


def _guard_number(fake: Any) -> None:
    """With dynamic=True a Python number (scale, softcap) is an input: with a guard on it, it is a constant."""
    number = getattr(fake, "item_memo", None)
    if isinstance(number, torch.SymFloat):
        guard_scalar(number)


def _plain_numbers(lowered: fx.GraphModule) -> None:
    """Numbers that are guarded become constants of the graph."""
    for node in list(lowered.graph.nodes):
        number = node.meta.get("val") if node.op == "call_function" and "item" in str(node.target) else None
        if isinstance(number, torch.SymFloat) and number.node.expr.is_number:
            node.replace_all_uses_with(float(number.node.expr))  # type: ignore[arg-type]
            lowered.graph.erase_node(node)
    lowered.recompile()


def _name_constants(lowered: fx.GraphModule) -> None:
    """Drop the constants that nothing reads any more; of the others, AOTAutograd asks where they come from."""
    sources: Any = lowered._param_name_to_source
    used = {str(n.target) for n in lowered.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in (*lowered.named_buffers(), *lowered.named_parameters())]:
        if name in used:
            sources.setdefault(name, ConstantSource(source_name=name))
        elif hasattr(lowered, name):
            delattr(lowered, name)


def _traced(module: fx.GraphModule, lowered: fx.GraphModule, inputs: Sequence[Any]) -> Traced:
    """Parameters and buffers stand among the inputs; everything else is what the model reads."""
    weights: dict[str, str] = {}
    values: dict[str, Any] = {}
    data = set()
    own = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    theirs = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, before, value in zip(own, theirs, inputs, strict=True):
        if not isinstance(value, Tensor):
            continue
        source = getattr(getattr(before, "_dynamo_source", None), "name", "")
        source = source() if callable(source) else source
        if isinstance(value, nn.Parameter) or "._parameters[" in source:
            weights[node.name] = before.name
        elif "._buffers[" in source and not isinstance(value, torch._subclasses.FakeTensor):
            weights[node.name], values[node.name] = before.name, value
        else:
            data.add(node.name)
    return Traced(module=lowered, weights=weights, values=values, data=frozenset(data))


class _Watched:
    """A compiled graph that relies on the values of some of its inputs: buffers that a mask was read from."""

    def __init__(self, compiled: Callable[..., Any], read: Mapping[int, str], inputs: Sequence[Any]):
        self.compiled, self.read = compiled, dict(read)
        self.seen = {number: (_version(inputs[number]), inputs[number].clone()) for number in read}

    def __call__(self, *args: Any) -> Any:
        for number, (version, value) in self.seen.items():
            if _version(args[number]) != version:
                if not torch.equal(args[number], value):
                    raise RewriteError(
                        f"buffer {self.read[number]} has changed since attention was compiled with the mask that it "
                        "holds; call torch._dynamo.reset() after changing it"
                    )
                self.seen[number] = (_version(args[number]), value)
        return self.compiled(*args)


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
