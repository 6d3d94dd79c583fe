"""What stands after the core: gates, norms, residuals, modules without an output projection; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.inspection import inspect
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, Gate, Norm, Projection, WeightRef

D, H, V = 16, 2, 8


class Attention(nn.Module):
    """Causal attention of two heads; `after(self, heads [B, T, H, V], x)` makes its output."""

    def __init__(self, after: Callable[[Any, Tensor, Tensor], Any]):
        super().__init__()
        self.after = after
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.head_gate, self.wide = nn.Linear(D, D), nn.Linear(D, H), nn.Linear(D, 3 * D)
        self.scale = nn.Parameter(torch.ones(D))

    def heads(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (H, V)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.after(self, self.heads(x), x, *more)


class Block(nn.Module):
    def __init__(self, after: Callable[..., Any]):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention(after)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


def found(module: nn.Module) -> AttentionSite:
    report = report_of(module)
    assert not report.near_misses, report.near_misses[0].reason
    (site,) = report.sites
    assert site.proved
    return site


def report_of(module: nn.Module) -> AttentionReport:
    torch.manual_seed(0)
    return inspect(module, torch.randn(1, 7, D), strict=False)


def gate_of(name: str, rows: tuple | None = None) -> Projection:
    refs = (WeightRef(name=f"attention.{name}.{kind}", rows=rows) for kind in ("weight", "bias"))
    return Projection(weight=next(refs), bias=next(refs))


GATES: dict[str, tuple[Callable[..., Tensor], Gate]] = {
    "channels, before the heads are joined": (
        lambda m, h, x: m.o((h * m.gate(x).sigmoid().unflatten(-1, (H, V))).flatten(2)),
        Gate(projection=gate_of("gate")),
    ),
    "channels, after it": (
        lambda m, h, x: m.o(F.silu(m.gate(x)) * h.flatten(2)),
        Gate(projection=gate_of("gate"), activation="silu"),
    ),
    "heads": (
        lambda m, h, x: m.o((h * F.softplus(m.head_gate(x).float()).to(h.dtype)[..., None]).flatten(2)),
        Gate(projection=gate_of("head_gate"), activation="softplus", per_head=True),
    ),
    "a part of a wider projection, head by head": (
        lambda m, h, x: m.o(h.flatten(2) * m.wide(x).unflatten(-1, (H, 3 * V))[..., V : 2 * V].flatten(2).tanh()),
        Gate(projection=gate_of("wide", ((V, 2 * V), (4 * V, 5 * V))), activation="tanh"),
    ),
    "the same for every head": (
        lambda m, h, x: m.o((h * m.gate(x)[..., None, :V].sigmoid()).flatten(2)),
        Gate(projection=gate_of("gate", ((0, V), (0, V)))),
    ),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_on_the_heads_are_stated(case: str) -> None:
    after, gate = GATES[case]
    assert found(Block(after)).gate == gate


def rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


W = WeightRef(name="attention.scale")
NORMS: dict[str, tuple[Callable[..., Tensor], Norm]] = {
    "all heads together": (
        lambda m, h, x: m.o(rms(h.flatten(2), m.scale)),
        Norm(kind="rms", eps=1e-6, weight=W, across_heads=True),
    ),
    "each head": (
        lambda m, h, x: m.o(rms(h, m.scale[:V]).flatten(2)),
        Norm(kind="rms", eps=1e-6, weight=WeightRef(name="attention.scale", rows=((0, V),))),
    ),
    "each head with weights of its own": (
        lambda m, h, x: m.o(rms(h, m.scale.view(H, V)).flatten(2)),
        Norm(kind="rms", eps=1e-6, weight=W, per_head=True),
    ),
    "fused": (
        lambda m, h, x: m.o(F.layer_norm(h.flatten(2), (D,), m.scale, None, 1e-5)),
        Norm(kind="layer", eps=1e-5, weight=W, across_heads=True),
    ),
    "without weights": (lambda m, h, x: m.o(F.rms_norm(h, (V,), eps=1e-5).flatten(2)), Norm(kind="rms", eps=1e-5)),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms_of_the_heads_outputs_are_stated(case: str) -> None:
    after, norm = NORMS[case]
    assert found(Block(after)).o_norm == norm


def test_a_norm_and_then_a_gate() -> None:
    site = found(Block(lambda m, h, x: m.o(rms(h.flatten(2), m.scale) * m.gate(x).sigmoid())))
    assert site.o_norm is not None and site.o_norm.across_heads and site.gate == Gate(projection=gate_of("gate"))


def test_a_module_that_returns_the_heads_has_no_output_projection() -> None:
    site = found(Block(lambda m, h, x: h.flatten(2)))
    assert (site.fqn, site.o, site.call.outputs) == ("attention", None, None)
    gated = found(Block(lambda m, h, x: (h.flatten(2) * m.gate(x).sigmoid(), None)))
    assert gated.o is None and gated.gate == Gate(projection=gate_of("gate")) and gated.call.outputs == 2


class PostNorm(nn.Module):
    """As in BERT: the output projection, the residual and a norm stand in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(lambda m, h, x: (h.flatten(2), None))
        self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dense(self.attention(x)[0]))


