"""Projections in series, lent keys, masks without a word: what a site cannot state is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from twisted import WIDTH, Attention, Block, D, H

from fla_swap.capture import capture
from fla_swap.errors import CaptureError
from fla_swap.inspection import inspect
from fla_swap.patterns.mask import MaskTable, alibi_slopes, classify
from fla_swap.patterns.mask_kinds import MaskRefused
from fla_swap.patterns.weights import Spread, WeightsRefused, read_spread
from fla_swap.types import Mask, WeightRef

# Projections in series


class Latent(nn.Module):
    """Keys and values from a latent of 6 channels, and 4 rotated ones shared by the heads; queries of rank `rank`."""

    def __init__(self, rank: int | None, latent: bool, causal: bool = True, single: bool = False):
        super().__init__()
        self.rank, self.latent, self.causal, self.single = rank, latent, causal, single
        self.q_a, self.q_norm = nn.Linear(WIDTH, rank or WIDTH), nn.RMSNorm(rank or WIDTH)
        self.q_b = nn.Linear(rank or WIDTH, H * D)
        self.k, self.v, self.o = (nn.Linear(WIDTH, H * D) for _ in range(3))
        self.kv_a, self.kv_b = nn.Linear(WIDTH, 6 + 4), nn.Linear(6, H * (4 + D))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_b(self.q_norm(self.q_a(x))) if self.rank else self.q_b(x)
        q = q.unflatten(-1, (H, D)).transpose(1, 2)
        if self.latent:
            latent, turned = self.kv_a(x).split((6, 4), -1)
            heads = self.kv_b(latent[:, None])[:, 0] if self.single else self.kv_b(latent)
            k, v = heads.unflatten(-1, (H, 4 + D)).transpose(1, 2).split((4, D), -1)
            k = torch.cat((k, turned[:, None].expand(-1, H, -1, -1)), -1)
        else:
            k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rank", "latent", "reason"),
    [
        (5, True, "latent attention: q of rank 5, keys and values of rank 6, 4 rotary channels shared by all heads"),
        (None, True, "latent attention: q of full rank, keys and values of rank 6, 4 rotary channels"),
        (5, False, "low-rank queries: q goes through 5 channels"),
    ],
)
def test_projections_in_series_are_named(rank: int | None, latent: bool, reason: str, causal: bool) -> None:
    """A latent is no memory, and these are no cross-attentions, whatever the mask."""
    found = inspect(Block(Latent(rank, latent, causal)), torch.randn(1, 7, WIDTH), strict=False)
    assert not found.sites
    (near,) = found.near_misses
    assert near.slot == "projection" and reason in near.reason, near.reason


def test_a_latent_with_a_dimension_for_its_one_head_is_no_split_into_heads() -> None:
    found = inspect(Block(Latent(5, True, single=True)), torch.randn(2, 7, WIDTH), strict=False)
    (near,) = found.near_misses
    assert near.slot == "projection" and "q of rank 5, keys and values of rank 6" in near.reason, near.reason


def test_without_them_it_is_a_site() -> None:
    assert inspect(Block(Latent(None, False)), torch.randn(1, 7, WIDTH)).sites[0].proved


# Which stored entries stand in a closed tensor


class Tables(nn.Module):
    def __init__(self, body: Callable[[Any], Tensor]):
        super().__init__()
        self.body = body
        self.a, self.b, self.grid = (
            nn.Parameter(torch.ones(3)),
            nn.Parameter(torch.ones(2)),
            nn.Parameter(torch.ones(2, 3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() + self.body(self)


def spread(body: Callable[[Any], Tensor]) -> Spread | None:
    graph = capture(Tables(body), ((torch.randn(2, 13),), {}), length=13)
    total = next(n for n in graph.nodes if n.op == "output").args[0][0]  # type: ignore[index]
    closed = next(n for n in total.all_input_nodes if not graph.is_open(n))  # type: ignore[union-attr]
    return read_spread(closed, graph)


def test_entries_of_one_and_of_several_parameters() -> None:
    one = spread(lambda m: 1 + m.a.flip(0)[None].expand(4, 3))
    assert one is not None and one.offset == 1.0 and one.entries.tolist() == [[2, 1, 0]] * 4
    assert one.ref(torch.tensor([0, 1, 2])) == WeightRef(name="a")
    assert one.ref(torch.tensor([1, 2, 0])) == WeightRef(name="a", rows=((1, 3), (0, 1)))
    two = spread(lambda m: torch.cat([m.b, m.a]))
    assert two is not None and two.names == ("a", "b") and two.entries.tolist() == [3, 4, 0, 1, 2]
    assert two.ref(two.entries) == WeightRef(name="b", more=(WeightRef(name="a"),))
    grid = spread(lambda m: m.grid[1:])
    assert grid is not None and grid.ref(grid.entries.flatten()) == WeightRef(name="grid", rows=((1, 2),))
    with pytest.raises(WeightsRefused, match="in another order"):
        grid.ref(torch.tensor([2, 1, 0]))


@pytest.mark.parametrize(
    "body", [lambda m: m.a.exp(), lambda m: 2 * m.a, lambda m: m.a + m.grid[0], lambda m: m.a.sum()]
)
def test_computed_values_are_no_entries(body: Any) -> None:
    assert spread(body) is None


class Lent(nn.Module):
    """Two attentions, of which the second takes its keys and values from the first one's projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(lambda m, q, k, v, x: (q, k, v)), Borrower()

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.first.k(x), self.first.v(x)
        return x + self.second(F.silu(x), k, v)


