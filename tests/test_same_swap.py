"""`mixer="same"`: layers that are linear already, swapped for our kernels: nothing that the model computes changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import fla_swap as fs
from fla_swap.cache import StateLayer
from fla_swap.swapping import swapped_layers
from tests.linear_models import FAMILIES, LINEAR, linear_model, linear_report

IDS = torch.randint(3, 61, (2, 37), generator=torch.Generator().manual_seed(1))
PADDING = (torch.arange(37) >= torch.tensor([[0], [9]])).long()
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 12}


def swapped(family: str) -> Any:
    return fs.swap_(linear_model(family), fs.plan(linear_report(family), mixer="same"))


@torch.no_grad()
def logits(model, **options) -> Tensor:
    return model(IDS, use_cache=False, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_generation_are_equal(family):
    before, after = linear_model(family), swapped(family)
    assert [fqn for fqn, _ in swapped_layers(after)] == LINEAR[family]
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=2e-5)
    padded = [logits(m, attention_mask=PADDING)[PADDING.bool()] for m in (after, before)]
    torch.testing.assert_close(*padded, rtol=1e-4, atol=2e-5)
    expected = before.generate(IDS, attention_mask=PADDING, **GREEDY)
    assert torch.equal(after.generate(IDS, attention_mask=PADDING, **GREEDY), expected)
    fs.restore_(after)
    assert torch.equal(logits(after), logits(before))


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
@torch.no_grad()
def test_the_state_is_in_the_models_own_cache(family):
    """A prompt in two parts, then token by token: as in one pass; the layer of attention keeps its keys."""
    model = swapped(family)
    cache = DynamicCache(config=model.config)
    pieces = []
    for a, b in ((0, 20), (20, 34), (34, 35), (35, 37)):
        positions = torch.arange(a, b)[None]  # Bamba's own code counts them from 0 in every call
        pieces.append(model(IDS[:, a:b], past_key_values=cache, position_ids=positions).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model), rtol=1e-4, atol=2e-5)
    layer = cache.layers[0]
    assert isinstance(layer, StateLayer) and not isinstance(cache.layers[1], StateLayer)
    assert cache.get_seq_length() == 37 and cache.has_previous_state(0)
    assert layer.state["recurrent"].dtype == torch.float32 and bool(layer.state["recurrent"].any())
    layer.reset()
    assert not cache.has_previous_state(0) and not layer.state["recurrent"].any()


@torch.no_grad()
def test_beam_search_is_equal():
    before, after = linear_model("qwen3_next"), swapped("qwen3_next")
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(after.generate(IDS, **options), before.generate(IDS, **options))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded(family, tmp_path):
    model = swapped(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [fqn for fqn, _ in swapped_layers(loaded)] == LINEAR[family]
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
def test_compiled_without_a_break():
    model = swapped("mamba2")
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True)), logits(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_next", "minimax"])
@torch.no_grad()
def test_a_layer_compiled_without_a_break(family):
    ((_, layer),) = swapped_layers(swapped(family))
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(2))
    given = {"attention_mask": PADDING} | ({"position_embeddings": None} if family == "minimax" else {})
    outputs = [f(hidden_states=x, **given) for f in (torch.compile(layer.forward, fullgraph=True), layer)]
    compiled, eager = (y[0] if isinstance(y, tuple) else y for y in outputs)
    torch.testing.assert_close(compiled[PADDING.bool()], eager[PADDING.bool()], rtol=1e-4, atol=2e-5)


def test_gradients_are_equal():
    grads = []
    for model in (linear_model("qwen3_next"), swapped("qwen3_next")):
        embedding = model.get_input_embeddings().weight
        loss = model(IDS, use_cache=False).logits.log_softmax(-1)[..., 3].mean()
        grads.append(torch.autograd.grad(loss, embedding)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))
