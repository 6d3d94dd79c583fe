"""A compiled model's decode loop gives transformers' tokens, whatever the batch, the processors and the ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sites import prompts, report_of, tiny
from torch._dynamo.utils import counters
from transformers.masking_utils import sliding_window_causal_mask_function

from fla_swap.compilation import compile
from fla_swap.decoding import bucket
from fla_swap.planning import plan
from fla_swap.swapping import swap_
from fla_swap.whole_prompts import NAME, whole_prompt, whole_prompt_mask


@pytest.fixture(scope="module")
def models():
    """The same hybrid twice: as it is, and compiled."""
    torch.compiler.reset()
    plain, compiled = (swap_(m, plan(report_of(m), mixer="gla", keep=(1,))) for m in (tiny("llama"), tiny("llama")))
    yield plain, compile(compiled, backend="eager")
    torch.compiler.reset()


def same(models, ids, **arguments):
    plain, compiled = models
    expected = plain.generate(ids, **arguments)
    assert torch.equal(compiled.generate(ids, **arguments), expected)
    return expected


def test_rows_are_padded_to_a_bucket_and_a_batch_within_it_compiles_nothing(models):
    assert [bucket(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    ids, mask = prompts(batch=4)
    same(models, ids, attention_mask=mask, do_sample=False, max_new_tokens=5)
    counters.clear()
    same(models, ids[:3], attention_mask=mask[:3], do_sample=False, max_new_tokens=9)
    assert counters["stats"]["unique_graphs"] == 0 and not counters["graph_break"]


def test_each_row_ends_at_its_own_end_and_is_padded_from_there(models):
    ids, mask = prompts(batch=3)
    free = same(models, ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    ends = [int(free[0, 13]), int(free[1, 12]), int(free[2, 12])]
    text = same(models, ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
    assert text.shape[1] < free.shape[1]


def test_one_new_token_and_several_copies_of_a_prompt(models):
    ids, _ = prompts(batch=1, padding=0)
    assert same(models, ids, do_sample=False, max_new_tokens=1).shape == (1, 12)
    copies = models[1].generate(ids, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=4)
    assert torch.equal(copies, models[0].generate(ids, do_sample=False, max_new_tokens=4).expand(3, -1))


def test_processors_on_the_device_and_those_that_need_the_host(models):
    ids, mask = prompts()
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    free = same(models, ids, **arguments)
    assert not torch.equal(same(models, ids, repetition_penalty=3.0, **arguments), free)
    same(models, ids, no_repeat_ngram_size=2, **arguments)


def test_sampling_draws_from_the_processed_distribution(models):
    ids, _ = prompts(batch=1, padding=0)
    with torch.no_grad():
        chances = models[0](ids).logits[0, -1].softmax(-1)
    kept = chances.topk(3)
    torch.manual_seed(0)
    drawn = models[1].generate(ids, do_sample=True, top_k=3, num_return_sequences=512, max_new_tokens=1)[:, -1]
    shares = torch.stack([(drawn == token).double().mean() for token in kept.indices])
    assert torch.allclose(shares, (kept.values / kept.values.sum()).double(), atol=0.06)


def test_a_streamer_gets_every_token(models):
    class Collect:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, tokens):
            self.parts.append(tokens.flatten())

        def end(self):
            self.ended = True

    ids, _ = prompts(batch=1, padding=0)
    collected = Collect()
    text = models[1].generate(ids, do_sample=False, max_new_tokens=6, streamer=collected)
    assert collected.ended and torch.equal(torch.cat(collected.parts), text[0])


def test_a_prompt_without_padding_is_read_without_a_mask(models):
    sizes: dict[str, Any] = {"batch_size": 1, "q_length": 3, "kv_length": 8}
    assert whole_prompt_mask(**sizes) is None
    window = whole_prompt_mask(**sizes, mask_function=sliding_window_causal_mask_function(2), local_size=2)
    assert window is not None and window[0, 0].sum(-1).tolist() == [1, 2, 2]
    with whole_prompt(models[0]) as able:
        assert able and models[0].config._attn_implementation == NAME
    ids, mask = prompts(batch=2, padding=0)
    same(models, ids, attention_mask=mask, do_sample=False, max_new_tokens=5)
    assert models[1].config._attn_implementation == "sdpa"
