"""Layers are compared with their originals on the original's inputs; calibration and alignment bring them closer."""

from __future__ import annotations

import pytest
import torch
from small_models import llama, swapped_llama, text

from fla_swap.distillation import CalibrationConfig, DistillConfig, StageConfig, calibrate, distill, layer_errors
from fla_swap.distillation.alignment import Alignment, layer_loss, record_calls
from fla_swap.distillation.calibration import Layer, best_scale, look_at, ridge_solution
from fla_swap.errors import TrainingError
from fla_swap.swapping import drop_originals


def naive(model):
    return {e.fqn: e.relative for e in layer_errors(model, text(rows=16, seed=5))}


def test_recorded_targets_are_what_the_original_layers_return_in_the_original_model():
    model, ids = swapped_llama(), text(rows=3)
    seen = {}
    plain = llama()
    for layer in (0, 2):
        hook = lambda module, args, output, layer=layer: seen.update({layer: output[0]})  # noqa: E731
        plain.model.layers[layer].self_attn.register_forward_hook(hook)
    with torch.no_grad():
        plain(input_ids=ids)
    calls = record_calls(model, ids)
    assert [c.fqn for c in calls] == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    for call, layer in zip(calls, (0, 2), strict=True):
        torch.testing.assert_close(call.target, seen[layer])
        assert not call.target.requires_grad


def test_softmax_in_the_place_of_softmax_has_no_error():
    assert all(e.relative < 1e-5 for e in layer_errors(swapped_llama("softmax"), text(rows=4)))


def test_layer_loss_is_the_mean_distance_over_the_targets_root_mean_square():
    target = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    output = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    rms = (25 / 4) ** 0.5
    expected = (5 / 2**0.5 + 2**0.5 / 2**0.5) / 2 / rms
    assert float(layer_loss(output, target)) == pytest.approx(expected)
    assert float(layer_loss(10 * output, 10 * target)) == pytest.approx(expected)


def test_gradients_of_alignment_reach_the_mixers_and_nothing_else():
    model = swapped_llama()
    Alignment(model)(text(rows=2)).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    mixers = {n for n, _ in model.named_parameters() if ".mixer." in n}
    assert with_gradient == mixers


def test_the_evidence_describes_the_original_attention():
    """Its rebuilt output is the layer's target; a mean distance is at most the mean distance of uniform attention."""
    model, ids = swapped_llama(), text(rows=3)
    for call in record_calls(model, ids):
        evidence = look_at(model, call)
        torch.testing.assert_close(evidence.output, call.target, rtol=1e-4, atol=1e-5)
        assert evidence.heads.shape == (3, 32, 4, 8)
        assert (evidence.distance >= 1).all() and (evidence.distance < 31 / 2).all()
        assert (evidence.concentration > 0).all() and (evidence.concentration < 1).all()


def test_the_best_scale_solves_the_least_squares_problem():
    """When the target is the mixer's own heads, scaled, exactly that scale comes back (up to the ridge)."""
    model, ids = swapped_llama(), text(rows=8)
    call = record_calls(model, ids)[0]
    with torch.no_grad():
        layer = Layer(call, look_at(model, call))
        wanted = torch.linspace(0.5, 2.0, 32).view(4, 8)
        heads = layer.heads()
        object.__setattr__(layer.evidence, "output", (heads * wanted).flatten(2) @ layer.weight().t())
        assert layer.error(scaled=True) < 0.05 * layer.error()
        torch.testing.assert_close(best_scale(layer), wanted, rtol=0.3, atol=0.1)


def test_the_ridge_solution_zeroes_the_gradient_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    used, wanted = torch.randn(2, 40, 6, generator=generator), torch.randn(2, 40, 5, generator=generator)
    start = torch.randn(5, 6, generator=generator)
    solution = ridge_solution(used, wanted, start, 0.1).requires_grad_(True)
    strength = 0.1 * used.flatten(0, 1).square().sum(0).mean()
    objective = (used @ solution.t() - wanted).square().sum() + strength * (solution - start).square().sum()
    (gradient,) = torch.autograd.grad(objective, solution)
    assert gradient.abs().max() < 1e-3 * strength


@pytest.mark.parametrize("mixer", ["gated_deltanet", "gla"])
def test_a_calibrated_start_is_closer_to_the_original_than_the_copied_weights(mixer):
    model = swapped_llama(mixer)
    before = naive(model)
    report = calibrate(model, text(rows=64), CalibrationConfig(sequences=32, length=32))
    after = naive(model)
    assert [c.fqn for c in report] == list(before)
    for change in report:
        assert change.kept and change.after < change.before
        assert after[change.fqn] < 0.95 * before[change.fqn]


def test_calibration_leaves_what_it_cannot_fit():
    model = swapped_llama("softmax")
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    assert calibrate(model, text(), CalibrationConfig()) == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_alignment_lowers_the_error_of_every_layer_and_trains_mixers_only():
    model = swapped_llama()
    before, weights = naive(model), {n: p.clone() for n, p in model.named_parameters()}
    stage = StageConfig(kind="align", steps=40, batch_size=8, learning_rate=1e-2)
    result = distill(model, text(rows=256), DistillConfig(calibrate=None, stages=(stage,), device="cpu"))
    after = naive(model)
    assert all(after[n] < 0.8 * before[n] for n in before)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed and all(".mixer." in n for n in changed)
    assert all(p.requires_grad for p in model.parameters()), "the flags are put back"


def test_a_model_without_swapped_layers_or_originals_is_refused_with_what_to_do():
    with pytest.raises(TrainingError, match=r"no swapped layer: call fs\.swap_"):
        Alignment(llama())
    model = swapped_llama()
    drop_originals(model)
    with pytest.raises(TrainingError, match=r"model\.layers\.0\.self_attn"):
        Alignment(model)
