"""Models that cannot be exported as they are: quantised weights, attention kernels, parts of a model, sites by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from fla_swap.checkpoint import load, save
from fla_swap.errors import CaptureError, VerificationError
from fla_swap.inspection import inspect, prove
from fla_swap.mixers.base import is_quantised
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_
from fla_swap.types import (
    ArgPath,
    AttentionReport,
    AttentionSite,
    CallContract,
    Mask,
    Projection,
    WeightRef,
)

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


def test_a_model_loaded_with_a_torchao_config_is_swapped_saved_and_loaded_again(tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config
    )
    swap_(model, plan(inspect(model), mixer="window", keep=[1]))
    loaded = load(save(model, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
    assert is_quantised(loaded.get_parameter("model.layers.1.self_attn.q_proj.weight"))
    assert not is_quantised(loaded.get_parameter("model.layers.0.self_attn.mixer.q_proj.weight"))


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_models_that_run_an_attention_kernel_are_captured_in_eager(name: str) -> None:
    model = tiny("gemma2", "eager")
    wanted = facts(inspect(model))
    model.config._attn_implementation = name
    report = inspect(model)
    assert facts(report) == wanted and [s.softcap for s in report.sites] == [50.0, 50.0]
    assert f"'{name}' is a kernel" in report.notes[0]
    assert model.config._attn_implementation == name


# Parts of a model that cannot be exported whole


class Unexportable(nn.Module):
    """A language model whose forward looks at values: `torch.export` cannot follow it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if int(input_ids.sum()) < 0:
            input_ids = -input_ids
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


LAYERS = ["inner.model.layers.0", "inner.model.layers.1"]


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_parts_are_inspected_as_the_whole_model_calls_them(family: str) -> None:
    model = Unexportable(tiny(family, "eager"))
    with pytest.raises(CaptureError, match=r"test_reach.py:\d+.*within="):
        inspect(model)
    report = inspect(model, within=LAYERS)
    whole = inspect(tiny(family, "eager"))
    assert [s.fqn for s in report.sites] == [f"inner.model.layers.{i}.self_attn" for i in range(2)]
    for found, wanted in zip(report.sites, whole.sites, strict=True):
        assert found.proved and found.q.weight.name == f"inner.{wanted.q.weight.name}"
        assert (found.mask, found.scale, found.q_norm is None) == (wanted.mask, wanted.scale, wanted.q_norm is None)
        assert found.rope is not None and wanted.rope is not None
        assert found.rope.inv_freq == pytest.approx(wanted.rope.inv_freq, abs=1e-6)
        assert found.call == dataclasses.replace(wanted.call, cache=None, cache_index=None)
    swap_(model, plan(report, mixer="softmax", keep=0, local=True))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.allclose(model(ids), logits(tiny(family, "eager")), atol=1e-5)


def test_parts_of_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    report = inspect(model, within=[f"model.layers.{i}" for i in range(2)])
    wanted = inspect(tiny("llama"))
    assert [(s.fqn, s.q, s.mask, s.proved) for s in report.sites] == [(s.fqn, s.q, s.mask, True) for s in wanted.sites]
    assert [s.call for s in report.sites] == [s.call for s in wanted.sites]
    assert "model.layers.0.self_attn and 1 more layer of its structure" in report.notes[-1]


def test_parts_that_are_not_there_or_not_called_are_errors() -> None:
    model = tiny("llama")
    with pytest.raises(CaptureError, match=r"within='model\.layers\.9': LlamaForCausalLM has no such module"):
        inspect(model, within="model.layers.9")
    model.spare = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match="is not called when"):
        inspect(model, within=["spare"])


# Sites stated by hand


class Roundabout(nn.Module):
    """Causal attention that the grammar refuses: its scores are taken apart and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)).mul(8**-0.5)
        scores = scores.sign() * scores.abs()
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.o((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2))


EXAMPLE = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
DEFAULT_CALL = CallContract(hidden=ArgPath(position=0))


def by_hand(fqn: str, **changes: object) -> AttentionSite:
    def projection(name: str) -> Projection:
        return Projection(weight=WeightRef(name=f"{fqn}.{name}.weight"), bias=WeightRef(name=f"{fqn}.{name}.bias"))

    sizes = {"hidden_size": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "v_head_dim": 8, "scale": 8**-0.5}
    linear = {name: projection(name) for name in ("q", "k", "v", "o")}
    stated = {"fqn": fqn, "layer": 0, **linear, **sizes, "mask": Mask(kind="causal"), "call": DEFAULT_CALL}
    return AttentionSite(**{**stated, **changes})  # type: ignore[arg-type]


def test_a_site_stated_by_hand_is_proved_and_planned_among_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Roundabout(), Roundabout())
    assert not inspect(model, EXAMPLE, strict=False).sites
    site = prove(model, by_hand("1"), EXAMPLE)
    assert site.proved and site.max_error is not None and site.max_error < 1e-5
    assert dataclasses.replace(site.call, seen=None) == DEFAULT_CALL and site.call.seen == (ArgPath(position=0),)
    assert prove(model, site, EXAMPLE) == site
    report = inspect(model, EXAMPLE, sites=[by_hand("1"), by_hand("0")])
    assert [(s.fqn, s.layer, s.proved) for s in report.sites] == [("0", 0, True), ("1", 1, True)]
    assert not report.near_misses
    before = model(EXAMPLE)
    swap_(model, plan(report, mixer="softmax", keep=[0]))
    assert torch.allclose(model(EXAMPLE), before, atol=1e-6)


def test_how_a_stated_sites_module_is_called_is_observed() -> None:
    model = tiny("llama")
    found = inspect(model).sites[1]
    stated = dataclasses.replace(found, call=DEFAULT_CALL, proved=False, max_error=None)
    assert prove(model, stated) == found
    other = dataclasses.replace(found, call=dataclasses.replace(found.call, outputs=3))
    with pytest.raises(VerificationError, match=r"the site says .*outputs=3.*is called as .*outputs=2"):
        prove(model, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": 0.5}, "differs from the module's own output"),
        ({"mask": Mask(kind="window", window=4)}, "differs from the module's own output"),
        ({"heads": 4, "kv_heads": 4, "head_dim": 4, "v_head_dim": 4}, "differs from the module's own output"),
        ({"hidden_size": 24}, "no argument has the shape"),
        ({"q": Projection(weight=WeightRef(name="0.absent"))}, "cannot be rebuilt"),
        ({"place": "graph"}, "a module of its own"),
        ({"fqn": "7"}, "has no module '7'"),
    ],
)
def test_a_wrong_site_is_an_error_with_its_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(VerificationError, match=reason):
        prove(nn.Sequential(Roundabout(), Roundabout()), dataclasses.replace(by_hand("0"), **changes), EXAMPLE)
    with pytest.raises(VerificationError, match=reason):
        inspect(
            nn.Sequential(Roundabout(), Roundabout()), EXAMPLE, sites=[dataclasses.replace(by_hand("0"), **changes)]
        )
