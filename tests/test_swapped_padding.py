"""Padding, packed documents and masks, as a swapped layer reads them."""

from __future__ import annotations

import pytest
import torch
from sites import logits, prompts, report_of, tiny, toy_plan, toy_registered
from torch import nn
from transformers import DynamicCache, StaticCache

from fla_swap.errors import SwapError
from fla_swap.hybrid import fetch, read_mask
from fla_swap.planning import plan
from fla_swap.swapping import swap_
from fla_swap.types import ArgPath


@pytest.fixture(scope="module", autouse=True)
def toy():
    with toy_registered():
        yield


def test_padding_does_not_reach_a_linear_layer():
    model = tiny("llama", layers=3)
    swap_(model, toy_plan(model, keep=[1]))
    ids, mask = prompts(padding=4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[0, 4:], logits(model, ids[:1, 4:])[0], atol=1e-5, rtol=0)


GAPPED = torch.tensor([[5, 6, 7, 0, 0, 8, 9, 10]])  # 0 is padding
GAPPED_MASK = (GAPPED != 0).long()
GAPPED_POSITIONS = torch.tensor([[0, 1, 2, 2, 2, 3, 4, 5]])


def gapped_model(mixer, attn):
    model = tiny("llama", attn=attn).double()
    swap_(model, plan(report_of(model), mixer=mixer, keep=0))
    for name, p in model.named_parameters():
        if name.endswith("conv.weight"):  # as after training; it starts as the identity
            nn.init.normal_(p, std=0.5)
    return model, GAPPED_MASK.bool()[0], logits(model, GAPPED[GAPPED_MASK.bool()][None])[0]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "window", "toy"])
def test_padding_in_the_middle_is_skipped_and_starts_no_document(mixer, attn):
    model, real, whole = gapped_model(mixer, attn)
    padded = logits(model, GAPPED, attention_mask=GAPPED_MASK, position_ids=GAPPED_POSITIONS)
    assert (padded[0, real] - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "window", "toy"])
@pytest.mark.parametrize("pieces", [(5, 3), (4, 1, 3), (1,) * 8])
def test_a_right_padded_turn_leaves_the_state_for_the_next_turn(mixer, static, pieces):
    """Also when a piece is one token of padding, and when every piece is one token."""
    model, real, whole = gapped_model(mixer, "sdpa")
    cache = StaticCache(model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    outputs, end = [], 0
    for length in pieces:
        start, end = end, end + length
        arguments = {"attention_mask": GAPPED_MASK[:, :end], "position_ids": GAPPED_POSITIONS[:, start:end]}
        outputs.append(logits(model, GAPPED[:, start:end], past_key_values=cache, **arguments))
    assert (torch.cat(outputs, 1)[0, real] - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "window"])
def test_documents_apart_by_a_mask_when_fed_token_by_token(mixer):
    """A mask of the caller's own, one row at a time: its third token sees itself alone."""
    model = tiny("llama").double()
    swap_(model, plan(report_of(model), mixer=mixer, keep=0))
    ids, _ = prompts(batch=1, length=5)
    positions, cache, outputs = torch.tensor([[0, 1, 0, 1, 2]]), DynamicCache(config=model.config), []
    for t in range(5):
        keys = torch.arange(t + 1)
        seen = (keys >= (0 if t < 2 else 2))[None, None, None]
        arguments = {"attention_mask": seen, "position_ids": positions[:, t : t + 1]}
        outputs.append(logits(model, ids[:, t : t + 1], past_key_values=cache, **arguments))
    apart = torch.cat((logits(model, ids[:, :2]), logits(model, ids[:, 2:])), 1)
    assert (torch.cat(outputs, 1) - apart).abs().max() <= 1e-6


