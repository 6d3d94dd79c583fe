"""What stands between projections and the core: norms, clamps, temperatures, adapters. Each proved, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor
from torch.nn import functional as F
from twisted import Attention, D, H, miss, report, site

from fla_swap.inspection import inspect
from fla_swap.types import LowRank, Norm, Temperature, WeightRef


def rms(x: Tensor, eps: float = 1e-3) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred(x: Tensor) -> Tensor:
    """A layer norm that computes x − mean twice."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-3)


def head_by_head(m: Any, x: Tensor) -> Tensor:
    return torch.cat([norm(part) for norm, part in zip(m.norms, x.split(1, 2), strict=True)], 2)


SHARED, TABLE = WeightRef(name="attention.shared"), WeightRef(name="attention.table")
EACH = tuple(WeightRef(name=f"attention.norms.{i}.weight") for i in range(H))
EACH_BIAS = tuple(WeightRef(name=f"attention.norms.{i}.bias") for i in range(H))

NORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Norm, float]] = {
    "rms": (lambda m, x: rms(x) * m.shared, Norm(kind="rms", eps=1e-3, weight=SHARED), 1.0),
    "one plus": (lambda m, x: rms(x) * (1 + m.shared), Norm(kind="rms", eps=1e-3, weight=SHARED, offset=1.0), 1.0),
    "for each head": (lambda m, x: rms(x) * m.table, Norm(kind="rms", eps=1e-3, weight=TABLE, per_head=True), 1.0),
    "vector by heads": (
        lambda m, x: rms(x) * m.wide.view(H, D),
        Norm(kind="rms", eps=1e-3, weight=WeightRef(name="attention.wide"), per_head=True),
        1.0,
    ),
    "layer for each head": (
        lambda m, x: centred(x) * m.table,
        Norm(kind="layer", eps=1e-3, weight=TABLE, per_head=True),
        1.0,
    ),
    "list of norms": (
        head_by_head,
        Norm(
            kind="layer",
            eps=1e-5,
            weight=WeightRef(name=EACH[0].name, more=EACH[1:]),
            bias=WeightRef(name=EACH_BIAS[0].name, more=EACH_BIAS[1:]),
            per_head=True,
        ),
        1.0,
    ),
    "number for each head": (
        lambda m, x: rms(x) * m.number[:, None],
        Norm(
            kind="rms",
            eps=1e-3,
            weight=WeightRef(name="attention.number", rows=((0, 1),) * 7 + ((0, 2),) + ((1, 2),) * 7),
            per_head=True,
        ),
        1.0,
    ),
    "across heads": (
        lambda m, x: (rms(x.flatten(2)) * m.wide).unflatten(-1, (H, D)),
        Norm(kind="rms", eps=1e-3, weight=WeightRef(name="attention.wide"), across_heads=True),
        1.0,
    ),
    "normalize": (lambda m, x: F.normalize(x, dim=-1), Norm(kind="l2", eps=1e-12), 1.0),
    "normalize, scaled": (
        lambda m, x: F.normalize(x, dim=-1) * D**0.5 * m.shared,
        Norm(kind="l2", eps=1e-12, weight=SHARED),
        D**0.5,
    ),
    "sum of squares": (
        lambda m, x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 8e-3),
        Norm(kind="rms", eps=1e-3),
        D**-0.5,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_stated_and_proved(name: str) -> None:
    norm, stated, scale = NORMS[name]
    found = site(lambda m, q, k, v, x: (norm(m, q), k, v))
    assert found.q_norm is not None and found.q_norm.eps == pytest.approx(stated.eps)
    assert found.q_norm == Norm(**{**vars_of(stated), "eps": found.q_norm.eps})
    assert found.k_norm is None and found.v_norm is None and found.scale == pytest.approx(scale)


def vars_of(norm: Norm) -> dict[str, Any]:
    return {name: getattr(norm, name) for name in norm.__dataclass_fields__}


def test_keys_and_values_are_normed_too() -> None:
    found = site(lambda m, q, k, v, x: (q, rms(k) * m.table, rms(v)))
    assert found.k_norm is not None and found.k_norm.per_head and found.q_norm is None
    assert found.v_norm == Norm(kind="rms", eps=pytest.approx(1e-3))


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda m, x: rms(x) * m.shared.exp(), "weight is computed"),
        (lambda m, x: rms(x.unflatten(-1, (2, 4))).flatten(-2), "acts on 4 channels, a head has 8"),
        (lambda m, x: rms(x.mT).mT, "mul.* of 2 tensors|not understood|acts on"),
        (lambda m, x: torch.cat([m.norms[1](x[:, :, 1:]), m.norms[0](x[:, :, :1])], 2), "in another order"),
        (lambda m, x: x / (x.norm(dim=-1, keepdim=True) + 1e-3), "div.* is not understood"),
        (lambda m, x: F.normalize(x, dim=1), "another dimension than the last"),
        (lambda m, x: F.normalize(x, dim=-1, p=1), "another order than 2"),
    ],
)
def test_norms_that_are_none_of_these(norm: Any, reason: str) -> None:
    found = report(lambda m, q, k, v, x: (norm(m, q), k, v))
    assert not found.sites
    assert re.search(reason, found.near_misses[0].reason), found.near_misses[0].reason


def test_a_factor_before_a_norm_is_refused() -> None:
    assert "a factor before the norm" in miss(lambda m, q, k, v, x: (rms(3 * q), k, v)).reason


