"""What changes after the first tokens: a window of 64, a clamp at 64, frequencies that are others from 64 on.

Models of one layer whose code says so in many ways. Each must be refused, or stated as it is; to call it by what it is
for 30 tokens would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fla_swap as fs
from fla_swap.types import Mask

FAR, WIDTH, HEADS = 64, 32, 4
arange = torch.arange


def distance(length: int) -> Tensor:
    """Query position − key position, [T, T]."""
    return arange(length)[:, None] - arange(length)[None]


class Attention(nn.Module):
    """`mask(self, T)` bool [T, T], `scores(self, s, T)`, `rotate(self, q, k, T)`; `stored`: buffers."""

    def __init__(self, mask: Any = None, scores: Any = None, rotate: Any = None, stored: Any = None):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mask, self.scores, self.rotate = mask, scores, rotate
        for name, value in (stored() if stored else {}).items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotate:
            q, k = self.rotate(self, q, k, length)
        s = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        s = self.scores(self, s, length) if self.scores else s
        seen = self.mask(self, length) if self.mask else distance(length) >= 0
        p = s.masked_fill(~seen, float("-inf")).softmax(-1)
        return self.o((p @ v).transpose(1, 2).reshape(x.shape))


class FewKeys(Attention):
    """Fused attention over the first keys alone."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k[:, :, :FAR], v[:, :, :FAR])
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.embed, self.attn, self.head = nn.Embedding(100, WIDTH), attention, nn.Linear(WIDTH, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.attn(x))


def inspected(attention: nn.Module) -> fs.AttentionReport:
    torch.manual_seed(0)
    return fs.inspect(Model(attention), torch.randint(0, 100, (2, 16)), strict=False)


def causal(condition: Callable[[Any, int], Tensor]) -> Callable[[Any, int], Tensor]:
    return lambda self, length: (distance(length) >= 0) & condition(self, length)


def band() -> Tensor:
    """A window of 64 in a stored table of 256 rows."""
    table = torch.ones(256, 256, dtype=torch.bool)
    return table.tril() & ~table.tril(-FAR)


