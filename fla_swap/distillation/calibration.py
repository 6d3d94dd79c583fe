"""The gradient-free start: decay, write strength, scales and output map, fitted to the attention replaced.

On a few sequences, each mixer sees the inputs of its layer in the original model. Half-lives come from the attention's
mean distance, write strengths from its entropy (Taylor-Calibrate); both are tried per head and kept where they help.
Then the heads' scales and the output projection are solutions of least-squares problems. Every change is judged on
sequences that it was not fitted to, and undone when the layer's error does not fall.

Legend for shapes: S sequences, T time, D hidden size, H heads, V value width, C = H·V channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.distillation.alignment import LayerCall, record_calls
from fla_swap.distillation.config import CalibrationConfig
from fla_swap.mixers.softmax import Softmax

RIDGES = (1.0, 0.1, 0.01, 0.001)
SEQUENCES_LOOKED_AT = 4
"""For what is one number per head (distance, entropy, the choice of a half-life); the maps are fitted to all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCalibration:
    """What calibration did to one layer: its relative error before and after, and the changes that were kept."""

    fqn: str
    before: float
    after: float
    kept: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """A calibration that was done already: its record, and the mixers' weights by fqn (as in their `state_dict`)."""

    layers: tuple[LayerCalibration, ...]
    weights: dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a layer's original attention does: heads [S, T, H, V], output [S, T, D] without bias, distance and
    concentration [H]."""

    heads: Tensor
    output: Tensor
    distance: Tensor
    concentration: Tensor


class Layer:
    """One mixer with its calls and evidence; the first half of the sequences is for fitting, the rest for judging."""

    def __init__(self, call: LayerCall, evidence: Evidence):
        self.fqn, self.mixer = call.fqn, call.module.mixer
        self.hidden, self.kwargs = call.mix_arguments()
        self.evidence = evidence
        sequences = self.hidden.shape[0]
        self.fit = max(1, sequences // 2)
        self.judging = slice(self.fit if sequences > 1 else 0, None)
        self.now: Tensor | None = None

    def heads(self) -> Tensor:
        """The mixer's heads [S, T, H, V], fp32; kept until `changed`."""
        heads = self.now
        if heads is None:
            heads = self.now = self.mixer.head_outputs(self.hidden, **self.kwargs).float()
        return heads

    def changed(self, heads: Tensor | None = None) -> None:
        """The mixer's parameters changed; `heads` are the new ones, if known."""
        self.now = heads

    def weight(self) -> Tensor:
        return self.mixer.output_weight().float()

    def error(self, *, scaled: bool = False) -> float:
        """Relative error of the output on the judging sequences; `scaled`: with the heads at their best scale."""
        heads = self.heads()
        if scaled:
            heads = heads * best_scale(self)
        wanted = self.evidence.output[self.judging]
        got = heads[self.judging].flatten(2) @ self.weight().t()
        return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))

    def head_errors(self, sequences: int = SEQUENCES_LOOKED_AT) -> Tensor:
        """[H]: how much of each original head is missed by this mixer's head under its best scale per channel."""
        arguments = {name: first(value, sequences, self.hidden.shape[0]) for name, value in self.kwargs.items()}
        got = self.mixer.head_outputs(self.hidden[:sequences], **arguments).float().flatten(0, 1)
        wanted = self.evidence.heads[:sequences].flatten(0, 1)
        explained = (got * wanted).sum(0).square() / got.square().sum(0).clamp_min(1e-20)
        total = wanted.square().sum((0, 2)).clamp_min(1e-20)
        return 1 - explained.sum(-1) / total


def first(value: Any, count: int, batch: int) -> Any:
    """The first `count` rows of what has a row per sequence."""
    if isinstance(value, tuple):
        return tuple(first(item, count, batch) for item in value)
    return value[:count] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch else value


@torch.no_grad()
def calibrate(model: nn.Module, blocks: Tensor, config: CalibrationConfig) -> list[LayerCalibration]:
    """Fit every calibratable mixer of a swapped model, in place.

    Args:
        blocks: token ids [S, T] int64, training text.
    """
    training = model.training
    model.eval()
    rows = blocks[: config.sequences, : config.length].to(next(model.parameters()).device)
    try:
        calls = record_calls(model, rows)
        return [calibrate_layer(Layer(call, look_at(model, call)), config) for call in calls if can_calibrate(call)]
    finally:
        model.train(training)


def can_calibrate(call: LayerCall) -> bool:
    return bool(getattr(call.module.mixer, "calibratable", False))


