"""Models without weights: parameters on the meta device, of which only shapes are known.

Buffers (rotary frequencies, tables) must have values, since a site is read off them: those that were built on the meta
device are computed again. Calls then run with real masks, positions and rotary tables, and with hidden states of which
only the shape exists.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fla_swap.errors import CaptureError

Replaced = tuple[dict[str, Any], str, Tensor]
META, CPU = torch.device("meta"), torch.device("cpu")


@contextlib.contextmanager
def without_weights(model: nn.Module) -> Iterator[bool]:
    """While open, a model on the meta device can be exported and called with real inputs. Yields whether it is on meta.

    Its buffers have values; its parameters are fake tensors on the CPU, of which only the shape exists, and so is what
    is computed from them. Everything is put back afterwards. A model with weights is not touched.

    Raises CaptureError for a buffer that cannot be computed again.
    """
    fresh = _buffers(model)
    replaced: list[Replaced] = []
    try:
        replaced.extend(_replace(model, fresh))
        yield bool(replaced)
    finally:
        for holder, name, before in replaced:
            holder[name] = before


def _replace(model: nn.Module, fresh: dict[nn.Module, dict[str, Tensor]]) -> Iterator[Replaced]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in memo:
                    with mode:
                        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device=CPU)
                    memo[id(parameter)] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
                module._parameters[name] = memo[id(parameter)]
                yield module._parameters, name, parameter
        for name, value in fresh.get(module, {}).items():
            before = module._buffers[name]
            assert before is not None
            module._buffers[name] = value
            yield module._buffers, name, before


def _buffers(model: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
    """The values of every buffer on the meta device, by the module that holds it."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    initialisers: dict[str, Any] = {}
    for fqn, module in model.named_modules():
        if hasattr(module, "_init_weights"):
            initialisers[fqn] = module._init_weights
        names = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
        if names:
            parents = [p for p in initialisers if not p or fqn == p or fqn.startswith(f"{p}.")]
            initialise = initialisers[max(parents, key=len)] if parents else None
            found[module] = _recomputed(fqn, module, names, initialise)
    return found


def _recomputed(fqn: str, module: nn.Module, names: list[str], initialise: Any) -> dict[str, Tensor]:
    """Fill the buffers of a copy twice, over different contents: what comes out the same has been computed."""
    attempts = [_initialised(module, names, initialise, filler) for filler in (0, 1)]
    for name in names:
        first, second = (a.get(name) for a in attempts)
        if first is None or second is None or not torch.equal(first, second):
            full = f"{fqn}.{name}" if fqn else name
            raise CaptureError(
                f"buffer {full!r} is on the meta device, and {type(module).__name__} has no code that computes it "
                "again: build the model under accelerate.init_empty_weights(), which leaves buffers their values"
            )
    return attempts[0]


def _initialised(module: nn.Module, names: list[str], initialise: Any, filler: int) -> dict[str, Tensor]:
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, memo)
    for name in names:
        buffer = twin._buffers[name]
        assert buffer is not None
        twin._buffers[name] = torch.full(buffer.shape, filler, dtype=buffer.dtype, device=CPU)
    reset: Any = getattr(twin, "reset_parameters", None)
    try:
        with torch.no_grad():
            if initialise is not None:
                initialise(twin)
            elif reset is not None:
                reset()
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, KeyError):
        return {}
    kept = {name: twin._buffers[name] for name in names}
    return {name: b for name, b in kept.items() if b is not None and not b.is_meta}


def _on_meta(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device=META)
    return nn.Parameter(shape, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
