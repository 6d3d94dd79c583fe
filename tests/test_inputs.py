"""Models of other dtypes, without a mask, wrapped or compiled, and models that pass their ALiBi bias around."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from saved import llama

import fla_swap as fs
from fla_swap.contract import is_own_alibi


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


# ---- the console


def test_an_export_that_fails_prints_no_graph(capfd):
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    report = fs.inspect(llama(layers=1, max_position_embeddings=64, rope_parameters=scaled))
    assert len(report.sites) == 1
    said = capfd.readouterr()
    assert "def forward" not in said.err + said.out
