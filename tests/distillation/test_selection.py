"""Which layers stay: those whose attention the model's predictions depend on. The model itself is left alone."""

from __future__ import annotations

import pytest
import torch
from small_models import LAYERS, llama, site, text

from fla_swap.distillation.config import CalibrationConfig
from fla_swap.distillation.selection import select_layers
from fla_swap.errors import PlanError
from fla_swap.types import LayerPlan, SwapPlan

PLAN = SwapPlan(layers=tuple(LayerPlan(site=site(i), mixer="gated_deltanet") for i in range(LAYERS)))
CALIBRATION = CalibrationConfig(sequences=4, length=32, half_lives=(1.0,), betas=(0.5,))


def model_that_needs(layers):
    """A Llama whose other layers' attention outputs exactly zero, as does any mixer that is calibrated to them."""
    model = llama()
    for number, layer in enumerate(model.model.layers):
        if number not in layers:
            layer.self_attn.o_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("needed", range(LAYERS))
def test_the_layer_that_matters_is_kept(needed):
    found = select_layers(model_that_needs([needed]), PLAN, text(), 1, calibration=CALIBRATION)
    assert found.kept == (needed,)
    assert found.start > 0.05 and found.scores[needed] < 1e-6
    others = [score for layer, score in found.scores.items() if layer != needed]
    assert others == pytest.approx([found.start] * (LAYERS - 1), rel=1e-5)


def test_greedy_ends_with_the_original_when_every_needed_layer_is_back():
    found = select_layers(model_that_needs([0, 2]), PLAN, text(), 2, calibration=CALIBRATION)
    assert found.kept == (0, 2)
    divergences = [found.start, *(kl for _, kl in found.steps)]
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] < 1e-6


def test_leave_one_out_takes_the_best_single_layers():
    found = select_layers(llama(), PLAN, text(), 2, method="leave_one_out", calibration=CALIBRATION)
    best = sorted(found.scores, key=lambda layer: found.scores[layer])[:2]
    assert found.kept == tuple(sorted(best))
    assert [kl for _, kl in found.steps] == [found.scores[layer] for layer, _ in found.steps]


def test_the_model_is_left_alone_and_the_calibration_can_be_used():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = [layer.self_attn for layer in model.model.layers]
    found = select_layers(model, PLAN, text(), 1, calibration=CALIBRATION)
    assert [layer.self_attn for layer in model.model.layers] == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(found.calibrated.weights) == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    assert all(record.after < record.before for record in found.calibrated.layers)


@pytest.mark.parametrize(("keep", "method", "words"), [(4, "greedy", "4 of 3"), (1, "best", "'greedy'")])
def test_what_cannot_be_selected_is_refused(keep, method, words):
    with pytest.raises(PlanError, match=words):
        select_layers(llama(), PLAN, text(), keep, method=method, calibration=CALIBRATION)
