"""Whole graphs, no breaks, the same tokens. Inductor itself is tried once (slow on a CPU)."""

from __future__ import annotations

import pytest
import torch
from sites import prompts, report_of, tiny
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from fla_swap.compilation import CACHE_STEP, compile, uncompile
from fla_swap.errors import SwapError
from fla_swap.planning import plan
from fla_swap.swapping import restore_, swap_


def swapped(family="llama", mixer="gla", keep=(1,)):
    model = tiny(family)
    return swap_(model, plan(report_of(model), mixer=mixer, keep=keep, local=True))


def graphs() -> int:
    """Graphs compiled since the last call; there must be no graph break at all."""
    assert not counters["graph_break"]
    count = counters["stats"]["unique_graphs"]
    counters.clear()
    return count


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


MODELS = [
    ("llama", "gated_deltanet", (1,)),
    ("mistral", "window", (0,)),
    pytest.param("gpt2", "gla", 0, marks=pytest.mark.slow),
    pytest.param("qwen3", "softmax", 0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "mixer", "keep"), MODELS)
def test_forward_prefill_and_decode_are_whole_graphs_and_give_the_same_tokens(family, mixer, keep):
    model = swapped(family, mixer, keep)
    ids, mask = prompts()
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    text, shorter = (
        model.generate(ids, **arguments),
        model.generate(ids[:, 3:], **{**arguments, "attention_mask": mask[:, 3:]}),
    )
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    assert compile(model, backend="eager") is model
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
    assert graphs() == 1
    assert torch.equal(model.generate(ids, **arguments), text)
    assert graphs() == 2  # one for the prompt, one for every later token
    assert torch.equal(model.generate(ids[:, 3:], **{**arguments, "attention_mask": mask[:, 3:]}), shorter)
    assert torch.equal(model.generate(ids, **arguments), text)
    assert graphs() == 0  # another prompt length compiles nothing


@pytest.mark.slow
def test_dynamic_caches_and_speculation_still_work_compiled():
    model = swapped()
    ids, _ = prompts(padding=0)
    ids = ids[1:]
    arguments = {"do_sample": False, "max_new_tokens": 8}
    text = model.generate(ids, **arguments)
    compile(model, backend="eager")
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **arguments), text)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **arguments), text)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(config=model.config), **arguments), text)
    graphs()


def test_static_state_keeps_its_addresses_from_the_first_call_on():
    model = compile(swapped(), backend="eager")
    ids, mask = prompts()
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, StaticCache) and cache.get_max_length() == CACHE_STEP
    held = [*cache.layers[0].state.values(), cache.layers[0].count, cache.layers[1].keys]
    assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in held)
    assert int(cache.layers[0].count) == 14  # 11 of the prompt, 3 of the 4 new tokens went in


def test_training_goes_through_the_compiled_forward():
    gradients = []
    for compiled in (False, True):
        model = swapped().train()
        if compiled:
            compile(model, backend="eager")
        ids, _ = prompts()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.mixer.q_proj.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_uncompile_gives_the_forward_back_and_compiling_twice_is_an_error():
    model = swapped()
    forward = model.forward
    compile(model, backend="eager")
    with pytest.raises(SwapError, match="compiled already"):
        compile(model)
    with pytest.raises(SwapError, match="uncompile"):
        restore_(model)
    assert uncompile(model).forward == forward
    with pytest.raises(SwapError, match="not compiled"):
        uncompile(model)


@pytest.mark.slow
def test_inductor_gives_the_same_tokens():
    model = swapped(mixer="gated_deltanet", keep=0)
    ids, mask = prompts()
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    text = model.generate(ids, **arguments)
    compile(model)
    assert torch.equal(model.generate(ids, **arguments), text)
    assert graphs() == 2