def test_a_window_of_one_token_says_nothing_about_documents():
    """Every token sees itself alone there: a linear layer keeps its state, in a prompt as in decoding."""
    model = tiny("mistral").double()
    model.config.sliding_window = 1
    swap_(model, plan(report_of(model), mixer="gla", keep=0, local=True))
    ids, _ = prompts(batch=1, length=5)
    cache, pieces = DynamicCache(config=model.config), []
    for t in range(5):
        pieces.append(logits(model, ids[:, t : t + 1], past_key_values=cache))
    whole = logits(model, ids)
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-6
    ids[:, 0] = 1 + ids[:, 0] % 90
    assert (logits(model, ids) - whole)[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attn):
    """Position ids that start again make a block mask; its sub-diagonal tells the documents apart."""
    model = tiny("llama", attn=attn)
    swap_(model, toy_plan(model, keep=[1]))
    ids, _ = prompts(batch=1)
    positions = torch.cat((torch.arange(5), torch.arange(6)))[None]
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    apart = torch.cat((logits(model, ids[:, :5]), logits(model, ids[:, 5:])), 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


def test_cu_seqlens_tell_documents_apart_and_leave_no_state():
    model = tiny("llama")
    swap_(model, toy_plan(model))
    ids, _ = prompts(batch=1)
    positions = torch.cat((torch.arange(5), torch.arange(6)))[None]
    borders = torch.tensor([0, 5, 11], dtype=torch.int32)
    with torch.no_grad():
        out = model(ids, position_ids=positions, cu_seq_lens_q=borders)
    apart = torch.cat((logits(model, ids[:, :5]), logits(model, ids[:, 5:])), 1)
    torch.testing.assert_close(out.logits, apart, atol=1e-5, rtol=0)
    with pytest.raises(SwapError, match="packed batch"):
        model(ids[:, :1], past_key_values=out.past_key_values)


def test_flash_attention_masks_are_two_dimensional():
    hidden = torch.zeros(2, 3, 4)
    valid, starts = read_mask(torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]), hidden, 2)
    assert valid.tolist() == [[False, True, True], [True, True, True]] and starts is None
    # A static cache's mask goes on after the tokens; a turn stands at the tokens already seen.
    valid, _ = read_mask(torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0], [1] * 5 + [0] * 3]), hidden, torch.tensor(2))
    assert valid.tolist() == [[False, True, True], [True, True, True]]


def test_masks_are_read_off_their_rows():
    hidden = torch.zeros(1, 6, 4)
    # padding, then a document of one token, then one of three with padding inside
    rows = [[0] * 6, [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6, [0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1]]
    seen = torch.tensor(rows, dtype=torch.bool)[None, None]
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for mask in (seen, additive, torch.where(seen, 0.0, -torch.inf)):
        valid, starts = read_mask(mask, hidden, 0)
        assert valid.tolist() == [[False, True, True, False, True, True]]
        assert starts.tolist() == [[False, True, True, False, False, False]]


def test_a_mask_longer_than_the_tokens_is_read_where_the_tokens_stand():
    """Dynamic caches: the last columns. Static caches: at the number of tokens already seen, a tensor there."""
    hidden = torch.zeros(1, 2, 4)
    dynamic = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)[None, None]
    static = nn.functional.pad(dynamic, (0, 3))
    for mask, seen in ((dynamic, 2), (static, 2), (static, torch.tensor(2))):
        valid, starts = read_mask(mask, hidden, seen)
        assert valid.tolist() == [[True, True]] and starts.tolist() == [[False, True]]
    with pytest.raises(SwapError, match="2 or 4 dimensions"):
        read_mask(dynamic[0], hidden, 2)


def test_arguments_are_found_by_keyword_position_and_item():
    args, kwargs = (1, (2, 3)), {"x": (4, 5)}
    assert fetch(ArgPath(position=0), args, kwargs) == 1
    assert fetch(ArgPath(position=1, item=1), args, kwargs) == 3
    assert fetch(ArgPath(keyword="x", item=0), args, kwargs) == 4
    assert fetch(ArgPath(keyword="y"), args, kwargs) is None
    assert fetch(ArgPath(position=2), args, kwargs) is None
    assert fetch(None, args, kwargs) is None