def test_the_owner_is_the_inner_module_where_the_outer_one_does_more() -> None:
    site = found(PostNorm())
    assert (site.fqn, site.o, site.call.outputs, site.call.output_index) == ("attention", None, 2, 0)


def test_a_residual_inside_the_owner_is_part_of_the_contract() -> None:
    site = found(Block(lambda m, h, x: x + F.dropout(m.o(h.flatten(2)), 0.5, m.training)))
    assert site.call.residual == site.call.hidden == ArgPath(position=0)


class Passed(nn.Module):
    """As in Bloom: the owner is given what it adds, before or after the hidden state."""

    def __init__(self, *, first: bool):
        super().__init__()
        self.first, self.norm = first, nn.LayerNorm(D)
        self.attention = Attention(lambda m, h, x: None)
        self.attention.forward = self.attend  # type: ignore[method-assign]

    def attend(self, one: Tensor, other: Tensor) -> Tensor:
        residual, x = (one, other) if self.first else (other, one)
        return residual + self.attention.o(self.attention.heads(x).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.norm(x)) if self.first else self.attention(self.norm(x), x)


@pytest.mark.parametrize("first", [False, True])
def test_hidden_state_and_residual_are_told_apart_by_the_proof(first: bool) -> None:
    call = found(Passed(first=first)).call
    assert (call.hidden, call.residual) == (ArgPath(position=int(first)), ArgPath(position=int(not first)))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "learned scale": (lambda m, h, x: m.o(h.flatten(2) * m.scale), "stored or constant factor"),
    "no activation": (lambda m, h, x: m.o(h.flatten(2) * m.gate(x)), "multiplied by linear.*'sigmoid'.* as a gate"),
    "other activation": (lambda m, h, x: m.o(h.flatten(2) * m.gate(x).exp()), "multiplied by exp"),
    "two layers": (
        lambda m, h, x: m.o(h.flatten(2) * m.gate(F.relu(m.q(x))).sigmoid()),
        "relu.* between the hidden states and the gate",
    ),
    "another token's gate": (
        lambda m, h, x: m.o(h.flatten(2) * m.gate(x.roll(1, 1)).sigmoid()),
        "gated by another token",
    ),
    "two gates": (
        lambda m, h, x: m.o(h.flatten(2) * m.gate(x).sigmoid() * m.gate(x).tanh()),
        "a gate on the heads' outputs after gate",
    ),
    "norm after a gate": (
        lambda m, h, x: m.o(rms(h.flatten(2) * m.gate(x).sigmoid(), m.scale)),
        "a norm on the heads' outputs after gate",
    ),
    "norm of half a head": (
        lambda m, h, x: m.o(F.rms_norm(h.unflatten(-1, (2, 4)), (4,)).flatten(2)),
        "norm of the heads' outputs acts on 4 channels, a head has 8",
    ),
}
MORE: dict[str, Any] = {
    "residual with a factor": lambda m, h, x: torch.add(x, m.o(h.flatten(2)), alpha=2),
    "another residual": lambda m, h, x: x.flip(-1) + m.o(h.flatten(2)),
    "activation after it": lambda m, h, x: m.o(h.flatten(2)).relu(),
}


@pytest.mark.parametrize("case", MORE)
def test_an_owner_that_does_more_than_attention_holds_a_site_of_the_graph(case: str) -> None:
    (site,) = report_of(Block(MORE[case])).sites
    assert site.place == "graph" and site.fqn.endswith("#0") and site.proved


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_site_cannot_state_is_refused_with_the_reason(case: str) -> None:
    after, reason = REFUSED[case]
    report = report_of(Block(after))
    assert not report.sites
    assert re.search(reason, report.near_misses[0].reason), report.near_misses[0].reason
    assert "test_outputs.py:" in report.near_misses[0].source


