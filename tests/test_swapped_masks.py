"""A mask that was an argument when the model was inspected and is None later; one that hid nothing when it was seen."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.errors import SwapError
from fla_swap.types import Mask, SwapPlan, from_jsonable, to_jsonable

WIDTH, HEADS, WINDOW = 32, 4, 6


class Owner(nn.Module):
    """Attention under the mask that it is given, to be added or of truth values; without one, what `bare` says."""

    def __init__(self, bare: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bare = bare

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if mask is None and self.bare == "fails":
            raise ValueError("a mask is needed")
        causal = mask is None and self.bare == "causal"
        mixed = F.scaled_dot_product_attention(q, k, v, self.used(mask), is_causal=causal)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def used(self, mask: Tensor | None) -> Tensor | None:
        return mask


class Holder(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.e, self.a, self.f = nn.Embedding(100, WIDTH), owner, nn.Linear(WIDTH, 100)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.e(ids)
        return self.f(x + self.a(x, mask))


class Masking(Holder):
    """Makes the owner's mask itself: causal, or a causal window."""

    def __init__(self, owner: nn.Module, window: int | None = None) -> None:
        super().__init__(owner)
        self.window, self.masked = window, True

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        i = torch.arange(ids.shape[1])
        seen = i[None] <= i[:, None]
        if self.window is not None:
            seen = seen & (i[:, None] - i[None] < self.window)
        return super().forward(ids, seen.expand(len(ids), 1, -1, -1) if self.masked else None)


def ids(length: int = 20) -> Tensor:
    return torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))


def swapped(model: nn.Module, *example: Any) -> tuple[Any, fs.AttentionSite]:
    report = fs.inspect(model.eval(), *example)
    return fs.swap_(copy.deepcopy(model), fs.plan(report, mixer="softmax", keep=0, local=True)), report.sites[0]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


# Called with None


@torch.no_grad()
def test_an_owner_that_is_causal_without_its_mask_too_may_be_called_without() -> None:
    model: Any = Masking(Owner("causal"))
    after, site = swapped(model, (ids(),))
    assert site.mask.kind == "causal" and site.call.unmasked == "own"
    x = torch.randn(2, 20, WIDTH)
    assert apart(model.a(x, None), after.a(x, None)) < 1e-5
    assert apart(model.a(x), after.a(x)) < 1e-5


@pytest.mark.parametrize("bare", ["all", "fails"])
@torch.no_grad()
def test_an_owner_that_sees_all_without_its_mask_is_not_called_without(bare: str) -> None:
    model: Any = Masking(Owner(bare))
    after, site = swapped(model, (ids(),))
    assert site.mask.kind == "causal" and site.call.unmasked == "other"
    assert apart(model(ids()), after(ids())) < 1e-5
    after.masked = False
    message = r"a is called without a mask, for 20 tokens; it was inspected under a causal mask that is an argument"
    with pytest.raises(SwapError, match=message + ".*hides something else, or fails: pass the mask, or inspect"):
        after(ids())
    assert after(ids(1)).shape == (2, 1, 100)  # one token sees itself, whatever the mask


@torch.no_grad()
def test_an_owner_with_a_window_that_is_causal_without_its_mask_is_called_without_inside_the_window_only() -> None:
    model: Any = Masking(Owner("causal"), window=WINDOW)
    after, site = swapped(model, (ids(),))
    assert site.mask == Mask(kind="window", window=WINDOW) and site.call.unmasked == "causal"
    assert apart(model(ids()), after(ids())) < 1e-5
    model.masked = after.masked = False
    assert apart(model(ids(WINDOW)), after(ids(WINDOW))) < 1e-5
    with pytest.raises(SwapError, match=r"under a window mask that is an argument.*hides what comes later alone"):
        after(ids(WINDOW + 1))


