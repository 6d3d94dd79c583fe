"""Which layers keep their softmax attention: scored by what it costs the whole model to be without them.

Every layer is swapped and calibrated; then original layers are put back, and what counts is how far that brings the
model's predictions to the original's (KL on the logits). Few layers of a model copy from far back, and losing those
costs more than all the others together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.distillation.calibration import Calibrated, calibrate
from fla_swap.distillation.config import CalibrationConfig
from fla_swap.distillation.losses import CausalModel, kl_divergence
from fla_swap.distillation.teacher import Teacher
from fla_swap.errors import PlanError
from fla_swap.swapping import restore_, swap_, swapped_layers
from fla_swap.types import SwapPlan

METHODS = ("greedy", "leave_one_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a selection found.

    kept: layer numbers (`AttentionSite.layer`) that should stay, in model order.
    start: KL to the original, nats a token, with every layer of the plan swapped and calibrated.
    scores: layer number → KL with that one layer put back.
    steps: (layer number, KL) of the layers as they were chosen; each KL includes the layers before it.
    calibrated: what calibration made of each mixer, for `distill(..., calibrated=…)`; it does not depend on the choice.
    """

    kept: tuple[int, ...]
    start: float
    scores: dict[int, float]
    steps: tuple[tuple[int, float], ...]
    calibrated: Calibrated

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON data."""
        return {name: getattr(self, name) for name in ("kept", "start", "scores", "steps")}


@torch.no_grad()
def select_layers(
    model: nn.Module,
    plan: SwapPlan,
    blocks: Tensor,
    keep: int,
    *,
    method: str = "greedy",
    calibration: CalibrationConfig | None = None,
) -> Selection:
    """Choose the `keep` layers of `plan` that had better stay as they are. The model is left alone.

    Args:
        model: the original model, not swapped.
        plan: swaps every layer that may be swapped (`fs.plan(..., keep=0)`).
        blocks: training token blocks [n, T] int64; the first `calibration.sequences` calibrate, the next 8 judge.
        method: "greedy" puts back the best layer, then the best beside it, …; "leave_one_out" the best ones alone.
    Raises:
        PlanError: `keep` is not between 0 and the number of planned layers, or the method is unknown.
    """
    if method not in METHODS:
        raise PlanError(f"the method of selection is {method!r}; it must be one of {list(METHODS)}")
    if not 0 <= keep <= len(plan.layers):
        raise PlanError(f"cannot keep {keep} of {len(plan.layers)} layers")
    config = calibration or CalibrationConfig()
    rows = blocks[config.sequences :][:8] if blocks.shape[0] > config.sequences else blocks[:8]
    rows = rows[:, : config.length].to(next(model.parameters()).device)
    swap_(model, plan)
    try:
        layers = calibrate(model, blocks, config)
        weights = {
            fqn: {name: tensor.clone() for name, tensor in module.mixer.state_dict().items()}
            for fqn, module in swapped_layers(model)
        }
        return choose(Judge(model, rows), keep, method, Calibrated(layers=tuple(layers), weights=weights))
    finally:
        restore_(model)


def choose(judge: Judge, keep: int, method: str, calibrated: Calibrated) -> Selection:
    """Put layers back one after the other."""
    start = judge.divergence(())
    scores = {layer: judge.divergence((layer,)) for layer in judge.layers}
    chosen: list[tuple[int, float]] = []
    round_scores = scores
    while len(chosen) < keep:
        best = min(round_scores, key=lambda layer: round_scores[layer])
        chosen.append((best, round_scores[best]))
        rest = [layer for layer in round_scores if layer != best]
        if len(chosen) == keep:
            break
        if method == "greedy":
            taken = tuple(layer for layer, _ in chosen)
            round_scores = {layer: judge.divergence((*taken, layer)) for layer in rest}
        else:
            round_scores = {layer: scores[layer] for layer in rest}
    kept = tuple(sorted(layer for layer, _ in chosen))
    return Selection(kept=kept, start=start, scores=scores, steps=tuple(chosen), calibrated=calibrated)


class Judge:
    """Measures a swapped model with some of its original layers put back."""

    def __init__(self, student: nn.Module, rows: Tensor):
        self.layers: dict[int, Any] = {module.site.layer: module for _, module in swapped_layers(student)}
        self.rows = rows
        teacher = Teacher(student, shared=True)
        self.targets = [teacher(part) for part in rows.split(4)]
        self.cut = CausalModel(student)

    def divergence(self, restored: Iterable[int]) -> float:
        """Mean KL(original ‖ student) in nats a token, with the `restored` layers running their originals."""
        with self._restored(restored):
            parts = [
                float(kl_divergence(self.cut.hidden(rows), self.cut.head, target, head)) * rows.shape[0]
                for rows, (target, head) in zip(self.rows.split(4), self.targets, strict=True)
            ]
        return sum(parts) / self.rows.shape[0]

    @contextmanager
    def _restored(self, layers: Iterable[int]) -> Iterator[None]:
        modules = [self.layers[layer] for layer in layers]
        try:
            for module in modules:
                module.use_original = True
            yield
        finally:
            for module in modules:
                module.use_original = False
