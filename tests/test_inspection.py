"""`inspect` on tiny models of real families: the facts it states, the proofs, and what it refuses."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from models import tiny
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import fla_swap as fs
from fla_swap.errors import CaptureError, NoAttentionFound
from fla_swap.inspection import inspect
from fla_swap.reporting import report_table
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, Mask, WeightRef, from_jsonable, to_jsonable

NAME = "model.layers.{}.self_attn"
QKV = ("q", "k", "v")

# family → what every site of it must state, beside four heads and the proof
EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2, "head_dim": 16, "scale": 0.25},
    "qwen2": {"kv_heads": 2, "head_dim": 16, "scale": 0.25},
    "qwen3": {"kv_heads": 2, "head_dim": 32, "scale": 32**-0.5},
    "phi3": {"kv_heads": 2, "head_dim": 16, "scale": 0.25},
    "gpt2": {"kv_heads": 4, "head_dim": 16, "scale": 0.25, "dropout": 0.1},
    "mistral": {"kv_heads": 2, "head_dim": 16, "scale": 0.25, "mask": Mask(kind="window", window=21)},
}


@cache
def found(family: str, implementation: str = "sdpa") -> AttentionReport:
    return inspect(tiny(family, implementation))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EXPECTED)
def test_every_site_is_found_stated_and_proved(family: str, implementation: str) -> None:
    report = found(family, implementation)
    assert len(report.sites) == 2 and not report.near_misses and not report.unclaimed
    for number, site in enumerate(report.sites):
        facts = {"mask": Mask(kind="causal"), "dropout": 0.0, **EXPECTED[family]}
        assert {name: getattr(site, name) for name in facts} == pytest.approx(facts) or _equal(site, facts)
        assert (site.layer, site.heads, site.hidden_size, site.softcap, site.sinks) == (number, 4, 64, None, None)
        assert site.proved and site.max_error is not None and site.max_error < 1e-5
        assert (site.call.outputs, site.call.output_index, site.call.cache_index) == (2, 0, number)


def _equal(site: AttentionSite, facts: dict[str, Any]) -> bool:
    numbers = {"scale", "dropout"}
    return all(getattr(site, n) == (pytest.approx(v) if n in numbers else v) for n, v in facts.items())


def test_llama_states_projections_rope_and_call() -> None:
    site = found("llama").sites[1]
    assert site.fqn == NAME.format(1)
    assert site.q.weight == WeightRef(name=f"{site.fqn}.q_proj.weight") and site.q.bias is None
    assert site.o.weight == WeightRef(name=f"{site.fqn}.o_proj.weight")
    assert site.rope is not None and site.rope.style == "half" and site.rope.attention_scaling == 1.0
    assert site.rope.inv_freq == pytest.approx([10000 ** (-i / 8) for i in range(8)], rel=1e-6)
    assert site.call.hidden == ArgPath(keyword="hidden_states")
    assert site.call.mask == ArgPath(keyword="attention_mask")
    assert site.call.cos == ArgPath(keyword="position_embeddings", item=0)
    assert site.call.sin == ArgPath(keyword="position_embeddings", item=1)
    assert site.call.cache == ArgPath(keyword="past_key_values")
    assert "modeling_llama.py:" in site.source


def test_gpt2_states_rows_of_the_transposed_fused_projection() -> None:
    site = found("gpt2", "eager").sites[0]
    fused = "transformer.h.0.attn.c_attn"
    for number, side in enumerate(QKV):
        rows = ((64 * number, 64 * number + 64),)
        projection = getattr(site, side)
        assert projection.weight == WeightRef(name=f"{fused}.weight", rows=rows, transposed=True)
        assert projection.bias == WeightRef(name=f"{fused}.bias", rows=rows)
    assert site.rope is None and site.call.hidden == ArgPath(position=0)


def test_phi3_states_row_ranges_of_uneven_parts() -> None:
    site = found("phi3").sites[0]
    assert [getattr(site, s).weight.rows for s in QKV] == [((0, 64),), ((64, 96),), ((96, 128),)]


def test_qwen3_states_its_norms() -> None:
    site = found("qwen3", "eager").sites[0]
    for norm, name in ((site.q_norm, "q_norm"), (site.k_norm, "k_norm")):
        assert norm is not None and (norm.kind, norm.across_heads, norm.offset) == ("rms", False, 0.0)
        assert norm.eps == pytest.approx(1e-6) and norm.weight == WeightRef(name=f"{NAME.format(0)}.{name}.weight")
    assert not site.norm_after_rope


def test_gpt_neox_heads_are_interleaved_and_partly_rotated() -> None:
    site = found("gpt_neox", "eager").sites[0]
    assert site.q.weight.rows == ((0, 16), (48, 64), (96, 112), (144, 160))
    assert site.v.weight.rows == ((32, 48), (80, 96), (128, 144), (176, 192))
    assert site.rope is not None and len(site.rope.inv_freq) == 2


def test_gemma2_eager_has_a_softcap_and_sdpa_loses_it() -> None:
    eager = found("gemma2", "eager")
    assert [s.softcap for s in eager.sites] == [50.0, 50.0] and not eager.notes
    assert [s.mask for s in eager.sites] == [Mask(kind="window", window=8), Mask(kind="causal")]
    assert eager.sites[0].scale == pytest.approx(256**-0.5)
    fused = found("gemma2", "sdpa")
    assert [s.softcap for s in fused.sites] == [None, None]
    assert len(fused.notes) == 2 and "eager is the meaning" in fused.notes[0]


def test_norms_across_heads_and_interleaved_rope() -> None:
    olmo = found("olmo2").sites[0]
    assert olmo.q_norm is not None and olmo.q_norm.across_heads
    cohere = found("cohere").sites[0]
    assert cohere.rope is not None and cohere.rope.style == "interleaved"


def test_rope_scaling_is_read_off_the_graph() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny("llama", rope_parameters=yarn)
    site = inspect(model).sites[0]
    assert site.rope is not None and site.rope.attention_scaling == pytest.approx(1.1386, abs=1e-3)
    assert site.rope.inv_freq == pytest.approx(model.model.rotary_emb.inv_freq.tolist())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_hold_up_to_a_length(kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    short, long = [1.0 + i / 10 for i in range(8)], [2.0 + i / 5 for i in range(8)]
    if kind == "longrope":
        parameters |= {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    model = tiny("llama", rope_parameters=parameters, max_position_embeddings=64 if kind == "dynamic" else 256)
    before = [dict(vars(m)) for m in model.modules()]
    report = inspect(model)
    assert [vars(m) for m in model.modules()] == before
    assert "hold up to 64 tokens" in report.notes[0]
    divided = short if kind == "longrope" else [1.0] * 8
    for site in report.sites:
        assert site.proved and site.rope is not None and site.rope.limit == 64
        assert site.rope.inv_freq == pytest.approx([10000 ** (-i / 8) / f for i, f in enumerate(divided)], rel=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision_models_are_proved_in_fp32_and_left_alone(implementation: str) -> None:
    model = tiny("llama", implementation).to(torch.bfloat16).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    site = inspect(model).sites[0]
    assert site.proved and site.rope is not None
    assert site.rope.inv_freq == pytest.approx([10000 ** (-i / 8) for i in range(8)], rel=1e-2)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_report_survives_json_and_renders() -> None:
    report = found("mistral")
    assert from_jsonable(AttentionReport, to_jsonable(report)) == report
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report_table(report))
    text = console.export_text()
    assert "window 21" in text and NAME.format(1) in text and "4/2" in text


# What is refused, and how


def test_a_model_without_attention_says_so() -> None:
    with pytest.raises(NoAttentionFound, match="has no attention"):
        inspect(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 5, 8))


def test_a_forward_without_token_ids_needs_example_inputs() -> None:
    with pytest.raises(CaptureError, match="pass example_inputs"):
        inspect(nn.Linear(4, 4))


class Attention(nn.Module):
    """A plain causal attention with one twist each, to be refused (or found) for that twist alone."""

    def __init__(self, twist: str = "none"):
        super().__init__()
        self.twist = twist
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.twist == "clamp":
            q = q.clamp(-1, 1)
        if self.twist == "permuted":
            k, v = k.flip(1), v.flip(1)
        scores = q @ k.transpose(-1, -2) / 8**0.5
        steps = torch.arange(x.shape[1])
        seen = steps[None, :] <= steps[:, None]
        if self.twist == "every other":
            seen = seen & ((steps[:, None] - steps[None, :]) % 2 == 0)
        if self.twist == "values":
            seen = seen & (scores > -3)
        if self.twist == "bias":
            scores = scores + (steps[:, None] - steps[None, :]).sqrt().nan_to_num()
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        mixed = (probabilities @ v).transpose(1, 2).flatten(2)
        return self.o(mixed)


class Block(nn.Module):
    def __init__(self, twist: str):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention(twist)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def test_reordered_key_value_heads_are_followed() -> None:
    (site,) = inspect(Block("permuted"), torch.randn(1, 7, 16)).sites
    assert site.k.weight.rows == site.v.weight.rows == ((8, 16), (0, 8)) and site.proved


def test_a_module_of_ones_own_is_found_and_proved() -> None:
    report = inspect(Block("none"), torch.randn(1, 7, 16))
    (site,) = report.sites
    assert (site.fqn, site.heads, site.head_dim, site.mask.kind) == ("attention", 2, 8, "causal")
    assert site.proved and site.call.outputs is None


@pytest.mark.parametrize(
    ("twist", "slot", "reason"),
    [
        ("clamp", "clip", "q, k and v are clamped differently"),
        ("every other", "mask", "neither causal"),
        ("values", "scores", "depends on the values"),
        ("bias", "mask", "not ALiBi"),
    ],
)
def test_what_is_not_understood_is_a_near_miss(twist: str, slot: str, reason: str) -> None:
    with pytest.raises(NoAttentionFound) as caught:
        inspect(Block(twist), torch.randn(1, 7, 16))
    (miss,) = caught.value.report.near_misses
    assert miss.slot == slot
    assert re.search(reason, miss.reason), miss.reason
    assert "test_inspection.py:" in miss.source


def test_a_module_that_is_called_twice_holds_two_sites_of_the_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(F.silu(self.attention(x)))

    report = inspect(Twice(), torch.randn(1, 7, 16), strict=False)
    assert [(s.fqn, s.place, s.proved) for s in report.sites] == [(f"attention#{n}", "graph", True) for n in (0, 1)]


class Hiding(Attention):
    """Its mask argument is true where a key is hidden."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Outer(nn.Module):
    """Makes the mask for `Hiding`: later tokens hidden, and the first `padded` ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Hiding()

    def forward(self, x: Tensor, padded: int = 0) -> Tensor:
        steps = torch.arange(x.shape[1])
        later = (steps[None, :] > steps[:, None]) | ((steps < padded) & (steps[:, None] >= padded))
        later = later.expand(x.shape[0], 1, -1, -1)
        return x + self.attention(x, later)


def test_a_mask_argument_that_hides_is_read_so_after_a_swap() -> None:
    """With the mask that it was inspected with, and with another one that hides tokens of padding."""
    model, x = Outer(), torch.randn(1, 9, 16)
    report = inspect(model, torch.randn(1, 7, 16))
    assert [(s.call.hides, s.call.mask, s.proved) for s in report.sites] == [(True, ArgPath(position=1), True)]
    with torch.no_grad():
        wanted = [model(x, padded)[:, padded:] for padded in (0, 3)]
        fs.swap_(model, fs.plan(report, mixer="softmax", keep=0))
        for padded, before in zip((0, 3), wanted, strict=True):
            torch.testing.assert_close(model(x, padded)[:, padded:], before, atol=1e-5, rtol=1e-5)
    assert (wanted[0][:, 3:] - wanted[1]).abs().max() > 1e-3


def test_example_inputs_with_a_padding_mask_are_padded_for_the_proof() -> None:
    ids = torch.arange(8)[None] + 3
    report = inspect(tiny("llama"), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
    assert all(s.proved and s.call.mask is not None for s in report.sites) and len(report.sites) == 2


def test_near_misses_say_what_held_and_the_furthest_comes_first() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention("values"), Attention("every other")

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    first, second = inspect(Two(), torch.randn(1, 7, 16), strict=False).near_misses
    assert (first.fqn, first.slot, second.fqn, second.slot) == ("second", "mask", "first", "scores")
    assert first.passed == ("core", "q", "k", "v", "output", "owner", "heads") and first.progress == 7
    assert second.passed == () and first.anchor.startswith("softmax") and second.anchor != first.anchor