def look_at(model: nn.Module, call: LayerCall) -> Evidence:
    """Rebuild the original attention of a layer from its site, and read its heads from it."""
    module: Any = call.module
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    names |= {f"{call.fqn}.{n}": p for n, p in [*module.original.named_parameters(), *module.original.named_buffers()]}
    softmax = Softmax.from_attention(module.site, names)
    assert isinstance(softmax, Softmax)
    hidden, kwargs = call.mix_arguments()
    output, softmax.o_proj = softmax.output_weight(), nn.Identity()
    heads = softmax(hidden, **kwargs)[0].float().unflatten(-1, (softmax.heads, -1))

    def identity(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(values.shape[2], device=values.device, dtype=values.dtype)
        return keys, eye.expand(*values.shape[:2], -1, -1)

    softmax.o_norm = softmax.gate_proj = None  # they act on values, not on probabilities
    few = {name: first(value, SEQUENCES_LOOKED_AT, hidden.shape[0]) for name, value in kwargs.items()}
    weights = softmax(hidden[:SEQUENCES_LOOKED_AT], kv_update=identity, **few)[0].float()
    weights = weights.unflatten(-1, (softmax.heads, -1)).transpose(1, 2)  # [S, H, T, T]
    time = torch.arange(weights.shape[-1], device=weights.device, dtype=torch.float32)
    away = (time[:, None] - time).clamp_min(0)
    entropy = -(weights * weights.clamp_min(1e-20).log()).sum(-1)
    most = (time + 1).log().clamp_min(1e-6)
    return Evidence(
        heads=heads,
        output=heads.flatten(2) @ output.float().t(),
        distance=(weights * away).sum(-1).mean((0, 2)).clamp_min(1.0),
        concentration=(1 - (entropy / most)[..., 1:].mean((0, 2))).clamp(0.05, 0.95),
    )


def calibrate_layer(layer: Layer, config: CalibrationConfig) -> LayerCalibration:
    before = layer.error()
    kept: list[str] = []
    attempt(layer, "half-life", kept, lambda: fit_half_lives(layer, config.half_lives), scaled=True)
    attempt(layer, "beta", kept, lambda: fit_betas(layer, config.betas), scaled=True)
    attempt(layer, "head scale", kept, lambda: fit_head_scale(layer))
    after = layer.error()
    if config.output_map and (error := fit_output_map(layer, after)) < after:
        kept.append("output map")
        after = error
    return LayerCalibration(fqn=layer.fqn, before=before, after=after, kept=tuple(kept))


def attempt(layer: Layer, name: str, kept: list[str], fit: Callable[[], bool], *, scaled: bool = False) -> None:
    """Apply one fit; undo it when the layer's error (`scaled`: with the heads at their best scale) does not fall."""
    saved, heads = {n: t.clone() for n, t in layer.mixer.state_dict().items()}, layer.heads()
    before = layer.error(scaled=scaled)
    fitted = fit()
    if fitted and layer.error(scaled=scaled) < before:
        kept.append(name)
    else:
        layer.mixer.load_state_dict(saved)
        layer.changed(heads)


def fit_half_lives(layer: Layer, multiples: tuple[float, ...]) -> bool:
    return pick_per_head(
        layer,
        layer.mixer.set_half_life_,
        [layer.evidence.distance * m for m in multiples],
    )


def fit_betas(layer: Layer, betas: tuple[float, ...]) -> bool:
    concentration = layer.evidence.concentration
    tried = [concentration if b == 0 else torch.full_like(concentration, b) for b in betas]
    return pick_per_head(layer, layer.mixer.set_beta_, tried)


def pick_per_head(layer: Layer, setter: Callable[[Tensor], None], tried: list[Tensor]) -> bool:
    """Try each [H] tensor, then set for each head what missed least; False when the mixer has no such setting.

    The caller undoes the change when the whole layer's error does not fall.
    """
    errors: list[Tensor] = []
    for values in tried:
        try:
            setter(values)
        except NotImplementedError:
            return False
        errors.append(layer.head_errors())
    best = torch.stack(errors).argmin(0)
    setter(torch.stack(tried).gather(0, best[None])[0])
    layer.changed()
    return True


def best_scale(layer: Layer) -> Tensor:
    """[H, V] that minimises the error of the layer's output on the fitting sequences.

    With y = Σ_c s_c u_c w_c the normal equations are ((UᵀU) ∘ (WᵀW)) s = diag(Uᵀ Y* W); a small ridge pulls s to 1.
    """
    heads, weight = layer.heads(), layer.weight()
    used = heads[: layer.fit].flatten(0, 1).flatten(1)
    wanted = layer.evidence.output[: layer.fit].flatten(0, 1)
    gram = (used.t() @ used) * (weight.t() @ weight)
    right = (used * (wanted @ weight)).sum(0)
    ridge = 1e-2 * gram.diagonal().mean().clamp_min(1e-20)
    eye = torch.eye(gram.shape[0], device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, right + ridge).view(heads.shape[-2:])


def fit_head_scale(layer: Layer) -> bool:
    scale = best_scale(layer)
    layer.mixer.set_head_scale_(scale)
    layer.changed(layer.heads() * scale)
    return True


def fit_output_map(layer: Layer, error: float) -> float:
    """Set o_proj's weight W by ridge regression of the original's output on this mixer's heads, pulled to the W it has.

    The ridge is the one that does best on the judging sequences; the solution that is kept was fitted to all of them.
    Returns the judged error; W is left alone when that is not below `error`.
    """
    if not isinstance(layer.mixer.o_proj, nn.Linear):
        return error
    heads, wanted, parameter = layer.heads().flatten(2), layer.evidence.output, layer.mixer.o_proj.weight
    original = parameter.clone()
    judged: list[tuple[float, float]] = []
    for ridge in RIDGES:
        parameter.copy_(ridge_solution(heads[: layer.fit], wanted[: layer.fit], original.float(), ridge))
        judged.append((layer.error(), ridge))
    best, ridge = min(judged)
    better = math.isfinite(best) and best < error
    parameter.copy_(ridge_solution(heads, wanted, original.float(), ridge) if better else original)
    return best if better else error


def ridge_solution(heads: Tensor, wanted: Tensor, start: Tensor, ridge: float) -> Tensor:
    """argmin_W ‖U Wᵀ − Y‖² + λ ‖W − W₀‖² with λ = ridge · mean diag(UᵀU): heads U [S, T, C], wanted Y [S, T, D]."""
    used, wanted = heads.flatten(0, 1), wanted.flatten(0, 1)
    gram = used.t() @ used
    strength = ridge * gram.diagonal().mean().clamp_min(1e-20)
    eye = torch.eye(gram.shape[0], device=gram.device)
    return torch.linalg.solve(gram + strength * eye, used.t() @ wanted + strength * start.t()).t()
