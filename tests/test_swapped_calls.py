"""A swapped layer honours what it is called with: masks, arguments, training mode, weights and buffers of the owner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.errors import SwapError

WIDTH, HEADS = 32, 4


class Owner(nn.Module):
    """Causal attention written out; `mask` [B, S] or [B, 1, T, S] hides more where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def scores(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k))
        return q @ k.mT * (WIDTH // HEADS) ** -0.5

    def seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if mask is None:
            return seen
        return seen & (mask[:, None, None, :] if mask.dim() == 2 else mask).bool()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = self.scores(x).masked_fill(~self.seen(x, mask), float("-inf")).softmax(-1)
        v = self.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Holder(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.e, self.a, self.f = nn.Embedding(100, WIDTH), owner, nn.Linear(WIDTH, 100)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.e(ids)
        return self.f(x + (self.a(x) if mask is None else self.a(x, mask)))


def ids(length: int = 20) -> Tensor:
    return torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))


def padded(length: int = 20) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :6] = False
    return mask


def swapped(model: nn.Module, *example: Any, mixer: str = "softmax") -> nn.Module:
    report = fs.inspect(model.eval(), *example)
    return fs.swap_(copy.deepcopy(model), fs.plan(report, mixer=mixer, keep=0))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("fill", [-1e9, -1e4, -1e30, float("-inf")])
@torch.no_grad()
def test_a_mask_to_be_added_hides_whatever_large_number_it_is_filled_with(fill: float) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, dropout=0.0)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, src_mask=mask)

    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 16, WIDTH)
    mask = torch.zeros(16, 16).masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), fill)
    after = swapped(model, {"x": x, "mask": mask})
    assert apart(model(x, mask), after(x, mask)) < 1e-5


@torch.no_grad()
def test_a_tensor_that_was_absent_when_the_model_was_inspected_is_refused() -> None:
    model = Holder(Owner())
    after = swapped(model, (ids(),))
    assert apart(model(ids()), after(ids())) < 1e-5
    with pytest.raises(SwapError, match=r"a is called with a tensor mask \[2, 20\].*absent or None.*\['x'\]"):
        after(ids(), padded())


@torch.no_grad()
def test_a_llama_inspected_without_a_mask_refuses_padding_and_says_how_to_inspect() -> None:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    after = swapped(model, {"input_ids": ids()})
    assert apart(model(ids()).logits, after(ids()).logits) < 1e-5
    with pytest.raises(SwapError, match=r"attention_mask .*Inspect the model again with example_inputs"):
        after(ids(), attention_mask=padded().long())
    after = swapped(model, {"input_ids": ids(), "attention_mask": torch.ones_like(ids())})
    before, now = (m(ids(), attention_mask=padded().long()).logits for m in (model, after))
    assert apart(before[padded()], now[padded()]) < 1e-5


@torch.no_grad()
def test_arguments_arrive_by_position_or_by_name() -> None:
    model = Holder(Owner())
    after = swapped(model, (ids(), torch.ones(2, 20, dtype=torch.bool)))
    x, valid = torch.randn(2, 20, WIDTH), padded()
    before = model.a(x, valid)
    for now in (after.a(x, valid), after.a(x, mask=valid), after.a(x=x, mask=valid)):
        assert apart(before[valid], now[valid]) < 1e-5


def test_an_argument_that_the_owner_does_not_take_is_a_type_error() -> None:
    after = swapped(Holder(Owner()), (ids(),))
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        after.a(torch.randn(2, 5, WIDTH), foo=1)
    with pytest.raises(TypeError, match="takes 2 positional arguments, got 3"):
        after.a(torch.randn(2, 5, WIDTH), None, None)
    assert after.a(torch.randn(2, 5, WIDTH), None).shape == (2, 5, WIDTH)


@pytest.mark.parametrize("shape", ["all", "blocks"])
@torch.no_grad()
def test_what_the_owner_hides_itself_stays_hidden_under_a_mask_over_pairs(shape: str) -> None:
    model = Holder(Owner())
    after = swapped(model, (ids(), torch.ones(2, 20, dtype=torch.bool)))
    block = torch.arange(20) // 10
    pairs = torch.ones(20, 20, dtype=torch.bool) if shape == "all" else block[:, None] == block
    pairs = pairs.expand(2, 1, 20, 20)
    assert apart(model(ids(), pairs), after(ids(), pairs)) < 1e-5