# Clamps


def test_a_clamp_of_all_three() -> None:
    assert (
        site(lambda m, q, k, v, x: (q.clamp(-0.3, 0.3), k.clamp_(min=-0.3, max=0.3), F.hardtanh(v, -0.3, 0.3))).clip
        == 0.3
    )
    normed = site(lambda m, *qkvx: tuple(rms(t.clamp(-0.3, 0.3)) for t in qkvx[:3]))
    assert normed.clip == 0.3 and normed.q_norm is not None


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (lambda m, q, k, v, x: (q.clamp(-0.3, 0.3), k, v), "clamped differently"),
        (lambda m, q, k, v, x: (q.clamp(-0.3, 0.5), k, v), "between -0.3 and 0.5"),
        (lambda m, q, k, v, x: (q.clamp(min=0), k, v), "clamp_min|between 0.0 and None"),
        (lambda m, q, k, v, x: ((q * 2).clamp(-0.3, 0.3), k, v), "does not follow the projection"),
        (lambda m, q, k, v, x: (rms(q).clamp(-0.3, 0.3), k, v), "does not follow the projection"),
    ],
)
def test_other_clamps_are_refused(twist: Any, reason: str) -> None:
    found = miss(twist).reason
    assert re.search(reason, found), found


# A temperature that follows the position


def grown(length: float, scale: float, offset: float = 0.0) -> Callable[..., Any]:
    def twist(m: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        steps = torch.floor((torch.arange(x.shape[1]).float() + offset) / length)
        return q * (1 + scale * torch.log(1 + steps))[:, None, None], k, v

    return twist


@pytest.mark.parametrize(("length", "scale", "offset"), [(4, 0.5, 0), (5, 0.1, 1), (8192, 0.1, 1), (16384, 0.25, 0)])
def test_a_temperature_is_read_beyond_the_captured_length(length: int, scale: float, offset: int) -> None:
    found = site(grown(length, scale, offset))
    assert found.temperature == Temperature(scale=scale, length=length, offset=offset, padding=True)


@pytest.mark.parametrize(
    "factor",
    [
        lambda steps: 1 + 0.1 * torch.log1p(steps / 8192),  # no steps
        lambda steps: 1 + 0.1 * torch.log1p(torch.floor(steps / 8192)).clamp(max=1.5),  # ends
        lambda steps: 1 + 0.1 * torch.floor(steps / 8192).sqrt(),
    ],
)
def test_another_growth_is_refused(factor: Any) -> None:
    def twist(m: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        return q * factor(torch.arange(x.shape[1]).float())[:, None, None], k, v

    assert "depends on the position" in miss(twist).reason


def test_keys_have_no_temperature() -> None:
    def twist(m: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Any:
        return q, grown(4, 0.5)(m, k, q, v, x)[0], v

    assert "the keys are scaled" in miss(twist).reason


# Adapters


class Adapted(Attention):
    """The projection of q has what `twist` adds to it."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.twist(self, x, self.q(x)).unflatten(-1, (H, D))
        k, v = (p(x).unflatten(-1, (H, D)) for p in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


LORA = LowRank(down=WeightRef(name="attention.down.weight"), up=WeightRef(name="attention.up.weight"), scale=2.0)
LORA2 = LowRank(down=WeightRef(name="attention.down2.weight"), up=WeightRef(name="attention.up2.weight"), scale=0.5)


@pytest.mark.parametrize(
    ("change", "adapters"),
    [
        (lambda m, x, y: y, ()),
        (lambda m, x, y: y + m.up(m.down(F.dropout(x, 0.1, False))) * 2.0, (LORA,)),
        (lambda m, x, y: 2.0 * m.up(m.down(x)) + y, (LORA,)),
        (lambda m, x, y: y + m.up(m.down(x) * 2.0), (LORA,)),
        (lambda m, x, y: (y + m.up(m.down(x)) * 2.0) + m.up2(m.down2(x)) / 2, (LORA, LORA2)),
    ],
)
def test_low_rank_adapters(change: Any, adapters: tuple[LowRank, ...]) -> None:
    assert site(change, Adapted).q.adapters == adapters


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, x, y: y + m.biased(m.down(x)), "not scale · up · down without a bias"),
        (lambda m, x, y: y + m.up(m.down(x).relu()), "not scale · up · down without a bias"),
        (lambda m, x, y: y + m.up(m.down(x.relu())), "not scale · up · down without a bias|of 2 tensors"),
        (
            lambda m, x, y: (
                y
                + (
                    (m.magnitude / (m.q.weight + m.up.weight @ m.down.weight).norm(dim=1) - 1) * y
                    + m.magnitude / (m.q.weight + m.up.weight @ m.down.weight).norm(dim=1) * m.up(m.down(x))
                )
            ),
            "DoRA",
        ),
    ],
)
def test_what_is_no_adapter_is_refused(change: Any, reason: str) -> None:
    found = report(change, Adapted)
    assert not found.sites
    assert re.search(reason, found.near_misses[0].reason), found.near_misses[0].reason


def test_a_wrapped_model_states_its_adapters_and_its_cache() -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for found in inspect(model).sites:
        assert found.proved and [a.scale for a in found.q.adapters] == [2.0] and not found.k.adapters
        assert found.o is not None and found.o.adapters[0].up.name.endswith("o_proj.lora_B.default.weight")
        assert found.call.cache is not None and found.call.cache_index == found.layer
