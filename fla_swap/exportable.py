"""What stands in, while a model is inspected, for what `torch.export` cannot follow or what has no values.

- Parameters on the meta device, of which only shapes are known, and quantised ones: fake tensors. Whatever is computed
  from them is fake too, while masks, positions and rotary tables stay real.
- Buffers on the meta device (rotary frequencies, tables): a site is read off them, so they are computed again.
- Compiled modules: their own code.
- Attention kernels (flash attention, flex attention, kernels from the hub): the model's own eager code.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fla_swap.errors import CaptureError
from fla_swap.mixers.base import is_quantised

META, CPU = torch.device("meta"), torch.device("cpu")
KERNELS = ("flash", "flex", "paged")


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """`weights`: whether parameters have no values now. `notes`: what was replaced, for the report."""

    weights: bool
    notes: tuple[str, ...]


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[StandIns]:
    """While open, the model can be exported and called with real inputs on the CPU. Everything is put back afterwards.

    Raises CaptureError for a buffer on the meta device that cannot be computed again.
    """
    fresh = _buffers(model)
    swaps = _Swaps()
    try:
        _without_compilation(model, swaps)
        kernels = _without_kernels(model, swaps)
        weights = _without_weights(model, swaps)
        for module, buffers in fresh.items():
            for name, value in buffers.items():
                swaps.put(module._buffers, name, value)
        yield StandIns(weights=bool(weights), notes=_notes(kernels, weights))
    finally:
        swaps.undo()


class _Swaps:
    """Entries of dictionaries that were replaced, and what stood there."""

    def __init__(self) -> None:
        self.before: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, holder: dict[str, Any], name: str, value: Any) -> None:
        self.before.append((holder, name, holder[name]))
        holder[name] = value

    def undo(self) -> None:
        for holder, name, value in reversed(self.before):
            holder[name] = value


def _notes(kernels: list[str], weights: list[Tensor]) -> tuple[str, ...]:
    notes = [
        f"attn_implementation {name!r} is a kernel that cannot be exported: eager code was captured and proved"
        for name in sorted(set(kernels))
    ]
    if any(is_quantised(w) for w in weights):
        notes.append("quantised weights were taken for plain ones of the same shape, activations too")
    return tuple(notes)


def _without_compilation(model: nn.Module, swaps: _Swaps) -> None:
    """Modules that were compiled, in place or wrapped, run their own code."""
    for module in model.modules():
        inner = module._modules.get("_orig_mod")
        if inner is not None and "forward" in vars(module):
            swaps.put(vars(module), "forward", inner.__call__)
        if vars(module).get("_compiled_call_impl") is not None:
            swaps.put(vars(module), "_compiled_call_impl", None)


def _without_kernels(model: nn.Module, swaps: _Swaps) -> list[str]:
    """Every config in the model that names an attention kernel says "eager" instead; returns the names."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    found = []
    for config in configs.values():
        name = vars(config).get("_attn_implementation_internal")
        if isinstance(name, str) and ("/" in name or any(kernel in name for kernel in KERNELS)):
            swaps.put(vars(config), "_attn_implementation_internal", "eager")
            found.append(name)
    return found


def _without_weights(model: nn.Module, swaps: _Swaps) -> list[Tensor]:
    """Parameters on the meta device and quantised ones become fake tensors; returns what they were."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not (parameter.is_meta or is_quantised(parameter)):
                continue
            if parameter not in fakes:
                with mode:
                    device = CPU if parameter.is_meta else parameter.device
                    shape = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                fakes[parameter] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
            swaps.put(module._parameters, name, fakes[parameter])
    return list(fakes)


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
