"""Every way to generate equals generating without a cache."""

from __future__ import annotations

import pytest
import torch
from sites import prompts, report_of, tiny, toy_registered
from transformers import DynamicCache, StaticCache

from fla_swap.planning import plan
from fla_swap.swapping import swap_

# Name → arguments of `generate`; each is compared with the same search without a cache.
WAYS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "prefill in pieces": {"prefill_chunk_size": 4},
    "prefill in pieces, static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}
SEARCH = ("num_beams", "do_sample", "num_return_sequences")
MODELS = [
    ("llama", "toy", [1]),
    ("gpt2", "toy", 0),
    ("mistral", "toy", [1]),
    ("qwen3", "gla", [0]),
    ("llama", "gated_deltanet", 0),
    ("llama", "hgrn", 0),
    ("qwen3", "mamba", [0]),
    ("mistral", "window", 0),
    ("phi3", "softmax", 0),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: "-".join(map(str, p)))
def model(request):
    family, mixer, keep = request.param
    with toy_registered():
        model = tiny(family)
        return swap_(model, plan(report_of(model), mixer=mixer, keep=keep, local=True))


def generate(model, ids, mask, **arguments):
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 4, "do_sample": False, **arguments})


@pytest.mark.parametrize("way", WAYS)
def test_with_a_cache_as_without(model, way):
    ids, mask = prompts()
    arguments = WAYS[way]
    search = {n: v for n, v in arguments.items() if n in SEARCH}
    assert torch.equal(generate(model, ids, mask, **arguments), generate(model, ids, mask, use_cache=False, **search))


def test_a_left_padded_batch_as_single_prompts(model):
    ids, mask = prompts()
    batch = generate(model, ids, mask)
    assert torch.equal(batch[0, 4:], generate(model, ids[:1, 4:], mask[:1, 4:])[0])
    assert torch.equal(batch[1], generate(model, ids[1:], mask[1:])[0])


@pytest.mark.parametrize("static", [False, True])
def test_a_left_padded_batch_token_by_token_as_in_one_call(model, static):
    """A token of padding that comes alone does not enter the state either."""
    ids, mask = prompts()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [
            model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=cache,
            ).logits
            for t in range(ids.shape[1])
        ]
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_several_calls_as_in_one(model, static):
    ids, _ = prompts()
    cache = StaticCache(model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 11))]
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-5)


def test_speculation_takes_wrong_guesses_back(model):
    """Prompt lookup, and assistance by another model, both roll the state back."""
    ids, mask = prompts()
    ids, mask = ids[1:], mask[1:]
    plain = generate(model, ids, mask, max_new_tokens=8)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=8, prompt_lookup_num_tokens=3), plain)
    other = tiny("llama", layers=1, seed=3)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=8, assistant_model=other), plain)


def test_a_swapped_model_can_assist():
    with toy_registered():
        helper = tiny("llama", layers=3)
        swap_(helper, plan(report_of(helper), mixer="toy", keep=[1]))
    model = tiny("llama", layers=3)
    ids, mask = prompts(padding=0)
    ids, mask = ids[1:], mask[1:]
    plain = generate(model, ids, mask, max_new_tokens=8)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=8, assistant_model=helper), plain)
