"""What `inspect` is given: models of other dtypes, without a mask, with an ALiBi bias among the arguments, wrapped or
compiled; and arguments that it cannot take."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from saved import llama

import fla_swap as fs
from fla_swap.contract import is_own_alibi
from fla_swap.errors import CaptureError, CheckpointError, ConfigError, RecogniserError


def ids(length: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(0))


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype_is_proved_in_fp32(dtype):
    model = llama(layers=2).to(dtype)
    report = fs.inspect(model)
    assert [s.proved for s in report.sites] == [True, True]
    assert max(s.max_error or 0.0 for s in report.sites) < 1e-5
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_swapped_fp64_model_computes_the_same():
    model = llama(layers=2).double().eval()
    swapped = fs.swap_(copy.deepcopy(model), fs.plan(fs.inspect(model), mixer="softmax", keep=0))
    with torch.no_grad():
        assert (swapped(ids()).logits - model(ids()).logits).abs().max() < 1e-6


# ---- masks


def test_eager_code_without_a_mask_is_not_compared():
    report = fs.inspect(llama(layers=2, attn_implementation="sdpa"), {"input_ids": ids()})
    assert [s.proved for s in report.sites] == [True, True]
    assert not any("eager" in note for note in report.notes)


def falcon(attention: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(**shape, alibi=True)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_alibi_bias_among_the_arguments_is_the_mixers_own(attention):
    model = falcon(attention)
    report = fs.inspect(model)
    # Its eager code adds the bias twice: beside the mask, and in it.
    first = (2 if attention == "eager" else 1) * 0.25 / 8**0.5
    assert report.sites[0].alibi == pytest.approx([first, first / 4, first / 16, first / 64], rel=1e-4)
    swapped = fs.swap_(copy.deepcopy(model), fs.plan(report, mixer="softmax", keep=0, local=True)).eval()
    padded = torch.ones_like(ids())
    padded[1, :5] = 0
    for mask in (torch.ones_like(padded), padded):
        with torch.no_grad():
            wanted, found = (m(ids(), attention_mask=mask).logits[mask.bool()] for m in (model, swapped))
        assert (found - wanted).abs().max() < 1e-5
    options = {"attention_mask": padded, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(), **options), swapped.generate(ids(), **options))


def test_which_bias_is_a_sites_own():
    site, keys = fs.inspect(falcon("sdpa")).sites[0], torch.ones(2, 7, dtype=torch.bool)
    slopes = torch.tensor(site.alibi)[:, None, None]
    line = slopes * torch.arange(7.0)
    pairs = slopes * (torch.arange(7.0) - torch.arange(7.0)[:, None])
    assert is_own_alibi(line, site, keys) and is_own_alibi(pairs, site, keys)
    assert is_own_alibi(3 * line.expand(2, 4, 1, 7), site, keys)  # multiplied by the scale afterwards
    assert not is_own_alibi(line.flip(0), site, keys)  # another head's slopes
    assert not is_own_alibi(-line, site, keys) and not is_own_alibi(line.square(), site, keys)
    assert not is_own_alibi(torch.zeros_like(line), site, keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_alibi_bias_that_the_model_rounds_to_half_precision_is_refused_with_that_reason(dtype):
    shape = {"vocab_size": 100, "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 12}
    config = transformers.FalconConfig(**shape, alibi=True)  # slopes 2 ** -0.5, …: no numbers of bf16
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)
    (near,) = fs.inspect(model, strict=False).near_misses
    assert "is the ALiBi bias rounded to half precision (by " in near.reason and "add the bias unrounded" in near.reason


# ---- the console


def test_an_export_that_fails_prints_no_graph(capfd):
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    report = fs.inspect(llama(layers=1, max_position_embeddings=64, rope_parameters=scaled))
    assert len(report.sites) == 1
    said = capfd.readouterr()
    assert "def forward" not in said.err + said.out


# ---- models in other modules


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()  # no task_type


WRAPPERS = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), ""),
    "data parallel": (torch.nn.DataParallel, "module."),
    "adapters": (adapted, "base_model.model."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_inspected_and_swapped(wrapper):
    wrap, prefix = WRAPPERS[wrapper]
    inner = llama(layers=2)
    model = wrap(inner)
    report = fs.inspect(model)
    assert [s.fqn for s in report.sites] == [f"{prefix}model.layers.{i}.self_attn" for i in (0, 1)]
    assert any("compiled" in note for note in report.notes) == (wrapper == "compiled")
    assert report.sites[0].call.cache is not None
    with torch.no_grad():
        wanted = model(ids()).logits
        assert fs.swap_(model, fs.plan(report, mixer="gla", keep=0)) is model
        assert (model(ids()).logits - wanted).abs().max() > 0.01
        assert inner.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 19)
        assert torch.equal(fs.restore_(model)(ids()).logits, wanted)


def test_modules_that_are_compiled_in_place_run_their_own_code():
    model = llama(layers=2)
    model.compile()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    report = fs.inspect(model)
    assert [s.fqn for s in report.sites] == ["model.layers.0.self_attn", "model.layers.1._orig_mod.self_attn"]
    assert model._compiled_call_impl is not None


def test_parts_that_are_named_twice_or_lie_in_each_other_count_once():
    names = ["model.layers.1.self_attn", "model.layers.1", "model.layers.0", "model.layers.0"]
    report = fs.inspect(llama(layers=2), within=names)
    assert [s.fqn for s in report.sites] == ["model.layers.1.self_attn", "model.layers.0.self_attn"]
    assert [s.layer for s in report.sites] == [0, 1]


# ---- arguments of `inspect` and `load`


IDS = torch.zeros(2, 7, dtype=torch.long)
ARGUMENTS = [
    ({"example_inputs": 5}, ConfigError, "example_inputs is 5: it must be one call's arguments"),
    ({"example_inputs": "a text"}, ConfigError, "example_inputs is 'a text'"),
    ({"example_inputs": {0: IDS}}, ConfigError, "they must be names of the forward's arguments"),
    ({"example_inputs": {"foo": IDS}}, CaptureError, "own forward fails.* given foo: int64 .2, 7."),
    (
        {"example_inputs": {"input_ids": IDS.float()}},
        CaptureError,
        "own forward fails.* given input_ids: float32 .2, 7.",
    ),
    (
        {"example_inputs": [IDS, {"a": 1}]},
        CaptureError,
        "own forward fails.* given argument 0: int64 .2, 7., argument 1",
    ),
    ({"example_inputs": ((), {"input_ids": IDS})}, CaptureError, "no tensor .batch, time, ….* 0: a tuple, 1: a dict"),
    ({"patterns": object()}, RecogniserError, "no sequence of recognisers"),
    ({"within": [0]}, ConfigError, "names of submodules are strings, 0 is none"),
    ({"within": "model.layers.0", "example_inputs": {"foo": IDS}}, CaptureError, "own forward fails.* given foo"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ARGUMENTS, ids=lambda v: v if isinstance(v, str) else "")
def test_an_argument_that_inspect_cannot_take(changed, kind, message):
    with pytest.raises(kind, match=message):
        fs.inspect(llama(layers=1), **changed)


@pytest.mark.parametrize("model", ["gpt2", None, torch.nn.Linear], ids=str)
def test_what_is_no_module(model, tmp_path):
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module: load it first"):
        fs.inspect(model)
    if model is torch.nn.Linear:
        with pytest.raises(CheckpointError, match="is no module: build one"):
            fs.load(tmp_path, model)


def test_an_input_of_another_width():
    with pytest.raises(CaptureError, match=r"own forward fails.*argument 0: float32 \[2, 5, 9\]"):
        fs.inspect(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), torch.randn(2, 5, 9))