class Differential(nn.Module):
    """Two softmaxes over the same values, one subtracted from the other (2410.05258)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.o = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for p in (self.first, self.second):
            q, k, v = (y.unflatten(-1, (H, V)).transpose(1, 2) for y in p(x).chunk(3, -1))
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.o((outs[0] - 0.5 * outs[1]).transpose(1, 2).flatten(2))


def test_differential_attention_is_named() -> None:
    report = report_of(Differential())
    assert not report.sites
    reasons = [m.reason for m in report.near_misses]
    assert any("2 attention cores, as differential attention does" in r for r in reasons), reasons


class Probabilities(nn.Module):
    """Written-out softmax attention with a twist on the probabilities or the values."""

    def __init__(self, twist: str):
        super().__init__()
        self.twist = twist
        self.qkv, self.extra, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.ones(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, extra = (y.unflatten(-1, (H, V)).transpose(1, 2) for y in (*self.qkv(x).chunk(3, -1), self.extra(x)))
        if self.twist == "values":
            v = 0.5 * v + 0.5 * extra
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2) * V**-0.5).masked_fill(later, float("-inf")).softmax(-1)
        if self.twist == "learned scale":
            weights = weights * self.scale
        if self.twist == "gated":
            weights = weights * extra.mean(-1, keepdim=True).sigmoid()
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("twist", "slot", "reason"),
    [
        ("values", "v", "add.* mixes 2 tensors .* a site has one projection"),
        ("learned scale", "scores", "mul.* scales the probabilities, which a site cannot state"),
        ("gated", "scores", "mul.* scales the probabilities, which a site cannot state"),
    ],
)
def test_changed_probabilities_and_mixed_values_are_named(twist: str, slot: str, reason: str) -> None:
    report = report_of(Probabilities(twist))
    (miss,) = report.near_misses
    assert not report.sites and miss.slot == slot
    assert re.search(reason, miss.reason), miss.reason


# What is stated, or named, where it stands


class Named(nn.Module):
    """Attention of 4 heads with one thing that is its own."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.sinks = nn.Parameter(torch.randn(4))
        self.convolution = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.kind == "a factor on the values":
            v = v * 0.7
        if self.kind == "keys convolved":
            k = self.convolution(self.k(x).mT).mT.unflatten(-1, (4, 8)).transpose(1, 2)
        if self.kind == "tokens parted":
            q = torch.cat((q[:, :, :1], q[:, :, 1:] * 2.0), 2)
        scores = q @ k.mT * 8**-0.5 + torch.full((x.shape[1],) * 2, float("-inf")).triu(1)
        mixed = scores.softmax(-1) @ v
        if self.kind == "sinks as a gate":
            mixed = mixed * torch.sigmoid(scores.logsumexp(-1) - self.sinks[:, None])[..., None]
        if self.kind == "sinks that are scaled":
            mixed = mixed * torch.sigmoid(scores.logsumexp(-1) - 2 * self.sinks[:, None])[..., None]
        if self.kind == "heads subtracted":
            first, second = mixed.chunk(2, 1)
            mixed = torch.cat((first - 0.3 * second, first), 1)
        if self.kind == "less along the values":
            unit = v / v.norm(dim=-1, keepdim=True)
            mixed = mixed - (mixed * unit).sum(-1, keepdim=True) * unit
        return self.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["a factor on the values", "sinks as a gate"])
def test_it_is_stated_and_proved(kind: str) -> None:
    (site,) = inspect(nn.Sequential(nn.Linear(32, 32), Named(kind)), torch.randn(1, 7, 32)).sites
    assert site.proved and site.mask.kind == "causal" and site.gate is None
    assert site.v_scale == pytest.approx(0.7 if "factor" in kind else 1.0)
    assert (site.sinks is not None and site.sinks.name.endswith("sinks")) == ("sinks" in kind)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sinks that are scaled", "a gate on the heads' outputs that is not one projection"),
        ("heads subtracted", "combines parts of the attention's output, as differential attention does"),
        ("less along the values", "combines the attention's output with what is computed from it"),
        ("keys convolved", "a convolution over 3 tokens stands before the core"),
        ("tokens parted", "tokens are parted, pass through different steps and are joined again"),
    ],
)
def test_it_is_named(kind: str, reason: str) -> None:
    found = inspect(nn.Sequential(nn.Linear(32, 32), Named(kind)), torch.randn(1, 7, 32), strict=False)
    assert not found.sites and reason in found.near_misses[0].reason, found.near_misses[0].reason
