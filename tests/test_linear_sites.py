"""Layers that are linear already: found by what stands around them, proved by what they compute, or refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as qwen_code

import fla_swap as fs
from fla_swap.captures import TwoCaptures
from fla_swap.errors import NoAttentionFound, PlanError
from fla_swap.linear_sites import LinearSites
from fla_swap.reporting import report_html
from fla_swap.types import AttentionReport, from_jsonable
from tests.linear_models import LINEAR, linear_model
from tests.linear_models import linear_report as report
from tests.models import tiny

KINDS = {
    "qwen3_next": "linear (gated delta rule)",
    "qwen3_5": "linear (gated delta rule)",
    "bamba": "linear (state space, a decay for each head)",
    "mamba2": "linear (state space, a decay for each head)",
    "minimax": "linear (fixed decay)",
}


def looked_at(model: nn.Module) -> LinearSites:
    """The linear layers of a model, without its attention."""
    captures = TwoCaptures(model, None, ())
    captures.first = captures.capture(13)
    sites = LinearSites(captures, None)
    sites.run(verify=True)
    return sites


@pytest.mark.parametrize("family", KINDS)
def test_linear_layers_are_sites_of_their_own_kind_and_proved(family):
    found = report(family)
    assert [s.fqn for s in found.linear] == LINEAR[family]
    assert [s.kind for s in found.linear] == [KINDS[family]] * len(found.linear)
    assert all(s.proved and s.max_error is not None and s.max_error < 1e-4 for s in found.linear)
    assert found.near_misses == ()
    assert len(found.sites) == (0 if family == "mamba2" else 1)


def test_what_is_read_of_a_gated_delta_rule():
    """The fused projection is interleaved by key head: q, k, and two value heads' v and z; then β and a."""
    site = report("qwen3_next").linear[0]
    read = site.recurrence
    assert read is not None and read.decay is not None and read.beta is not None and read.gate is not None
    assert (site.heads, read.qk_heads, site.head_dim, site.v_head_dim) == (4, 2, 8, 6)
    assert site.q.weight.rows == ((0, 8), (40, 48)) and site.k.weight.rows == ((8, 16), (48, 56))
    assert site.v.weight.rows == ((16, 28), (56, 68)) and read.gate.weight.rows == ((28, 40), (68, 80))
    assert read.beta.weight.rows == ((0, 2), (4, 6)) and read.decay.weight.rows == ((2, 4), (6, 8))
    assert (read.taps, read.activation, read.unit, read.gate_activation, read.gate_first) == (
        4,
        "silu",
        True,
        "silu",
        False,
    )
    assert math.isclose(read.scale, 8**-0.5) and read.norm_width == 6
    assert (site.call.cache_index, site.call.hidden.keyword) == (0, "hidden_states")


def test_what_is_read_of_a_state_space():
    site = report("bamba").linear[0]
    read = site.recurrence
    assert read is not None and read.decay is not None and read.skip is not None and read.rate is not None
    assert (site.heads, read.qk_heads, site.head_dim, site.v_head_dim) == (8, 2, 12, 8)
    assert site.v.weight.rows == ((64, 128),) and site.k.weight.rows == ((128, 152),)
    assert site.q.weight.rows == ((152, 176),) and read.decay.weight.rows == ((176, 184),)
    assert read.skip.name.endswith(".D") and read.rate.name.endswith(".A_log") and read.step_limits is None
    assert (read.gate_first, read.norm_width, read.scale, read.unit) == (True, 64, 1.0, False)


def test_steps_that_are_held_between_limits():
    (site,) = looked_at(linear_model("mamba2", time_step_limit=(0.05, 0.4), num_hidden_layers=1)).found
    assert site.recurrence is not None and site.recurrence.step_limits == pytest.approx((0.05, 0.4))


def test_a_report_with_linear_layers_reads_back_and_shows_them():
    found = report("qwen3_next")
    assert from_jsonable(AttentionReport, json.loads(json.dumps(found.to_dict()))) == found
    text = " ".join(str(found).split())
    assert "1 attention site and 1 linear layer" in text
    told = found.explain("model.layers.0.linear_attn")
    for words in ("gated delta rule", "4 taps", "output norm", "write strength", "swap for 'gated_deltanet' is exact"):
        assert words in told
    page = report_html(found)
    assert "Linear already" in page and "linear (gated delta rule)" in page
    assert found.site("model.layers.0.linear_attn") is found.linear[0]


# Plans.


