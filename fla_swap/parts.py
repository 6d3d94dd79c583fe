"""Part of a model on its own: called as the whole model calls it, where the whole cannot be exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fla_swap.errors import CaptureError
from fla_swap.model_inputs import Inputs, closed_input
from fla_swap.recording import record_calls


def call_of_part(model: nn.Module, name: str, inputs: Inputs) -> tuple[Inputs, Callable[[str, Any], bool]]:
    """What the module `name` is called with when the model runs on `inputs`, and which of that carries no data.

    The model runs twice, on different data of one shape: masks, positions and rotary tables are what is the same both
    times. Raises CaptureError when there is no such module, or it is not called.
    """
    try:
        model.get_submodule(name)
    except AttributeError as error:
        raise CaptureError(f"within={name!r}: {type(model).__name__} has no such module ({error})") from error
    calls = [record_calls(model, [name], given).get(name) for given in (inputs, _varied(inputs))]
    first, second = calls
    if first is None or second is None:
        raise CaptureError(
            f"within={name!r}: the module is not called when {type(model).__name__} runs on these inputs"
        )
    given, other = tree_leaves((first.args, first.kwargs)), tree_leaves((second.args, second.kwargs))
    zeros: dict[int, Tensor] = {}
    real = tree_map_only(
        FakeTensor,
        lambda t: zeros.setdefault(id(t), torch.zeros(t.shape, dtype=t.dtype, device=t.device)),
        (first.args, first.kwargs),
    )
    same = {
        id(now)
        for now, before, after in zip(tree_leaves(real), given, other, strict=True)
        if not isinstance(before, Tensor) or (not isinstance(before, FakeTensor) and torch.equal(before, after))
    }
    return real, lambda _, value: not isinstance(value, Tensor) or id(value) in same


def _varied(inputs: Inputs) -> Inputs:
    """The same masks and positions, other data."""
    generator = torch.Generator().manual_seed(7)

    def vary(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or closed_input(name, value):
            return value
        if value.is_floating_point():
            return value + torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        turned = value.flip(1)
        return torch.where(value > 0, value - 1, value + 1) if torch.equal(turned, value) else turned

    args = tuple(vary(str(position), value) for position, value in enumerate(inputs[0]))
    return args, {name: vary(name, value) for name, value in inputs[1].items()}
