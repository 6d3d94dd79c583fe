"""The swap in place: what it computes, what it leaves alone, how it is undone, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from sites import llama_like_site, logits, prompts, report_of, tiny, toy_plan, toy_registered
from torch import nn
from transformers import AutoModelForCausalLM

from fla_swap import inspect
from fla_swap.errors import SwapError
from fla_swap.hybrid import SwappedAttention
from fla_swap.mixers import Softmax
from fla_swap.planning import Rule, plan
from fla_swap.swapping import drop_originals, original_attention, restore_, swap_, swapped_layers
from fla_swap.types import ArgPath, CallContract, Gate, LayerPlan, LowRank, Projection, SwapPlan, WeightRef

FAMILIES = ("llama", "qwen3", "phi3", "gpt2", "mistral")
TEACHER = Path(__file__).resolve().parent.parent / "examples" / "teacher"


@pytest.fixture(scope="module", autouse=True)
def toy():
    with toy_registered():
        yield


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_in_every_layer_changes_nothing(family, attn):
    """The identity: every layer rebuilt from its site; logits within 1e-5 in fp32, the same greedy text."""
    model = tiny(family, attn=attn)
    ids, mask = prompts()
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    before, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    text = model.generate(ids, **greedy)
    swap_(model, plan(inspect(model), mixer="softmax", keep=0, local=True))
    assert len(swapped_layers(model)) == 2
    assert (logits(model, ids) - before).abs().max() <= 1e-5
    assert (logits(model, ids, attention_mask=mask) - padded)[mask.bool()].abs().max() <= 1e-5
    assert torch.equal(model.generate(ids, **greedy), text)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), text)


def test_softmax_in_every_layer_of_the_shipped_teacher_changes_nothing():
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
    before, text = logits(model, ids), model.generate(ids[:, :16], max_new_tokens=16, do_sample=False)
    swap_(model, plan(inspect(model), mixer="softmax", keep=0))
    assert len(swapped_layers(model)) == 8
    assert (logits(model, ids) - before).abs().max() <= 1e-5
    assert torch.equal(model.generate(ids[:, :16], max_new_tokens=16, do_sample=False), text)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restore_brings_back_the_same_objects(family):
    model = tiny(family)
    ids, _ = prompts()
    modules, classes, before = dict(model.named_modules()), (type(model), type(model.config)), logits(model, ids)
    config = model.config.to_dict()
    swap_(model, toy_plan(model))
    assert (logits(model, ids) - before).abs().max() > 1e-2
    restore_(model)
    assert (type(model), type(model.config)) == classes
    assert model.config.to_dict() == config
    assert list(dict(model.named_modules())) == list(modules)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(logits(model, ids), before)


def test_originals_are_neither_parameters_nor_saved_but_follow_moves():
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    swap_(model, toy_plan(model))
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, SwappedAttention) and layer.original is attention
    assert not {id(p) for p in attention.parameters()} & {id(p) for p in model.parameters()}
    names = {n.split("self_attn.")[1] for n in model.state_dict() if "layers.0.self_attn" in n}
    assert names == {f"mixer.{n}_proj.weight" for n in "qkvo"}
    model.to(torch.bfloat16)
    assert attention.q_proj.weight.dtype == torch.bfloat16 == layer.mixer.q_proj.weight.dtype
    model.train()
    assert attention.training and layer.mixer.training
    model.eval()
    assert not attention.training and not layer.mixer.training


def test_mode_dtype_and_facts_of_the_original_are_kept():
    model = tiny("llama").to(torch.bfloat16).train()
    swap_(model, toy_plan(model))
    layer = model.model.layers[1].self_attn
    assert layer.training and layer.mixer.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (layer.layer_idx, layer.is_causal, layer.head_dim) == (1, True, 8)


def test_the_teacher_runs_in_the_same_weights():
    model = tiny("llama")
    ids, _ = prompts()
    before = logits(model, ids)
    swap_(model, toy_plan(model))
    after = logits(model, ids)
    with original_attention(model) as teacher:
        assert torch.equal(logits(teacher, ids), before)
    assert torch.equal(logits(model, ids), after)
    with pytest.raises(ZeroDivisionError), original_attention(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), after)


def test_without_originals_there_is_no_way_back():
    for drop in (False, True):
        model = tiny("llama")
        swap_(model, toy_plan(model), keep_originals=drop)
        drop_originals(model)
        assert all(layer.original is None for _, layer in swapped_layers(model))
        with pytest.raises(SwapError, match="is gone"):
            restore_(model)
        with pytest.raises(SwapError, match="original attention is not there"), original_attention(model):
            pass


def test_a_copy_is_independent():
    model = tiny("llama")
    ids, _ = prompts()
    swap_(model, toy_plan(model))
    other = copy.deepcopy(model)
    before = logits(model, ids)
    assert torch.equal(logits(other, ids), before)
    with torch.no_grad():
        other.model.layers[0].self_attn.mixer.q_proj.weight.zero_()
        restore_(other)
    assert torch.equal(logits(model, ids), before)


def test_training_with_the_default_cache_and_with_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        swap_(model, toy_plan(model, keep=[1]))
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = prompts()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    plain, checked = gradients
    assert plain["model.layers.0.self_attn.mixer.k_proj.weight"].abs().sum() > 0
    for name, grad in plain.items():
        torch.testing.assert_close(checked[name], grad, atol=1e-6, rtol=1e-5)


class Bare(nn.Module):
    """A model that is not transformers': attention called by position, returning a tensor or another tuple."""

    def __init__(self, outputs, index):
        super().__init__()
        donor = tiny("llama", layers=1)
        self.attention, self.outputs, self.index = donor.model.layers[0].self_attn, outputs, index

    def forward(self, x):
        result = self.attention(x)
        return result if self.outputs is None else result[self.index]


