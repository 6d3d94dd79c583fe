"""Encoders, encoder–decoders, vision and audio models, `nn.MultiheadAttention`: what is proved, refused and swapped."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from small_encoders import FAMILIES, Around, Small, kinds, tiny
from torch import nn

import fla_swap as fs
from fla_swap.contract import derive_contract, find_entry
from fla_swap.errors import NoAttentionFound, PlanError, VerificationError
from fla_swap.model_inputs import default_inputs, padding_masks
from fla_swap.recording import record_calls
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, CallContract, Mask
from fla_swap.verification import Call, prove


@cache
def found(family: str, implementation: str = "sdpa") -> AttentionReport:
    return fs.inspect(tiny(family, implementation))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_found_told_apart_and_proved(family: str, implementation: str) -> None:
    report = found(family, implementation)
    assert kinds(report) == FAMILIES[family][3]
    assert not report.near_misses and not report.unclaimed
    for site in report.sites:
        assert site.proved and site.max_error is not None and site.max_error < 1e-5
        assert (site.heads, site.head_dim, site.hidden_size) == (4, 8, 32)
        assert site.scale == pytest.approx(8**-0.5)


def test_cross_attention_states_its_memory() -> None:
    site = found("bart").sites[2]
    fqn = "model.decoder.layers.0.encoder_attn"
    assert (site.fqn, site.memory_size) == (fqn, 32)
    assert site.k.weight.name == f"{fqn}.k_proj.weight" and site.q.weight.name == f"{fqn}.q_proj.weight"
    assert site.call.memory == ArgPath(keyword="key_value_states") and site.call.mask == ArgPath(
        keyword="attention_mask"
    )
    assert found("bart").sites[1].call.memory is None


def test_an_attention_that_leaves_its_heads_side_by_side_has_no_output_projection() -> None:
    assert [s.o for s in found("bert").sites] == [None, None]
    assert found("bert").sites[0].fqn == "encoder.layer.0.attention.self"


def test_a_local_mask_counts_the_keys_on_one_side() -> None:
    assert found("modernbert").sites[1].mask == Mask(kind="local", window=9)  # eight tokens on each side


def test_layers_of_one_length_are_noted() -> None:
    assert "one size only" in found("vit").notes[0]
    assert "2 layers have one token count only (vision_model.encoder.layers.0.self_attn …)" in found("clip").notes
    assert not found("bart").notes


def test_a_learned_bias_is_named_and_the_cross_attention_beside_it_proved() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    model = transformers.T5ForConditionalGeneration(config).eval()
    report = fs.inspect(model)
    assert kinds(report) == ["cross bidirectional"] * 2 and all(s.proved for s in report.sites)
    assert {m.slot for m in report.near_misses} == {"mask"} and len(report.near_misses) == 4
    assert all("relative_attention_bias.weight" in m.reason for m in report.near_misses)


# Refusals


@pytest.mark.parametrize(
    ("twist", "slot", "reason"),
    [
        ("bias", "mask", "learned bias .* 'inner.bias'"),
        ("other values", "owner", "before the projection"),
    ],
)
def test_what_is_not_understood_is_a_near_miss(twist: str, slot: str, reason: str) -> None:
    with pytest.raises(NoAttentionFound, match=reason) as caught:
        fs.inspect(Around(Small(twist)), torch.randn(2, 9, 16))
    (miss,) = caught.value.report.near_misses
    assert miss.slot == slot


def test_a_model_of_one_length_is_proved_unless_its_mask_is_causal() -> None:
    report = fs.inspect(Around(Small(), places=9), torch.randn(2, 9, 16))
    assert kinds(report) == ["self bidirectional"] and report.sites[0].proved and "one size only" in report.notes[0]
    with pytest.raises(NoAttentionFound, match=r"captured at one length only \(9 tokens\)"):
        fs.inspect(Around(Small("causal"), places=9), torch.randn(2, 9, 16))


def test_a_causal_cross_attention_is_refused() -> None:
    with pytest.raises(NoAttentionFound, match="a cross-attention under a causal mask"):
        fs.inspect(Around(Small("causal")), (torch.randn(2, 7, 16), torch.randn(2, 9, 16)))


def test_keys_and_memory_of_one_length_cannot_be_told_apart() -> None:
    x = torch.randn(2, 9, 16)
    with pytest.raises(NoAttentionFound, match="give them different lengths"):
        fs.inspect(Around(Small()), (x, torch.randn(2, 9, 16)))
    (site,) = fs.inspect(Around(Small()), (x, torch.randn(2, 7, 16))).sites
    assert site.kind == "cross" and site.proved and site.call.memory == ArgPath(position=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"add_bias_kv": True}, "14 keys for 13 tokens"),
        ({"add_zero_attn": True}, "14 keys for 13 tokens"),
    ],
)
def test_keys_that_are_no_tokens_are_refused(options: dict[str, Any], reason: str) -> None:
    x = torch.randn(2, 7, 16)
    inputs = {"query": x, "key": x, "value": x, "need_weights": False}
    with pytest.raises(NoAttentionFound, match=reason):
        fs.inspect(nn.MultiheadAttention(16, 4, batch_first=True, **options), inputs)


def test_attention_weights_that_somebody_reads_are_refused() -> None:
    x = torch.randn(2, 7, 16)
    with pytest.raises(NoAttentionFound, match="also returns"):
        fs.inspect(nn.MultiheadAttention(16, 4, batch_first=True), (x, x, x))


# The proof


@cache
def proof_case(family: str, number: int) -> tuple[AttentionSite, nn.Module, Call]:
    model, site = tiny(family), found(family).sites[number]
    inputs = default_inputs(model, 23, padded=5)
    record = record_calls(model, [site.fqn], inputs)[site.fqn]
    entry = find_entry(site, record)
    assert not isinstance(entry, str)
    masks = padding_masks(inputs)
    valid, memory_valid = (next((m for m in masks if m.shape[1] == n), None) for n in (entry.length, entry.keys))
    positions = torch.arange(entry.length).expand(entry.batch, -1)
    assert valid is not None and not valid.all()
    contract = derive_contract(site, record, valid, positions, None, memory_valid=memory_valid)
    assert isinstance(contract, CallContract)
    assert dataclasses.replace(contract, cache=site.call.cache, cache_index=site.call.cache_index) == site.call
    call = Call(args=record.args, kwargs=record.kwargs, valid=valid, positions=positions, memory_valid=memory_valid)
    return site, model.get_submodule(site.fqn), call


MUTATIONS: dict[str, tuple[str, int, Any]] = {
    "causal": ("bert", 0, lambda s: {"mask": Mask(kind="causal")}),
    "narrower": ("modernbert", 1, lambda s: {"mask": Mask(kind="local", window=8)}),
    "everything seen": ("modernbert", 1, lambda s: {"mask": Mask(kind="bidirectional")}),
    "no bias": ("bert", 1, lambda s: {"v": dataclasses.replace(s.v, bias=None)}),
    "bidirectional decoder": ("bart", 1, lambda s: {"mask": Mask(kind="bidirectional")}),
    "keys for values": ("bart", 2, lambda s: {"v": s.k}),
    "scale": ("bart", 2, lambda s: {"scale": s.scale * 1.01}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_fact_is_refused(name: str) -> None:
    family, number, change = MUTATIONS[name]
    site, owner, call = proof_case(family, number)
    assert prove(site, owner, call).error < 1e-5
    with pytest.raises(VerificationError, match="differs from the module's own output"):
        prove(dataclasses.replace(site, **change(site)), owner, call)


def test_padding_of_the_memory_is_part_of_the_proof() -> None:
    site, owner, call = proof_case("bart", 2)
    with pytest.raises(VerificationError, match="differs from the module's own output"):
        prove(site, owner, dataclasses.replace(call, memory_valid=torch.ones(2, 23, dtype=torch.bool)))


# Swapping


def test_only_mixers_without_a_state_replace_a_bidirectional_attention() -> None:
    with pytest.raises(PlanError, match="its mask is 'bidirectional'"):
        fs.plan(found("bert"), mixer="gla", keep=0)
    with pytest.raises(PlanError, match="cross-attention"):
        fs.plan(found("bart"), rules=[fs.Rule("*.encoder_attn", "softmax")])


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_softmax_in_every_place_changes_nothing(family: str) -> None:
    model = tiny(family)
    _, kwargs = default_inputs(model, 19, padded=4)
    with torch.no_grad():
        before = model(**kwargs)[0]
        fs.swap_(model, fs.plan(found(family), mixer="softmax", keep=0))
        after = model(**kwargs)[0]
    assert torch.allclose(before[0], after[0], atol=1e-5)
    assert torch.allclose(before[1, 4:], after[1, 4:], atol=1e-5)


def test_a_swapped_decoder_generates_as_before_with_its_cache() -> None:
    model: Any = tiny("bart")
    ids = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "eos_token_id": None, "min_new_tokens": 8}
    before = model.generate(ids, **options)
    fs.swap_(model, fs.plan(found("bart"), mixer="softmax", keep=0))
    assert torch.equal(model.generate(ids, **options), before) and before.shape[1] > 8
