"""A graph compiled layer by layer computes what it computed, and compiles equal layers once."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from fla_swap.regions import Pieces, compile_regions


class Block(nn.Module):
    seen: torch.Tensor

    def __init__(self, width: int, kept: bool):
        super().__init__()
        self.up, self.kept = nn.Linear(width, width), kept
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x):
        if self.kept:
            self.seen.add_(x.sum((0, 1)))
        return x + self.up(x).tanh() * x.shape[1]


class Stack(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.layers = nn.ModuleList([Block(8, kept) for kept in kinds])
        self.head = nn.Linear(8, 3)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def forward(self, x):
        hidden = x.double().float()
        for layer in self.layers:
            hidden = layer(hidden)
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def run(kinds, *, lengths=(4,)):
    """The stack as it is and through regions on inputs of some lengths, and what was compiled."""
    torch.manual_seed(0)
    plain, made = Stack(kinds), []

    def backend(module, inputs):
        made.append(compile_regions(module, lambda piece, values: piece.forward))
        return made[-1]

    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    for length in lengths:
        x = torch.randn(2, length, 8)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        expected, states = plain(x), [layer.seen.clone() for layer in plain.blocks]
        for layer in plain.blocks:
            layer.seen.zero_()
        found = compiled(x)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(torch.equal(layer.seen, state) for layer, state in zip(plain.blocks, states, strict=True))
        for layer in plain.blocks:
            layer.seen.zero_()
    return made


def test_equal_layers_are_compiled_once_and_update_their_own_state():
    (pieces,) = run([True] * 5)
    assert isinstance(pieces, Pieces)
    assert (len(pieces.steps), len(pieces.compiled)) == (7, 3)  # before the layers, a layer, after them


def test_layers_of_two_kinds_are_compiled_twice():
    (pieces,) = run([True, False, True, False])
    assert (len(pieces.steps), len(pieces.compiled)) == (6, 4)


def test_sizes_that_vary_are_computed_in_every_piece():
    (pieces,) = run([True] * 3, lengths=(4, 7, 5))
    assert len(pieces.compiled) == 3


def test_inductor_compiles_the_pieces():
    torch.manual_seed(0)
    from fla_swap.compilation import by_layer

    model = Stack([False] * 3)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=by_layer)(torch.ones(1, 4, 8))
        torch.testing.assert_close(found["logits"], model(torch.ones(1, 4, 8))["logits"])
