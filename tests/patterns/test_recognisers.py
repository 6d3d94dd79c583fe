"""Each recogniser on a few lines of model code: what it finds, and the near miss beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.capture import capture
from fla_swap.patterns.base import Absent, Found, Refused
from fla_swap.patterns.graph import CapturedGraph, source_of
from fla_swap.patterns.norm import QKNorm, state_norm
from fla_swap.patterns.path import Factor
from fla_swap.patterns.projection import Project
from fla_swap.patterns.rope import Rotary
from fla_swap.patterns.scores import Floor, Mask, Scale, Softcap
from fla_swap.patterns.sinks import Shift, Sinks
from fla_swap.types import Rope, WeightRef

LENGTH = 13


class Code(nn.Module):
    """Runs `body(self, x)`; has a square weight, a vector, and a fused weight."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.body = body
        self.w = nn.Parameter(torch.randn(8, 8))
        self.fused = nn.Parameter(torch.randn(24, 8))
        self.b, self.g = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.sink = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def graph_of(body: Callable[[Any, Tensor], Tensor], *shape: int) -> CapturedGraph:
    return capture(Code(body), ((torch.randn(2, *shape),), {}), length=LENGTH)


def last(graph: CapturedGraph) -> Any:
    """The node that the code returns."""
    return next(n for n in graph.nodes if n.op == "output").args[0][0]


def result(recogniser: Any, body: Callable[[Any, Tensor], Tensor], *shape: int) -> Any:
    graph = graph_of(body, *shape)
    return recogniser.match(last(graph), graph)


def facts(recogniser: Any, body: Callable[[Any, Tensor], Tensor], *shape: int) -> Any:
    found = result(recogniser, body, *shape)
    assert isinstance(found, Found), found
    return found.facts


def scores(recogniser: Any, body: Callable[[Any, Tensor], Tensor]) -> Any:
    return result(recogniser, body, 2, LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        (lambda m, x: x * 0.25, 0.25),
        (lambda m, x: 0.25 * x, 0.25),
        (lambda m, x: x / 4, 0.25),
        (lambda m, x: x / torch.full([], 4.0).sqrt(), 0.5),
    ],
)
def test_scale(body: Any, factor: float) -> None:
    for recogniser in (Scale(), Factor()):
        found = scores(recogniser, body)
        assert isinstance(found, Found) and found.facts["scale"] == pytest.approx(factor)


def test_scale_near_misses() -> None:
    assert isinstance(scores(Scale(), lambda m, x: x * x), Absent)
    assert isinstance(scores(Scale(), lambda m, x: x * torch.arange(LENGTH)), Absent)
    assert isinstance(scores(Scale(), lambda m, x: torch.div(x, 2, rounding_mode="floor")), Absent)


def test_softcap() -> None:
    found = scores(Softcap(), lambda m, x: 30 * torch.tanh(x * 0.5 / 30))
    assert isinstance(found, Found) and found.facts["softcap"] == 30
    assert found.facts["scale"] == pytest.approx(1.0)
    assert isinstance(scores(Softcap(), lambda m, x: torch.tanh(x)), Refused)
    assert isinstance(scores(Softcap(), lambda m, x: 30 * torch.sigmoid(x / 30)), Absent)


def test_mask_terms() -> None:
    steps = torch.arange(LENGTH)
    later = steps[None, :] > steps[:, None]
    low = -1e9
    kinds = {
        "add": lambda m, x: x + later * low,
        "drop": lambda m, x: x.masked_fill(later, low),
        "keep": lambda m, x: torch.where(~later, x, low),
    }
    for kind, body in kinds.items():
        found = scores(Mask(), body)
        assert isinstance(found, Found) and [t.kind for t in found.facts["mask"]] == [kind]


def test_mask_near_misses() -> None:
    later = torch.arange(LENGTH)[None, :] > torch.arange(LENGTH)[:, None]
    open_mask = scores(Mask(), lambda m, x: x.masked_fill(x > 3, -1e9))
    assert isinstance(open_mask, Refused) and "depends on the values" in open_mask.reason
    visible = scores(Mask(), lambda m, x: x.masked_fill(later, 0.0))
    assert isinstance(visible, Refused) and "does not hide" in visible.reason
    assert isinstance(scores(Mask(), lambda m, x: x + x.sin()), Refused)


def test_floor_and_shift() -> None:
    lowest = torch.finfo(torch.float32).min
    assert isinstance(scores(Floor(), lambda m, x: torch.max(x, torch.full([], lowest))), Found)
    assert isinstance(scores(Floor(), lambda m, x: torch.max(x, torch.full([], 0.0))), Refused)
    assert isinstance(scores(Shift(), lambda m, x: x - x.max(-1, keepdim=True).values), Found)
    assert isinstance(scores(Shift(), lambda m, x: x - x.max(-2, keepdim=True).values), Refused)
    assert isinstance(scores(Shift(), lambda m, x: x - x.mean(-1, keepdim=True)), Absent)