WINDOWS: dict[str, tuple[Any, Any]] = {
    "stored band": (lambda self, n: self.band[:n, :n], lambda: {"band": band()}),
    "float constant": (causal(lambda self, n: distance(n).float() < 64.0), None),
    "stored float": (causal(lambda self, n: distance(n) < self.size), lambda: {"size": torch.tensor(64.0)}),
    "stored for each head": (
        causal(lambda self, n: distance(n) < self.size[:, None, None]),
        lambda: {"size": torch.tensor([64] * HEADS)},
    ),
    "root": (causal(lambda self, n: distance(n).clamp(min=0).float().sqrt() < 8), None),
    "square": (causal(lambda self, n: distance(n) ** 2 < 4096), None),
}
CHUNKS: dict[str, Any] = {
    "shift": causal(lambda self, n: (arange(n)[:, None] >> 6) == (arange(n)[None] >> 6)),
    "whole division": causal(lambda self, n: (arange(n)[:, None] // 64) == (arange(n)[None] // 64)),
    "float division": causal(lambda self, n: (arange(n)[:, None] / 64.0).floor() == (arange(n)[None] / 64.0).floor()),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_beyond_the_first_tokens_is_a_window(name: str) -> None:
    mask, stored = WINDOWS[name]
    report = inspected(Attention(mask=mask, stored=stored))
    assert [(s.mask, s.proved) for s in report.sites] == [(Mask(kind="window", window=64), True)]


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_beyond_the_first_tokens_are_chunks(name: str) -> None:
    report = inspected(Attention(mask=CHUNKS[name]))
    assert [(s.mask, s.proved) for s in report.sites] == [(Mask(kind="chunked", window=64), True)]


def rope(
    positions: Callable[[Tensor], Tensor] = lambda p: p,
    base: Callable[[int], float] = lambda n: 1e4,
    stored: bool = False,
) -> Any:
    def turn(self: Any, q: Tensor, k: Tensor, length: int) -> tuple[Tensor, ...]:
        if stored:
            cos, sin = self.cos[:length], self.sin[:length]
        else:
            angles = positions(arange(length).float())[:, None] * base(length) ** (-arange(0, 8, 2).float() / 8)
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return tuple(x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))

    return turn


def slower(p: Tensor) -> Tensor:
    return torch.where(p < FAR, p, FAR + (p - FAR) / 8)


def tables() -> dict[str, Tensor]:
    angles = slower(arange(512).float())[:, None] * 1e4 ** (-arange(0, 8, 2).float() / 8)
    angles = torch.cat([angles, angles], -1)
    return {"cos": angles.cos(), "sin": angles.sin()}


def blocks(self: Any, length: int) -> Tensor:
    return arange(length)[:, None] // 16 - arange(length)[None] // 16 < 4


def alibi(self: Any, scores: Tensor, length: int) -> Tensor:
    return scores - torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * distance(length).clamp(max=FAR)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "blocks": (lambda: Attention(mask=causal(blocks)), "mask", "neither causal"),
    "windows that differ": (
        lambda: Attention(
            mask=causal(lambda self, n: distance(n) < self.size[:, None, None]),
            stored=lambda: {"size": torch.tensor([64, 64, 128, 64])},
        ),
        "mask",
        "differs between heads",
    ),
    "a branch on the length": (
        lambda: Attention(mask=lambda self, n: distance(n) >= 0 if n < 50 else (distance(n) >= 0) & blocks(self, n)),
        "mask",
        "neither causal",
    ),
    "scale": (
        lambda: Attention(scores=lambda self, s, n: s * max(1.0, math.log(n) / math.log(FAR))),
        "scale",
        "depends on the length",
    ),
    "ALiBi up to 64": (lambda: Attention(scores=alibi), "mask", "not ALiBi"),
    "positions up to 64": (lambda: Attention(rotate=rope(lambda p: p.clamp(max=FAR))), "q", "position × frequency"),
    "slower from 64 on": (lambda: Attention(rotate=rope(slower)), "q", "position × frequency"),
    "slower in stored tables": (
        lambda: Attention(rotate=rope(stored=True), stored=tables),
        "q",
        "position × frequency",
    ),
    "base by length": (lambda: Attention(rotate=rope(base=lambda n: 1e4 * max(n, FAR) / FAR)), "rope", "length"),
    "keys up to 64": (FewKeys, "k", "length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_site_can_state_is_refused(name: str) -> None:
    build, slot, reason = REFUSED[name]
    report = inspected(build())
    assert not report.sites
    assert [m.slot for m in report.near_misses] == [slot] and reason in report.near_misses[0].reason


def test_the_longest_compared_length_is_stated() -> None:
    assert inspected(Attention()).checked_length == 1027
    report = inspected(Attention(mask=lambda self, n: self.band[:n, :n], stored=lambda: {"band": band()}))
    assert report.checked_length == 256, "the size of its table"
    said = "masks, positions and scales were compared up to 256 tokens"
    assert said in str(report) and said in report.explain("attn")


@pytest.mark.parametrize(("mask", "found"), [(WINDOWS["float constant"][0], "window"), (causal(blocks), None)])
def test_a_rewrite_looks_beyond_the_first_tokens_too(mask: Any, found: str | None) -> None:
    torch.manual_seed(0)
    model, tokens = Model(Attention(mask=mask)).eval(), torch.randint(0, 100, (2, 16))
    length = torch.export.Dim("length", min=2, max=600)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: length},), strict=False)
    rewrite = fs.rewrite(program)
    assert [(r.facts["mask"], r.checked_length) for r in rewrite.records] == ([(found, 600)] if found else [])
    longer = torch.randint(0, 100, (2, 150))
    torch.testing.assert_close(rewrite.module()(longer), model(longer))