def only_miss(model: nn.Module, *example: Any) -> fs.NearMiss:
    report = fs.inspect(model.eval(), *example, strict=False)
    assert not report.sites and len(report.near_misses) == 1, report
    return report.near_misses[0]


class ScoreDropout(Owner):
    def scores(self, x: Tensor) -> Tensor:
        return F.dropout(super().scores(x), 0.3, self.training)


class OutputDropout(Owner):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.dropout(super().forward(x, mask), 0.5, self.training)


class ResidualDropout(Owner):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + F.dropout(super().forward(x, mask), 0.5, self.training)


class HeadsDropout(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))


class TrainingWindow(Owner):
    def seen(self, x: Tensor, mask: Tensor | None) -> Tensor:
        seen = super().seen(x, mask)
        return seen.triu(-3) if self.training else seen


def test_dropout_of_the_scores_is_refused() -> None:
    assert "0.3 of the scores are dropped before the softmax" in only_miss(Holder(ScoreDropout()), (ids(),)).reason


def test_other_code_in_training_mode_is_refused() -> None:
    assert "something else in training mode" in only_miss(Holder(TrainingWindow()), (ids(),)).reason


@pytest.mark.parametrize("owner", [OutputDropout, ResidualDropout])
def test_dropout_of_the_output_is_carried_over(owner: type[Owner]) -> None:
    torch.manual_seed(0)
    model = Holder(owner()).eval()
    report = fs.inspect(model, (ids(),))
    assert report.sites[0].output_dropout == 0.5 and report.sites[0].dropout == 0.0 and not report.notes
    layer = fs.swap_(copy.deepcopy(model), fs.plan(report, mixer="softmax", keep=0)).a
    x = torch.randn(2, 20, WIDTH)
    assert apart(model.a(x), layer(x)) < 1e-5
    for module in (model.a.train(), layer.train()):
        torch.manual_seed(1)
        mixed = module(x) - (x if owner is ResidualDropout else 0)
        dropped = mixed.abs() < 1e-6
        assert 0.4 < float(dropped.float().mean()) < 0.6
    torch.manual_seed(1)
    before = model.a(x)
    torch.manual_seed(1)
    assert apart(before, layer(x)) < 1e-5


def test_dropout_elsewhere_is_said_in_the_report() -> None:
    report = fs.inspect(Holder(HeadsDropout()).eval(), (ids(),))
    assert any("a: training mode drops 0.3 of a tensor" in note for note in report.notes)


def test_gpt2_keeps_the_dropout_of_its_residual_stream() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, resid_pdrop=0.2, attn_pdrop=0.1)
    (site,) = fs.inspect(transformers.GPT2LMHeadModel(config)).sites
    assert (site.output_dropout, site.dropout) == (pytest.approx(0.2), pytest.approx(0.1))


class Outside(Holder):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return self.f(F.linear(x + self.a(x), self.a.v.weight))


class Tied(Holder):
    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.g = nn.Linear(WIDTH, WIDTH)
        self.g.weight = owner.v.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return self.f(self.g(x + self.a(x)))


def test_a_weight_that_is_read_outside_its_module_is_a_reason_to_refuse() -> None:
    miss = only_miss(Outside(Owner()), (ids(),))
    assert miss.slot == "owner" and "reads a.v.weight outside a" in miss.reason and "test_swapped_calls" in miss.reason


@torch.no_grad()
def test_a_weight_that_another_module_holds_too_stays_there() -> None:
    model = Tied(Owner())
    assert apart(model(ids()), swapped(model, (ids(),))(ids())) < 1e-5


class Counting(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        return super().forward(x, mask)


def test_an_owner_that_writes_a_buffer_is_refused_and_the_buffer_is_as_before() -> None:
    model = Holder(Counting())
    assert "writes its buffer 'calls'" in only_miss(model, (ids(),)).reason
    assert float(model.a.calls) == 0.0


def test_inspect_leaves_the_random_numbers_as_they_were() -> None:
    model = Holder(OutputDropout())
    before = torch.get_rng_state()
    fs.inspect(model, (ids(),))
    assert torch.equal(before, torch.get_rng_state())
