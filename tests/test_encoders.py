"""Encoders, encoder–decoders, vision and audio models, `nn.MultiheadAttention`: what is proved, refused and swapped."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.contract import derive_contract, find_entry
from fla_swap.errors import CaptureError, NoAttentionFound, PlanError, SwapError, VerificationError
from fla_swap.model_inputs import default_inputs, inputs_of_length, padding_masks, resizable
from fla_swap.recording import record_calls
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, CallContract, Mask
from fla_swap.verification import Call, prove

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
VIT: dict[str, Any] = {**BERT, "image_size": 32, "patch_size": 8}
TEXT = {**BERT, "max_position_embeddings": 77}

# name → (config class, model class, config, what its sites are: "kind mask" in order)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "bert": ("BertConfig", "BertModel", BERT, ["self bidirectional"] * 2),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        ["self bidirectional"] * 2,
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {**BERT, "local_attention": 16, "global_attn_every_n_layers": 2},
        ["self bidirectional", "self local"],
    ),
    "vit": ("ViTConfig", "ViTModel", VIT, ["self bidirectional"] * 2),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VIT},
        ["self bidirectional"] * 2 + ["self causal"] * 2,
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        BART,
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
    "marian": (
        "MarianConfig",
        "MarianMTModel",
        {**BART, "pad_token_id": 98, "decoder_start_token_id": 98},
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 64, "pad_token_id": 0},
        ["self bidirectional", "self causal", "cross bidirectional"],
    ),
}


def tiny(family: str, implementation: str = "sdpa") -> nn.Module:
    config, model, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**options)
    return getattr(transformers, model)._from_config(made, attn_implementation=implementation).eval()


@cache
def found(family: str, implementation: str = "sdpa") -> AttentionReport:
    return fs.inspect(tiny(family, implementation))


def kinds(report: AttentionReport) -> list[str]:
    return [f"{s.kind} {s.mask.kind}" for s in report.sites]


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


class Small(nn.Module):
    """One attention of four heads over 16 channels, with a twist."""

    def __init__(self, twist: str = "none"):
        super().__init__()
        self.twist = twist
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(64, 64))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (
            p(y).unflatten(-1, (4, 4)).transpose(1, 2) for p, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        mask = None
        if self.twist == "bias":
            mask = self.bias[: x.shape[1], : x.shape[1]][None, None]
        if self.twist == "other values":
            v = self.v(x.sin()).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.twist == "causal")
        return self.o(y.transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Holds one; with `places` it has a vector for each of so many tokens, and takes no other number."""

    def __init__(self, inner: nn.Module, places: int | None = None):
        super().__init__()
        self.inner = inner
        self.places = None if places is None else nn.Parameter(torch.randn(places, 16))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x if self.places is None else x + self.places
        return x + (self.inner(x) if memory is None else self.inner(x, memory))


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


# PyTorch's own modules

