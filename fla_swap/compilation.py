"""Compiled forward, prefill and decode, behind transformers' unchanged API.

One forward, compiled twice without graph breaks: for several tokens (length dynamic) and for one token on a cache.
`generate` gets a static cache, whose tensors and states stay at fixed addresses, so that a decode step can be a CUDA
graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from transformers import StaticCache

from fla_swap.decoding import Decoder, allocate, bucket, on_device, with_decode
from fla_swap.errors import SwapError
from fla_swap.few_tokens import few, rewrite
from fla_swap.regions import compile_regions
from fla_swap.rewriting.backend import lower

Model = TypeVar("Model", bound=nn.Module)

# A compiled model's static caches are this many tokens long, or a power of two or half as much again times as many:
# each length is compiled, so there are few.
CACHE_STEP = 64
RECOMPILE_LIMIT = 64
# Arguments with dimensions that vary with the length: name → rank → those dimensions.
TIME: dict[str, dict[int, list[int]]] = {
    "input_ids": {2: [1]},
    "inputs_embeds": {3: [1]},
    "attention_mask": {2: [1], 4: [2, 3]},
    "position_ids": {2: [1]},
    "labels": {2: [1]},
    "token_type_ids": {2: [1]},
}


def cache_length(tokens: int) -> int:
    """The length of the static cache that holds so many tokens."""
    size = CACHE_STEP
    while size < tokens:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size


def whole_graph(
    forward: Callable[..., Any], *, backend: str = "inductor", dynamic: bool | None = None
) -> Callable[..., Any]:
    """`forward` compiled without graph breaks; Inductor compiles each distinct layer once (`regions`).

    dynamic: False: only the lengths that are marked vary; what decodes is compiled for its rows and its cache.
    """
    chosen: Any = by_layer if backend == "inductor" else backend
    return torch.compile(forward, fullgraph=True, backend=chosen, dynamic=dynamic, **_own_limits())


def by_layer(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, layer by layer in inference; a graph with gradients is compiled in one piece."""
    from torch._inductor.compile_fx import compile_fx

    def compile_piece(piece: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        return cast(Callable[..., Any], compile_fx(piece, list(values)))

    if torch.is_grad_enabled():
        return compile_piece(module, inputs)
    return compile_regions(module, lambda piece, values: compile_piece(for_few_tokens(piece, values), values))


def for_few_tokens(piece: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """A piece that a GPU runs on few tokens, rewritten (`few_tokens`); another one as it is."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    plain = all(type(t) is FakeTensor and t.device.type == "cuda" for t in tensors)
    if not plain or not few(tensors) or torch.is_autocast_enabled("cuda"):
        return piece
    lowered = lower(piece)
    if not rewrite(lowered.graph):
        return piece
    lowered.recompile()
    return lowered


class CompiledForward:
    """Takes the place of a model's `forward`: sends a call to the compiled decode step or the compiled rest."""

    def __init__(self, forward: Callable[..., Any], *, backend: str):
        functools.update_wrapper(self, forward)
        self.__signature__ = inspect.signature(forward)
        self.whole = whole_graph(forward, backend=backend)
        self.fixed = whole_graph(forward, backend=backend, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        tokens = next((given[n].shape[1] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
        cache = given.get("past_key_values")
        run = self.fixed if on_device(cache) else self.whole
        if tokens == 1 and cache is not None:
            return run(*args, **kwargs)
        for name, dimensions in TIME.items():
            value = given.get(name)
            for tensor in value.values() if isinstance(value, dict) else (value,):  # a mask for each kind of layer
                if isinstance(tensor, Tensor) and tensor.dim() in dimensions:
                    torch._dynamo.maybe_mark_dynamic(tensor, dimensions[tensor.dim()])
        return run(*args, **kwargs)


class StaticCachePreparation:
    """Takes the place of `_prepare_cache_for_generation`: a static cache unless the caller asks for another one."""

    def __init__(self, model: nn.Module, prepare: Callable[..., Any], decoder: Decoder):
        self.model, self.prepare, self.decoder = model, prepare, decoder

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        model: Any = self.model
        chosen = generation_config.cache_implementation is not None or generation_config.use_cache is False
        mode = str(generation_mode).lower()
        rolls_back = generation_config.is_assistant or "assisted" in mode
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if not (chosen or rolls_back or model_kwargs.get("past_key_values") is not None):
            generation_config.cache_implementation = "static"
            max_cache_length = cache_length(max_cache_length)
            single = mode.endswith(("sample", "greedy_search")) and not model.config.is_encoder_decoder
            if single and not generation_config.return_dict_in_generate:
                cache = self.decoder.cache(model, bucket(rows), max_cache_length)
                if on_device(cache):
                    model_kwargs["past_key_values"] = cache
                    generation_config.cache_implementation = None
                    return None
        result = self.prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, StaticCache):
            allocate(model, cache, rows)
        return result


def compile(model: Model, *, backend: str = "inductor", cuda_graphs: bool | None = None) -> Model:
    """Compile the forward and the decode step of `model`, in place, as whole graphs (`fullgraph=True`).

    `model(...)` and `model.generate(...)` are called as before; the first call of a kind compiles. `generate` uses a
    static cache unless it is told otherwise (or has to roll back: assisted decoding). `uncompile` undoes it.

    Args:
        cuda_graphs: run the decode step as a CUDA graph; None: on CUDA devices.
    Raises:
        SwapError: the model is compiled already.
        torch._dynamo.exc.Unsupported: something in the model's own code breaks the graph.
    """
    if isinstance(vars(model).get("forward"), CompiledForward):
        raise SwapError("this model is compiled already; `uncompile` it first")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    graphs = device.type == "cuda" if cuda_graphs is None else cuda_graphs
    target: Any = model
    forward = CompiledForward(target.forward, backend=backend)
    if hasattr(model, "_prepare_cache_for_generation"):
        decoder = Decoder(forward.fixed, cuda_graphs=graphs)
        prepare = target._prepare_cache_for_generation
        target._prepare_cache_for_generation = StaticCachePreparation(model, prepare, decoder)
        target._valid_auto_compile_criteria = _never
        target.__class__ = with_decode(type(model), decoder)
    target.forward = forward
    return model


def uncompile(model: Model) -> Model:
    """Undo `compile`, in place."""
    if not isinstance(vars(model).get("forward"), CompiledForward):
        raise SwapError("this model is not compiled")
    for name in ("forward", "_prepare_cache_for_generation", "_valid_auto_compile_criteria"):
        if name in vars(model):
            delattr(model, name)
    if "_sample" in vars(type(model)):
        model.__class__ = type(model).__base__  # type: ignore[assignment]
    return model


def _never(*args: Any, **kwargs: Any) -> bool:
    """transformers would compile the decode step once more, around the compiled one."""
    return False


def _own_limits() -> dict[str, Any]:
    """Recompilations counted for this model alone, where torch can (2.13): `fullgraph` makes the limit an error."""
    known = inspect.signature(torch.compile).parameters
    wanted = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    return {name: value for name, value in wanted.items() if name in known}
