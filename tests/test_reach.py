"""Models that cannot be exported as they are: quantised weights, attention kernels, parts of a model, sites by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import tiny
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from fla_swap.inspection import inspect
from fla_swap.mixers.base import is_quantised
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_
from fla_swap.types import AttentionReport

QUANTISED = {
    "int8": Int8WeightOnlyConfig(),
    "fp8": Float8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def facts(report: AttentionReport) -> list:
    return [dataclasses.replace(s, max_error=None) for s in report.sites]


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_are_proved_and_swapped_from_their_dequantised_weights(kind: str) -> None:
    model = tiny("llama").to(torch.bfloat16)
    wanted = facts(inspect(model))
    quantize_(model, QUANTISED[kind])
    attention = model.get_submodule("model.layers.0.self_attn")
    before, output = dict(model.named_parameters()), logits(model)
    report = inspect(model)
    assert facts(report) == wanted and all(s.proved for s in report.sites)
    assert "quantised weights were taken for plain ones" in report.notes[0]
    assert all(before[n] is p for n, p in model.named_parameters()) and torch.equal(logits(model), output)

    swap_(model, plan(report, mixer="softmax", keep=0))
    mixer = model.get_submodule("model.layers.0.self_attn.mixer")
    assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight.dequantize())
    assert mixer.q_proj.weight.dtype == torch.bfloat16 and not any(is_quantised(p) for p in mixer.parameters())
    assert float((logits(model) - output).abs().max()) < 0.05 * float(output.abs().max())
    restore_(model)
    assert model.get_submodule("model.layers.0.self_attn") is attention and torch.equal(logits(model), output)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_models_that_run_an_attention_kernel_are_captured_in_eager(name: str) -> None:
    model = tiny("gemma2", "eager")
    wanted = facts(inspect(model))
    model.config._attn_implementation = name
    report = inspect(model)
    assert facts(report) == wanted and [s.softcap for s in report.sites] == [50.0, 50.0]
    assert f"'{name}' is a kernel" in report.notes[0]
    assert model.config._attn_implementation == name