class Borrower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (self.q(x), k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_keys_and_values_of_another_layer_are_named() -> None:
    (near,) = inspect(Lent(), torch.randn(1, 7, WIDTH), strict=False).near_misses
    assert near.slot == "owner" and "keys and values come from 'first.k', outside 'second'" in near.reason


class Memories(nn.Module):
    """Keys of one memory, values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(keys), self.v(values)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TwoMemories(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Memories()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, x.sin(), x.cos())


def test_keys_and_values_of_two_memories_are_named_with_their_lines() -> None:
    (near,) = inspect(TwoMemories(), torch.randn(1, 7, WIDTH), strict=False).near_misses
    assert near.slot == "owner" and "a site has one memory" in near.reason
    for op in ("keys are made of what sin.default", "values of what cos.default"):
        assert f"{op} (" in near.reason and "test_named_refusals.py:" in near.reason


class Drafter(nn.Module):
    """Its keys and values are inputs of the model: another model's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))


def test_keys_that_are_an_input_of_the_model_are_named() -> None:
    given = {"x": torch.randn(2, 7, WIDTH), **{name: torch.randn(2, H, 7, D) for name in ("keys", "values")}}
    (near,) = inspect(Drafter(), given, strict=False).near_misses
    assert near.slot == "k" and near.reason.startswith("the model is given them (its input 'keys')")


class LongOnly(nn.Module):
    """From 200 tokens on a second attention, over every second key."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        if x.shape[1] > 200:
            mixed = mixed + F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])
        return self.o(mixed.transpose(1, 2).flatten(2))


def test_attention_that_runs_at_one_length_only_is_named() -> None:
    reason = r"different attention code at \d+ and \d+ tokens \(at \d+ tokens alone attention scaled_dot_product"
    with pytest.raises(CaptureError, match=reason + r".*test_named_refusals.py:\d+\): what a site states must hold"):
        inspect(Block(LongOnly()), torch.randn(1, 7, WIDTH))


# Masks that are known, but that a site has no word for


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (lambda i, j: (j <= i) | ((i < 4) & (j < 4)), "prefix-LM mask .the first 4 tokens"),
        (lambda i, j: i // 4 == j // 4, "bidirectional blocks of 4 tokens"),
        (lambda i, j: (j <= i) & ((i - j) % 3 != 1), "neither causal"),
    ],
)
def test_masks_without_a_word_are_named(seen: Any, reason: str) -> None:
    tables = [MaskTable(seen=seen(torch.arange(n)[:, None], torch.arange(n)[None]), bias=None) for n in (13, 29)]
    with pytest.raises(MaskRefused, match=reason):
        classify(tables)


def test_a_window_to_either_side_is_local() -> None:
    steps = [torch.arange(n) for n in (13, 29)]
    tables = [MaskTable(seen=(i[:, None] - i).abs() <= 3, bias=None) for i in steps]
    assert classify(tables) == Mask(kind="local", window=4)


def test_a_bias_by_relative_position_is_named() -> None:
    steps = torch.arange(13)
    distance = (steps[:, None] - steps[None]).clamp(0, 5)
    seen = steps[None] <= steps[:, None]
    learned = torch.randn(2, 6)[:, distance].masked_fill(~seen, 0.0)
    with pytest.raises(MaskRefused, match="by relative position"):
        alibi_slopes([MaskTable(seen=seen, bias=learned)], 2)
    learned[0, 5, 2] += 1
    with pytest.raises(MaskRefused, match=r"that is not ALiBi$"):
        alibi_slopes([MaskTable(seen=seen, bias=learned)], 2)