@torch.no_grad()
def test_a_mistral_is_called_without_a_mask_as_transformers_does_it() -> None:
    config = transformers.MistralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model: Any = transformers.MistralForCausalLM(config).eval()
    after, site = swapped(model)
    assert site.mask.window == 8 and site.call.unmasked == "causal"
    for length in (5, 20):
        assert apart(model(ids(length)).logits, after(ids(length)).logits) < 1e-5
    wanted, found = (m.generate(ids(5), max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (model, after))
    assert torch.equal(wanted, found)


def test_what_was_read_is_saved_with_the_plan() -> None:
    plan = fs.plan(fs.inspect(Masking(Owner("all")).eval(), (ids(),)), mixer="softmax", keep=0)
    assert from_jsonable(SwapPlan, to_jsonable(plan)).layers[0].site.call.unmasked == "other"


# Masks that hid nothing


class Blank(Holder):
    """Makes the owner's mask: zeros, as encoders do that are given no padding; over pairs, or of another shape."""

    def __init__(self, owner: nn.Module, shape: str) -> None:
        super().__init__(owner)
        self.shape = shape

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        sizes = {"pairs": (length, length), "four": (batch, 1, length, length), "three": (batch, length, length)}
        return super().forward(ids, torch.zeros(sizes[self.shape]))


@torch.no_grad()
def test_a_mask_of_zeros_stands_for_one_that_hides_where_that_is_proved() -> None:
    x, low = torch.randn(2, 20, WIDTH), torch.finfo(torch.float32).min
    model: Any = Blank(Owner("all"), "four")
    after, site = swapped(model, (ids(),))
    assert site.mask.kind == "bidirectional"
    mask = torch.zeros(2, 1, 20, 20)
    mask[1, ..., :7] = low
    assert apart(model.a(x, mask), after.a(x, mask)) < 1e-5
    model: Any = Blank(Owner("all"), "pairs")
    after, _ = swapped(model, (ids(),))
    mask = torch.zeros(20, 20).masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), low)
    assert apart(model.a(x, mask), after.a(x, mask)) < 1e-5


class Tempered(Owner):
    """What hides is added as no more than -3: the key is still seen a little."""

    def used(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.clamp(min=-3.0)


class Deaf(Owner):
    """Takes a mask and does not look at it."""

    def used(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask * 0.0


@pytest.mark.parametrize("owner", [Tempered, Deaf])
@pytest.mark.parametrize("shape", ["four", "pairs"])
def test_a_mask_of_zeros_that_would_not_hide_is_no_mask(owner: type[Owner], shape: str) -> None:
    (near,) = fs.inspect(Blank(owner("all"), shape).eval(), (ids(),), strict=False).near_misses
    assert near.slot == "call" and "hid nothing when the module was observed" in near.reason
    assert "does something else than hide them" in near.reason and "Inspect with example_inputs" in near.reason


class Spread(Owner):
    """Its mask is [B, T, S]."""

    def used(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[:, None]


@torch.no_grad()
def test_zeros_of_a_shape_that_no_mask_has_stay_zero() -> None:
    model: Any = Blank(Spread("all"), "three")
    after, site = swapped(model, (ids(),))
    assert len(site.call.zeros) == 1
    x, mask = torch.randn(2, 20, WIDTH), torch.zeros(2, 20, 20)
    assert apart(model.a(x, mask), after.a(x, mask)) < 1e-5
    with pytest.raises(SwapError, match=r"a tensor mask \[2, 20, 20\] that is not zero; when the model was inspected"):
        after.a(x, mask - 1)


class Cutting(Owner):
    """Its mask is for more tokens than there are."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        size = x.shape[1]
        return super().forward(x, None if mask is None else mask[..., :size, :size])


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_that_the_owner_cuts_to_size_is_no_mask_of_the_contract(kind: torch.dtype) -> None:
    class Wide(Holder):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            seen = torch.ones(2048, 2048, dtype=torch.bool).tril()[None, None]
            hidden = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
            return super().forward(ids, seen if kind == torch.bool else hidden)

    (near,) = fs.inspect(Wide(Cutting("all")).eval(), (ids(),), strict=False).near_misses
    assert near.slot == "call"
    assert re.search(r"argument number 1 \(1, 1, 2048, 2048\) is a mask for more than \d+ queries", near.reason)


class Counting(Masking):
    """Its mask is a table of ones and zeros, as whole numbers."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.int64).tril()
        return Holder.forward(self, ids, seen.expand(len(ids), 1, -1, -1))


class Filling(Owner):
    def used(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask == 1


@torch.no_grad()
def test_a_mask_of_whole_numbers_over_pairs_is_one_of_truth_values() -> None:
    torch.manual_seed(0)
    model = Counting(Filling("fails"))
    new, site = swapped(model, {"ids": ids(13)})
    assert site.call.mask is not None and site.mask == Mask(kind="causal")
    assert apart(model(ids()), new(ids())) < 1e-5
