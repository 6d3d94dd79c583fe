"""Models without weights: the report of a model on the meta device is the report of the same model with weights."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from models import FAMILIES, tiny
from torch import Tensor, nn

from fla_swap.bench import scale
from fla_swap.capture import capture
from fla_swap.errors import CaptureError, NoAttentionFound
from fla_swap.exportable import exportable
from fla_swap.inspection import inspect
from fla_swap.structure import structure
from fla_swap.types import AttentionReport, AttentionSite


def empty(family: str, implementation: str, context: AbstractContextManager[Any], **options: Any) -> nn.Module:
    """The model of `tiny(family)`, without weights."""
    name, base = FAMILIES[family]
    config = getattr(transformers, name)(**{**base, **options})
    with context:
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def facts(report: AttentionReport) -> list[AttentionSite]:
    return [dataclasses.replace(s, max_error=None) for s in report.sites]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("qwen3", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager")],
)
def test_a_model_on_the_meta_device_has_the_report_of_one_with_weights(family: str, implementation: str) -> None:
    model = empty(family, implementation, torch.device("meta"))
    before = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    report, wanted = inspect(model), inspect(tiny(family, implementation))
    assert facts(report) == facts(wanted) and all(s.proved for s in report.sites)
    assert [m.reason for m in report.near_misses] == [m.reason for m in wanted.near_misses]
    assert {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())} == before
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers())) and model.training


def test_buffers_that_init_empty_weights_kept_are_read_as_they_are() -> None:
    model = empty("llama", "sdpa", init_empty_weights())
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    with torch.no_grad():
        frequencies.mul_(0.5)
    site = inspect(model).sites[0]
    assert site.rope is not None and site.rope.inv_freq == pytest.approx(frequencies.tolist())
    assert frequencies[0] == 0.5 and model.get_parameter("lm_head.weight").is_meta


def test_scaled_frequencies_are_computed_again() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = empty("llama", "sdpa", torch.device("meta"), rope_parameters=yarn)
    assert inspect(model).sites[0].rope == inspect(tiny("llama", rope_parameters=yarn)).sites[0].rope


class Attention(nn.Module):
    """Causal attention; `temperature` is a learned factor on the scores, `slope` a buffer that only `fill` computes."""

    def __init__(self, *, temperature: bool = False, fill: bool = False, table: bool = False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(1)) if temperature else None
        self.fill = fill
        self.register_buffer("slope", torch.tensor([0.5]) if fill or table else None)

    def reset_parameters(self) -> None:
        if self.fill and self.slope is not None:
            self.slope.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        for factor in (self.temperature, self.slope):
            scores = scores if factor is None else scores * factor
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.o((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2))


def on_meta(**options: bool) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(Attention(**options), Attention(**options))


EXAMPLE = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))


def test_buffers_of_plain_modules_are_filled_by_reset_parameters() -> None:
    report = inspect(on_meta(fill=True), EXAMPLE)
    assert [(s.fqn, s.scale, s.proved) for s in report.sites] == [("0", 0.5, True), ("1", 0.5, True)]


def test_a_buffer_that_nothing_computes_is_an_error_that_names_it() -> None:
    with pytest.raises(CaptureError, match=r"buffer '0\.slope' .* computes it again.*init_empty_weights"):
        inspect(on_meta(table=True), EXAMPLE)


def test_a_scale_that_is_a_weight_without_value_is_refused() -> None:
    with pytest.raises(NoAttentionFound) as caught:
        inspect(on_meta(temperature=True), EXAMPLE)
    near = caught.value.report.near_misses
    assert [m.slot for m in near] == ["mask", "mask"]
    assert "a learned factor of the scores, made of the parameter '0.temperature'" in " ".join(m.reason for m in near)


def test_one_layer_of_each_structure_is_proved() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(Attention(fill=True) for _ in range(4)))
    model[1].register_buffer("slope", torch.tensor([0.25]))
    model[2].o = nn.Linear(16, 16, bias=False, device="meta")
    report = inspect(model, EXAMPLE)
    assert [s.scale for s in report.sites] == [0.5, 0.25, 0.5, 0.5] and all(s.proved for s in report.sites)
    assert "0 and 1 more layer of its structure, 1, 2" in report.notes[-1]


def test_the_structure_is_everything_but_names() -> None:
    """Two layers that state the same, one of which adds its weight's square to the values on the way."""

    class Twisted(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.0 * self.o.bias.square()

    with torch.device("meta"):
        model = nn.Sequential(Attention(), Attention(), Twisted())
    names = [n for n, _ in model.named_children()]
    with exportable(model):
        graph = capture(model, ((EXAMPLE,), {}), length=7)
        site = inspect(nn.Sequential(Attention()), EXAMPLE).sites[0]
        sites = [dataclasses.replace(site, **_renamed(site, name)) for name in names]
        first, second, twisted = (structure(s, graph) for s in sites)
    assert first == second and first is not None
    assert twisted != first
    assert structure(dataclasses.replace(sites[1], scale=2.0), graph) != first
    assert structure(dataclasses.replace(sites[1], k=sites[1].q), graph) != first


def _renamed(site: AttentionSite, name: str) -> dict[str, Any]:
    """The site of layer "0" as that of another layer."""

    def ref(projection: Any) -> Any:
        weight, bias = (dataclasses.replace(r, name=name + r.name[1:]) for r in (projection.weight, projection.bias))
        return dataclasses.replace(projection, weight=weight, bias=bias)

    return {"fqn": name, **{side: ref(getattr(site, side)) for side in ("q", "k", "v", "o")}}


@pytest.mark.slow
@pytest.mark.parametrize("builder", scale.BUILDERS)
def test_seventy_billion_parameters_on_a_laptop(builder: str) -> None:
    row = scale.run(builder, 80, threads=2)
    assert row["sites"] == row["proved"] == 80 and row["peak"] < scale.GIGABYTES
    assert scale.passed(row, 80) or row["load"] > 1, row