def test_only_same_swaps_linear_layers():
    found = report("qwen3_next")
    assert [p.site.fqn for p in fs.plan(found, mixer="gla", keep=0).layers] == ["model.layers.1.self_attn"]
    same = fs.plan(found, mixer="same")
    assert [(p.site.fqn, p.mixer) for p in same.layers] == [("model.layers.0.linear_attn", "gated_deltanet")]
    assert same.kept == ("model.layers.1.self_attn",)
    both = fs.plan(found, mixer="gla", keep=0, rules=[fs.Rule("*.linear_attn", "same")])
    assert [p.mixer for p in both.layers] == ["gla", "gated_deltanet"]


def test_same_without_a_linear_layer_is_an_error():
    with pytest.raises(PlanError, match="has no layer that is linear already"):
        fs.plan(fs.inspect(tiny("llama")), mixer="same")
    with pytest.raises(PlanError, match="matches no layer that is linear already; those are"):
        fs.plan(report("bamba"), rules=[fs.Rule("*.self_attn", "same")])
    with pytest.raises(PlanError, match="takes no options"):
        fs.plan(report("bamba"), mixer="same", options={"conv_size": 4})


# What is no linear recurrence that ours is, and says so.


def misses(model: nn.Module) -> list[tuple[str, str]]:
    sites = looked_at(model)
    assert sites.found == []
    return [(m.slot, m.reason) for m in sites.misses]


def changed_rule(monkeypatch, change) -> list[tuple[str, str]]:
    """The misses of a model whose recurrence gets other arguments."""
    original = qwen_code.torch_chunk_gated_delta_rule

    def rule(query, key, value, g, beta, **options):
        return original(*change(query, key, value, g, beta), **options)

    monkeypatch.setattr(qwen_code, "torch_chunk_gated_delta_rule", rule)
    return misses(linear_model("qwen3_next"))


CHANGES = {
    "decay twice as fast": lambda q, k, v, g, b: (q, k, v, 2 * g, b),
    "decay of the token before": lambda q, k, v, g, b: (q, k, v, F.pad(g, (0, 0, 1, -1)), b),
    "a strength of .99": lambda q, k, v, g, b: (q, k, v, g, 0.99 * b),
    "values of the token before": lambda q, k, v, g, b: (q, k, F.pad(v, (0, 0, 0, 0, 1, -1)), g, b),
    "keys moved by .01": lambda q, k, v, g, b: (q, k + 0.01, v, g, b),
    "q without its last channel": lambda q, k, v, g, b: (q * (torch.arange(q.shape[-1]) < q.shape[-1] - 1), k, v, g, b),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recurrence_that_differs_a_little_is_refused(change, monkeypatch):
    (slot, reason), *_ = changed_rule(monkeypatch, CHANGES[change])
    assert reason.startswith("it mixes tokens without a softmax, and is no linear recurrence that is known")
    assert slot in ("proof", "decay", "beta")


class Another(nn.Module):
    """A causal running mean between projections: a linear recurrence of no mixer of ours."""

    def __init__(self, width: int):
        super().__init__()
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states, **_):
        x = self.into(hidden_states)
        return self.out(x.cumsum(1).exp().log1p())


def test_other_recurrences_are_near_misses():
    model = linear_model("bamba")
    model.model.layers[0].mamba = Another(32)
    ((slot, reason),) = misses(model)
    assert slot == "recurrence" and "1 groups of channels go into it, expected q, k and v" in reason


def test_a_state_space_of_another_kind_is_refused_with_its_reason():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1)
    ((slot, reason),) = misses(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert slot == "projection" and "a projection of what silu" in reason


def test_a_model_without_attention_needs_no_attention_to_be_inspected():
    """But one whose linear layers are not understood either is an error, with the report in it."""
    assert report("mamba2").sites == () and len(report("mamba2").linear) == 2
    model = linear_model("mamba2", num_hidden_layers=1)
    model.backbone.layers[0].mixer = Another(32)
    with pytest.raises(NoAttentionFound) as caught:
        fs.inspect(model)
    assert caught.value.report is not None
    assert [m.fqn for m in caught.value.report.near_misses] == ["backbone.layers.0.mixer"]


def test_a_parameter_without_a_part_is_named():
    class Scaled(type(linear_model("bamba").model.layers[0].mamba)):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) + 0 * self.extra.sum()

    model = linear_model("bamba")
    layer = model.model.layers[0].mamba
    layer.__class__, layer.extra = Scaled, nn.Parameter(torch.ones(3))
    ((slot, reason),) = misses(model)
    assert slot == "output" and "after the last projection" in reason


def test_tables_in_half_precision_are_named():
    """MiniMax stores powers of its rate; rounded, they are powers of no rate."""
    ((slot, reason),) = misses(linear_model("minimax").to(torch.bfloat16))
    assert slot == "proof" and "in half precision" in reason and "slope_rate" in reason