@pytest.mark.parametrize(("outputs", "index"), [(None, 0), (3, 1)])
def test_the_contract_decides_what_is_returned(outputs, index):
    site = llama_like_site(tiny("llama"), 0)
    projections = {n: Projection(weight=WeightRef(name=f"attention.{n}_proj.weight")) for n in "qkvo"}
    call = dataclasses.replace(site.call, hidden=ArgPath(position=0), outputs=outputs, output_index=index)
    site = dataclasses.replace(site, fqn="attention", call=call, **projections)
    report = dataclasses.replace(report_of(tiny("llama")), sites=(site,))
    model = Bare(outputs, index)
    swap_(model, plan(report, mixer="toy", keep=0))
    x = torch.randn(1, 5, 32)
    assert torch.equal(model(x), model.attention.mixer(x)[0])
    raw = model.attention(x)
    assert isinstance(raw, torch.Tensor) if outputs is None else [r is None for r in raw] == [True, False, True]


def test_a_plan_for_another_model_changes_nothing():
    model, deeper = tiny("llama"), tiny("llama", layers=3)
    modules = dict(model.named_modules())
    with pytest.raises(SwapError, match=r"no module 'model\.layers\.2\.self_attn'"):
        swap_(model, toy_plan(deeper))
    with pytest.raises(SwapError, match=r"no module 'transformer"):
        swap_(model, toy_plan(tiny("gpt2")))
    with pytest.raises(SwapError, match=r"has no weight .*qkv_proj"):
        swap_(model, toy_plan(tiny("phi3")))
    wide = dataclasses.replace(report_of(model).sites[1], hidden_size=64)
    report = dataclasses.replace(report_of(model), sites=(report_of(model).sites[0], wide))
    with pytest.raises(SwapError, match=r"q of model\.layers\.1\.self_attn .* is \[32, 32\] here"):
        swap_(model, plan(report, mixer="toy", keep=0))
    assert all(module is modules[name] for name, module in model.named_modules())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_site_that_is_no_module_of_its_own_is_refused():
    model = tiny("llama")
    site = llama_like_site(model, 0)
    for change, words in (({"place": "graph"}, "only fs.rewrite"), ({"kind": "cross"}, "cross-attention")):
        layer = LayerPlan(site=dataclasses.replace(site, **change), mixer="softmax")
        with pytest.raises(SwapError, match=rf"model\.layers\.0\.self_attn .*{words}"):
            swap_(model, SwapPlan(layers=(layer,)))


def test_gates_and_adapters_of_another_model_are_refused():
    model = tiny("llama")
    site, name = llama_like_site(model, 0), "model.layers.0.self_attn.{}_proj.weight"
    gate = Gate(projection=Projection(weight=WeightRef(name=name.format("k"))))
    adapter = LowRank(down=WeightRef(name=name.format("k")), up=WeightRef(name=name.format("q")))
    wrong = {
        "gate of": dataclasses.replace(site, gate=gate),
        "the adapter of q": dataclasses.replace(site, q=dataclasses.replace(site.q, adapters=(adapter,))),
    }
    for words, changed in wrong.items():
        with pytest.raises(SwapError, match=f"another model: {words}"):
            swap_(model, SwapPlan(layers=(LayerPlan(site=changed, mixer="softmax"),)))


@torch.no_grad()
def test_a_residual_is_added_and_time_may_come_first():
    model = tiny("llama")
    site = llama_like_site(model, 0)
    mixer = Softmax.from_attention(site, dict(model.named_parameters()))
    x, before = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    call = CallContract(hidden=ArgPath(position=0), residual=ArgPath(position=1))
    plain = mixer(x)[0]
    swapped = SwappedAttention(dataclasses.replace(site, call=call), mixer, nn.Identity())
    torch.testing.assert_close(swapped(x, before), before + plain)
    first = dataclasses.replace(call, residual=None, time_first=True)
    swapped = SwappedAttention(dataclasses.replace(site, call=first), mixer, nn.Identity())
    torch.testing.assert_close(swapped(x.transpose(0, 1)), plain.transpose(0, 1))


def test_swapping_twice_and_restoring_nothing_are_errors():
    model = tiny("llama")
    with pytest.raises(SwapError, match="not swapped"):
        restore_(model)
    swap_(model, plan(report_of(model), rules=[Rule("model.layers.0.*", "toy")]))
    with pytest.raises(SwapError, match="swapped already"):
        swap_(model, toy_plan(model))
