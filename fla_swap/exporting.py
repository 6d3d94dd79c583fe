"""`torch.export` with two ways around code that it cannot follow: real values for branches, and opaque modules.

A branch on values that no data reach (a rotary embedding that looks at the longest position) is taken as the real
values take it: the graph then holds for that length. A module that loops over its data (routed experts written as a
loop) is replaced by one that only says that its outputs depend on its inputs; what it contains is not looked at, and a
note says so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_leaves, tree_map

from fla_swap.arguments import undisturbed
from fla_swap.model_inputs import Inputs

ROUNDS = 6
CALLS = ("forward", "_call_impl")
NO_BACKWARD = "does not support backward on CPU"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """`branched`: branches were taken by real values. `opaque`: the modules that were not looked into."""

    program: torch.export.ExportedProgram
    branched: bool = False
    opaque: tuple[str, ...] = ()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For an export that may well fail: what torch logs of shapes that do not fit together stays out of the log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def exports(model: nn.Module, inputs: Inputs) -> Iterator[Exported | Exception]:
    """The export, then what each way around gives, as results or as the errors that they ran into."""
    first = _attempt(model, inputs)
    yield first
    if not isinstance(first, Exception):
        return
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
        found = _attempt(model, inputs)
    yield Exported(program=found.program, branched=True) if isinstance(found, Exported) else found
    yield _around(model, inputs, first)


def _attempt(model: nn.Module, inputs: Inputs) -> Exported | Exception:
    """The export or its error. torch prints the graph of some that fail: that alone is kept off the console."""
    args, kwargs = inputs
    said, graph = io.StringIO(), None
    try:
        with undisturbed(model, use_cache=False), contextlib.redirect_stderr(said):
            return Exported(program=torch.export.export(model, args, kwargs, strict=False))
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        if NO_BACKWARD in str(error) and torch.is_grad_enabled():
            with torch.no_grad():
                return _attempt(model, inputs)
        return error
    finally:
        text = said.getvalue()
        sys.stderr.write(text if graph is None else text.replace(f"{graph}\n", ""))


def _around(model: nn.Module, inputs: Inputs, error: Exception) -> Exported | Exception:
    """Export with every module opaque in which an export failed, and those of its class."""
    names = {module: name for name, module in model.named_modules()}
    opaque: list[nn.Module] = []
    for _ in range(ROUNDS):
        culprit = _culprit(error, model)
        if culprit is None or culprit in opaque:
            return error
        opaque += [m for m in model.modules() if type(m) is type(culprit)]
        try:
            with _outputs_only(model, inputs, opaque):
                found = _attempt(model, inputs)
        except Exception as failed:
            return failed
        if isinstance(found, Exported):
            return Exported(program=found.program, opaque=tuple(names[m] for m in opaque))
        error = found
    return error


def _culprit(error: Exception, model: nn.Module) -> nn.Module | None:
    """The innermost submodule whose forward was running."""
    known = {id(m) for m in model.modules()} - {id(model)}
    found, trace = None, error.__traceback__
    chain: BaseException | None = error
    while chain is not None and found is None:
        trace = chain.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            called = trace.tb_frame.f_code.co_name in CALLS
            if called and isinstance(owner, nn.Module) and id(owner) in known:
                found = owner
            trace = trace.tb_next
        chain = chain.__cause__ or chain.__context__
    return found


@contextlib.contextmanager
def _outputs_only(model: nn.Module, inputs: Inputs, opaque: list[nn.Module]) -> Iterator[None]:
    """Each opaque module returns tensors of the shapes that it returns on these inputs, made of its inputs' sum."""
    shapes: dict[nn.Module, list[Any]] = {m: [] for m in opaque}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        shapes[module].append(tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, output))

    hooks = [m.register_forward_hook(note) for m in opaque]
    args, kwargs = inputs
    try:
        with undisturbed(model, use_cache=False):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        for module in opaque:
            module.forward = _Stub(shapes[module])
        yield
    finally:
        for module in opaque:
            module.__dict__.pop("forward", None)


class _Stub:
    """Outputs of known shapes whose every entry depends on all inputs. Calls take turns."""

    def __init__(self, outputs: list[Any]):
        self.outputs, self.calls = outputs, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        total = torch.stack([t.float().sum() for t in tensors]).sum()
        output = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1

        def like(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (torch.zeros(value.shape, device=total.device) + total).to(value.dtype)

        return tree_map(like, output)
