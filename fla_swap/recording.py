"""What an owner module is given and returns, and where it gets its cache: watched by hooks in eager calls."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fla_swap.arguments import Args, Kwargs, leaves, undisturbed
from fla_swap.errors import CaptureError, FlaSwapError
from fla_swap.model_inputs import own_failure
from fla_swap.types import ArgPath
from fla_swap.wrappers import config_of


@dataclass(kw_only=True)
class CallRecord:
    """One observed call of an owner: what it was given and what it returned."""

    args: Args
    kwargs: Kwargs
    output: Any = None


@dataclass(kw_only=True)
class CacheRecord:
    """Where an owner got the cache from, and the number with which it updated it."""

    path: ArgPath | None = None
    index: int | None = None


@dataclass(kw_only=True)
class _Stack:
    names: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _watched(model: nn.Module, owners: Iterable[str], before: Any, after: Any, *, use_cache: bool) -> Iterator[None]:
    handles = []
    try:
        for name in owners:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        with undisturbed(model, use_cache=use_cache):
            yield
    finally:
        for handle in handles:
            handle.remove()


def record_calls(model: nn.Module, owners: Iterable[str], inputs: tuple[Args, Kwargs]) -> dict[str, CallRecord]:
    """Run the model once and keep what each owner was called with. An owner that was not called is missing.

    Raises CaptureError when the model does not run on these inputs.
    """
    records: dict[str, CallRecord] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            records.setdefault(name, CallRecord(args=args, kwargs=dict(kwargs)))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if records[name].output is None:
                records[name].output = output

        return hook

    with _watched(model, list(owners), before, after, use_cache=False):
        try:
            model(*inputs[0], **inputs[1])
        except FlaSwapError:
            raise
        except Exception as error:
            raise CaptureError(own_failure(model, inputs, error)) from error
    return records


def record_cache(model: nn.Module, owners: Iterable[str], inputs: tuple[Args, Kwargs]) -> dict[str, CacheRecord]:
    """Run the model once and note who updates its cache, and under which number.

    The cache is transformers' usual one, or, where the model refuses that, the one that it makes itself.
    """
    import transformers

    config = config_of(model)
    own = transformers.DynamicCache(config=config) if config is not None else transformers.DynamicCache()
    given: Any = own
    if getattr(config, "is_encoder_decoder", False):
        given = transformers.EncoderDecoderCache(own, transformers.DynamicCache())
    try:
        return _record_cache(model, list(owners), inputs, given)
    except ValueError:
        return _record_cache(model, list(owners), inputs, None)


def _by_layer(cache: Any) -> Iterator[tuple[str, Any, inspect.Signature]]:
    """The methods of a cache that must be told a layer: `update`, and those for states of linear layers."""
    for name in dir(type(cache)):
        method = getattr(cache, name) if not name.startswith("_") and callable(getattr(type(cache), name)) else None
        if method is not None:
            signature = inspect.signature(method)
            if (
                "layer_idx" in signature.parameters
                and signature.parameters["layer_idx"].default is inspect.Parameter.empty
            ):
                yield name, method, signature


def _record_cache(
    model: nn.Module, owners: list[str], inputs: tuple[Args, Kwargs], given: Any
) -> dict[str, CacheRecord]:
    import transformers

    found: dict[str, CacheRecord] = {}
    stack, watched = _Stack(), []

    def watch(cache: Any) -> None:
        for name, method, signature in _by_layer(cache):
            setattr(cache, name, noted(method, signature))
        watched.append(cache)

    def noted(method: Any, signature: inspect.Signature) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if stack.names:
                given = signature.bind(*args, **kwargs).arguments
                found.setdefault(stack.names[-1], CacheRecord()).index = given["layer_idx"]
            return method(*args, **kwargs)

        return call

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            stack.names.append(name)
            for path, value in leaves(args, kwargs):
                if isinstance(value, transformers.Cache):
                    found.setdefault(name, CacheRecord()).path = path
                    own = getattr(value, "self_attention_cache", value)
                    if not any(own is cache for cache in watched):
                        watch(own)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stack.names.pop()

        return hook

    kwargs = {**inputs[1], "past_key_values": given, "use_cache": True}
    with _watched(model, owners, before, after, use_cache=True):
        model(*inputs[0], **kwargs)
    return found
