"""PyTorch's own attention layers are proved and swapped; inputs are made for any model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from small_encoders import Around, Small, kinds, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.errors import CaptureError, SwapError
from fla_swap.model_inputs import default_inputs, inputs_of_length, resizable
from fla_swap.types import ArgPath, Mask

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