def test_sinks() -> None:
    def joined(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, m.sink.reshape(1, -1, 1, 1).expand(2, -1, LENGTH, 1)], -1)

    found = scores(Sinks(), joined)
    assert isinstance(found, Found) and found.facts["sinks"] == WeightRef(name="sink")
    other = scores(Sinks(), lambda m, x: torch.cat([x, (2 * m.sink).reshape(1, -1, 1, 1).expand(2, -1, LENGTH, 1)], -1))
    assert isinstance(other, Refused) and "not one stored logit" in other.reason
    assert isinstance(scores(Sinks(), lambda m, x: torch.cat([x, x[..., :1]], -1)), Refused)


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("body", "kind", "offset", "bias"),
    [
        (lambda m, x: m.g * rms(x.float(), 1e-4).to(x.dtype), "rms", 0.0, None),
        (lambda m, x: rms(x, 1e-4) * (1.0 + m.g.float()), "rms", 1.0, None),
        (lambda m, x: F.rms_norm(x, (8,), m.g, 1e-4), "rms", 0.0, None),
        (lambda m, x: m.g * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt()), "rms", 0.0, None),
        (lambda m, x: F.layer_norm(x, (8,), m.g, m.b, 1e-4), "layer", 0.0, "b"),
        (lambda m, x: m.g * rms(x - x.mean(-1, keepdim=True), 1e-4) + m.b, "layer", 0.0, "b"),
    ],
)
def test_norm(body: Any, kind: str, offset: float, bias: str | None) -> None:
    found = facts(QKNorm(), body, LENGTH, 2, 8)["norm"]
    rows = torch.arange(16).reshape(2, 8)
    norm = state_norm(found, rows.expand(2, LENGTH, 2, 8), rows)
    assert (norm.kind, norm.offset, found.size, norm.per_head, norm.across_heads) == (kind, offset, 8, False, False)
    assert norm.eps == pytest.approx(1e-4) and norm.weight == WeightRef(name="g")
    assert norm.bias == (None if bias is None else WeightRef(name=bias))


def test_norm_near_misses() -> None:
    assert isinstance(result(QKNorm(), lambda m, x: m.g * x, LENGTH, 2, 8), Absent)
    assert isinstance(result(QKNorm(), lambda m, x: rms(x, 1e-4) * x, LENGTH, 2, 8), Absent)
    over_heads = result(QKNorm(), lambda m, x: F.layer_norm(x, (2, 8)), LENGTH, 2, 8)
    assert isinstance(over_heads, Refused) and "several dimensions" in over_heads.reason
    computed = result(QKNorm(), lambda m, x: F.rms_norm(x, (8,), m.g.exp(), 1e-4), LENGTH, 2, 8)
    assert isinstance(computed, Refused) and "weight is computed" in computed.reason


def angles() -> Tensor:
    return torch.arange(LENGTH)[:, None, None] * 10.0 ** -torch.arange(4)


def complex_rope(m: Any, x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(LENGTH, 1, 4), angles())
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2)) * turns).flatten(3)


def stacked_rope(m: Any, x: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    c, s = angles().cos(), angles().sin()
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)


def chunked_rope(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = angles().cos(), angles().sin()
    return torch.cat((a * c - b * s, b * c + a * s), -1)


@pytest.mark.parametrize(
    ("body", "style"), [(complex_rope, "interleaved"), (stacked_rope, "interleaved"), (chunked_rope, "half")]
)
def test_rope_in_any_spelling(body: Any, style: str) -> None:
    rope = facts(Rotary(), body, LENGTH, 2, 8)["rope"]
    assert isinstance(rope, Rope) and rope.style == style
    assert rope.inv_freq == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-4)


def test_rope_near_misses() -> None:
    assert isinstance(result(Rotary(), lambda m, x: x * 2, LENGTH, 2, 8), Absent)
    scaled = result(Rotary(), lambda m, x: x * (1 + torch.arange(LENGTH))[:, None, None], LENGTH, 2, 8)
    assert isinstance(scaled, Refused) and "scaled by an amount" in scaled.reason


@pytest.mark.parametrize(
    ("body", "weight", "bias"),
    [
        (lambda m, x: F.linear(x, m.w, m.b), WeightRef(name="w"), WeightRef(name="b")),
        (lambda m, x: x @ m.w, WeightRef(name="w", transposed=True), None),
        (lambda m, x: x @ m.w.t() + m.b, WeightRef(name="w"), WeightRef(name="b")),
        (lambda m, x: torch.addmm(m.b, x[0], m.w), WeightRef(name="w", transposed=True), WeightRef(name="b")),
        (lambda m, x: F.linear(x, m.fused[8:16]), WeightRef(name="fused", rows=((8, 16),)), None),
    ],
)
def test_projection(body: Any, weight: WeightRef, bias: WeightRef | None) -> None:
    linear = facts(Project(), body, LENGTH, 8)["projection"]
    found = linear.projection(torch.arange(linear.outputs))
    assert (found.weight, found.bias) == (weight, bias) and (linear.inputs, linear.outputs) == (8, 8)


def test_projection_near_misses() -> None:
    doubled = result(Project(), lambda m, x: F.linear(x, 2 * m.w), LENGTH, 8)
    assert isinstance(doubled, Refused) and "not (rows of) one stored parameter" in doubled.reason
    assert isinstance(result(Project(), lambda m, x: F.linear(x, x[0, :8]), LENGTH, 8), Refused)
    assert isinstance(result(Project(), lambda m, x: x + m.b, LENGTH, 8), Absent)


def test_nodes_know_their_source_line() -> None:
    graph = graph_of(lambda m, x: x.sin(), 8)
    assert "test_recognisers.py:" in source_of(last(graph))