X, Y = torch.randn(2, 7, 32), torch.randn(2, 9, 32)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
NO_PADDING = torch.zeros(2, 7, dtype=torch.bool)
PADDED = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@cache
def own_modules(batch_first: bool) -> dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any], list[str]]]:
    """name → (module, example, what changes when it is run, its sites)."""

    def flip(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1).contiguous()

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=batch_first)
    whole = nn.Transformer(32, 4, 1, 1, 48, batch_first=batch_first)
    x, y = flip(X), flip(Y)
    padding, padded = {"src_key_padding_mask": NO_PADDING}, {"src_key_padding_mask": PADDED}
    causal = {"tgt_mask": CAUSAL, "tgt_is_causal": True}
    both = ["self bidirectional", "self causal", "cross bidirectional"]
    return {
        "layer": (layer, {"src": x}, {}, both[:1]),
        "padded layer": (layer, {"src": x, **padding}, padded, both[:1]),
        "causal layer": (layer, {"src": x, "src_mask": CAUSAL}, {}, both[1:2]),
        "causal padded layer": (layer, {"src": x, "src_mask": CAUSAL, **padding}, padded, both[1:2]),
        "padded stack": (nn.TransformerEncoder(layer, 2), {"src": x, **padding}, padded, both[:1] * 2),
        "decoder": (decoder, {"tgt": x, "memory": y, **causal}, {}, both[1:]),
        "transformer": (whole, {"src": y, "tgt": x, **causal}, {}, both),
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", own_modules(True))
def test_pytorchs_own_layers_are_proved_and_run_on_after_a_swap(name: str, batch_first: bool) -> None:
    module, example, changes, wanted = own_modules(batch_first)[name]
    report = fs.inspect(module.eval(), example)
    assert kinds(report) == wanted and all(s.proved and s.dropout == pytest.approx(0.1) for s in report.sites)
    assert {s.call.time_first for s in report.sites} == {not batch_first}
    valid = ~PADDED if changes else ~NO_PADDING
    with torch.no_grad():
        before = module(**{**example, **changes})
        fs.swap_(module, fs.plan(report, mixer="softmax", keep=0))
        after = module(**{**example, **changes})
        fs.restore_(module)
        again = module(**{**example, **changes})
    valid = valid if batch_first else valid.t()
    assert torch.allclose(before[valid], after[valid], atol=1e-5) and torch.equal(before, again)


def test_separate_projections_of_another_width() -> None:
    module = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
    memory = torch.randn(2, 9, 24)
    (site,) = fs.inspect(module, {"query": X, "key": memory, "value": memory, "need_weights": False}).sites
    assert (site.fqn, site.kind, site.memory_size, site.hidden_size) == ("", "cross", 24, 32)
    assert site.k.weight.name == "k_proj_weight" and site.proved
    assert site.k.bias is not None and site.k.bias.rows == ((32, 64),)


def test_a_mask_that_is_true_where_a_key_is_hidden() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return x + self.attention(x, x, x, attn_mask=later, need_weights=False)[0]

    model = Outer().eval()
    report = fs.inspect(model, X)
    (site,) = report.sites
    assert site.mask == Mask(kind="causal") and site.call.hides and site.call.pairs == ArgPath(keyword="attn_mask")
    with torch.no_grad():
        before = model(X)
        fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
        assert torch.allclose(model(X), before, atol=1e-5)
        with pytest.raises(SwapError, match="called without one"):
            model.attention(X, X, X, need_weights=False)


def test_the_model_itself_cannot_be_replaced_in_place() -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    report = fs.inspect(module, {"query": X, "key": X, "value": X, "need_weights": False})
    with pytest.raises(SwapError, match="the attention is the whole model"):
        fs.swap_(module, fs.plan(report, mixer="softmax", keep=0))


# Inputs


def test_example_tensors_of_several_lengths_are_resized_apart() -> None:
    example = {"tgt": X, "memory": Y, "tgt_mask": CAUSAL, "padding": NO_PADDING, "scale": torch.ones(3)}
    _, changed = inputs_of_length(example, 13, resize=[7, 9], padded=4)
    assert changed["tgt"].shape == (2, 13, 32) and changed["memory"].shape == (2, 11, 32)
    assert torch.equal(changed["tgt"][:, 7:], X[:, :6]) and changed["scale"] is example["scale"]
    assert torch.equal(changed["tgt_mask"], nn.Transformer.generate_square_subsequent_mask(13))
    assert changed["padding"].tolist() == [[False] * 13, [True] * 4 + [False] * 9]


def test_tokens_may_stand_in_the_first_dimension() -> None:
    (longer,), _ = inputs_of_length(X.transpose(0, 1), 11, time_first=True)
    assert longer.shape == (11, 2, 32) and torch.equal(longer[7:, 0], X[0, :4])


def test_sizes_that_a_model_does_not_take_stay_as_they_are() -> None:
    image, tokens = torch.randn(1, 3, 8, 8), torch.randn(1, 9, 16)

    class Both(nn.Module):
        def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
            return tokens + F.conv2d(image, torch.ones(1, 3, 8, 8)).mean()

    assert resizable(Both(), (image, tokens), 13) == [9]
    assert resizable(Around(Small(), places=9), (tokens,), 13) == []


def test_inputs_are_made_of_signature_and_config() -> None:
    _, clip = default_inputs(tiny("clip"), 13)
    assert clip["pixel_values"].shape == (2, 3, 32, 32) and clip["input_ids"].shape == (2, 13)
    _, whisper = default_inputs(tiny("whisper"), 13, padded=3)
    assert whisper["input_features"].shape == (2, 8, 80) and whisper["decoder_input_ids"].shape == (2, 11)
    with pytest.raises(CaptureError, match="pass example_inputs"):
        default_inputs(nn.Linear(2, 2), 13)


def test_a_capture_that_fails_names_the_part_to_inspect() -> None:
    class Branches(Around):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.inner(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"could not follow Branches.*within=\['inner'"):
        fs.inspect(Branches(Small()), torch.randn(2, 9, 16))


def test_padding_may_come_as_four_dimensions_beside_a_mask_that_the_owner_makes() -> None:
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    report = fs.inspect(model)
    assert [s.fqn for s in report.sites] == ["transformer.h.0.attn", "transformer.h.1.attn"] and not report.near_misses
    for site in report.sites:
        assert site.proved and site.mask == Mask(kind="causal") and site.call.mask is None
        assert site.call.padding == ArgPath(keyword="attention_mask")
    ids, mask = torch.randint(0, 99, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
        after = model(input_ids=ids, attention_mask=mask).logits
    assert float((after - before)[mask.bool()].abs().max()) <= 1e-5
