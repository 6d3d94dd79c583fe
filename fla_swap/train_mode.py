"""What an owner does differently in training mode: dropout, told apart by what it drops."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DROPOUT = (F.dropout, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """One dropout that was called: the probability, and the tensor that it would have thinned out."""

    p: float
    x: Tensor


class _DropoutProbe(TorchFunctionMode):
    """Notes every dropout and drops nothing. `probabilities`: what fused attention drops of the attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities = 0.0
        self.found: list[Dropped] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            bound = list(args)
            if len(bound) > 4:
                self.probabilities, bound[4] = max(self.probabilities, float(bound[4])), 0.0
            self.probabilities = max(self.probabilities, float(kwargs.pop("dropout_p", 0.0)))
            return func(*bound, **kwargs)
        if func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs)
            if given.arguments.get("training", True):
                self.probabilities = max(self.probabilities, float(given.arguments["dropout_p"]))
            given.arguments["dropout_p"] = 0.0
            return func(*given.args, **given.kwargs)
        if func in DROPOUT:
            return self._dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def _dropout(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "p", "train" if func is torch.dropout else "training")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        p = float(given.get("p", 0.5))
        if given.get(names[2], func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)) and p > 0:
            self.found.append(Dropped(p=p, x=given["input"]))
        return given["input"]


@dataclass(frozen=True, kw_only=True)
class TrainMode:
    """Dropout of an owner: of the attention `probabilities`, of its `output` (before a residual), and `others`: the
    probability and shape of each that a site has no word for. `scores`: what is dropped of the scores before a softmax.
    `returned`: the owner's output in training mode with nothing dropped."""

    returned: Tensor
    probabilities: float
    output: float
    scores: float
    others: tuple[tuple[float, tuple[int, ...]], ...]


def train_mode(
    twin: nn.Module, run: Callable[[], Tensor], residual: Tensor | None, lengths: tuple[int, int]
) -> TrainMode:
    """Run an owner in training mode, its dropout told apart by value. `run` returns its output [B, T, D] in any mode.

    `lengths` T, S; `residual` [B, T, D] is what it adds to the attention's output.
    """
    probe = _DropoutProbe()
    twin.train()
    try:
        with torch.no_grad(), probe:
            returned = run()
    finally:
        twin.eval()
    output = returned if residual is None else returned - residual
    probabilities, after, scores, others = probe.probabilities, 0.0, 0.0, []
    for dropped in probe.found:
        if _same(dropped.x, output):
            after = 1 - (1 - after) * (1 - dropped.p)
        elif dropped.x.dim() >= 3 and dropped.x.shape[-2:] == lengths:
            if _are_probabilities(dropped.x):
                probabilities = max(probabilities, dropped.p)
            else:
                scores = max(scores, dropped.p)
        else:
            others.append((dropped.p, tuple(dropped.x.shape)))
    return TrainMode(
        returned=returned, probabilities=probabilities, output=after, scores=scores, others=tuple(dict.fromkeys(others))
    )


def _are_probabilities(x: Tensor) -> bool:
    """Whether the rows are not negative and sum to 1, or less where a sink takes the rest."""
    return bool((x >= 0).all()) and bool((x.sum(-1) <= 1 + 1e-3).all())


def _same(x: Tensor, output: Tensor) -> bool:
    """Whether `x` holds the values of `output` [B, T, D], in that order or with the tokens first."""
    if x.numel() != output.numel():
        return False
    size = float(output.abs().max())
    orders = (output, output.transpose(0, 1))
    return any(bool((x.reshape(-1) - o.reshape(-1)).abs().max() <= 1e-4 * size) for o in orders)
