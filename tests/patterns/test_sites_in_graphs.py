"""Attention without a module of its own: stated as a site of the graph, and proved by running its part of the graph."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from plain_models import whole
from torch import Tensor, nn

import fla_swap as fs
from fla_swap.captures import TwoCaptures
from fla_swap.errors import SwapError, VerificationError
from fla_swap.graph_proof import prove_in_graph
from fla_swap.types import AttentionReport, Mask, WeightRef

NAMES = {
    "functions": ["#0", "#1"],
    "block in one": ["blocks.0#0", "blocks.1#0"],
    "two attentions": ["blocks.0#0", "blocks.0#1", "blocks.1#0", "blocks.1#1"],
}


@cache
def found(name: str) -> AttentionReport:
    return fs.inspect(whole(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_stated_and_proved(name: str) -> None:
    report = found(name)
    assert [s.fqn for s in report.sites] == NAMES[name] and not report.near_misses and not report.unclaimed
    for site in report.sites:
        assert (site.place, site.heads, site.head_dim, site.mask) == ("graph", 4, 8, Mask(kind="causal"))
        assert site.proved and site.max_error is not None and site.max_error < 1e-5
    assert len({s.anchor for s in report.sites}) == len(report.sites)


def test_functions_name_the_weights_that_they_are_given() -> None:
    first, second = found("functions").sites
    assert (first.q.weight, second.v.weight) == (WeightRef(name="w.0_q"), WeightRef(name="w.1_v"))
    assert first.o is not None and first.o.weight == WeightRef(name="w.0_o")


def test_heads_that_go_on_without_a_projection_have_none() -> None:
    sites = found("two attentions").sites
    assert sites[0].o is not None and sites[0].o.weight == WeightRef(name="blocks.0.proj.weight")
    assert sites[1].o is None


def test_a_block_that_is_called_twice_holds_two_sites_of_the_graph() -> None:
    sites = found("shared").sites
    assert len(sites) == 2 and all(s.place == "graph" and s.proved for s in sites)
    assert sites[0].q == sites[1].q and sites[0].anchor != sites[1].anchor


def test_only_a_rewrite_can_replace_them() -> None:
    model, plan = whole("functions"), fs.plan(found("functions"), mixer="window", keep=0)
    assert [layer.site.fqn for layer in plan.layers] == ["#0", "#1"]
    with pytest.raises(SwapError, match=r"has no module of its own .* only fs.rewrite"):
        fs.swap_(model, plan)


def test_facts_that_are_off_by_little_do_not_survive_the_proof() -> None:
    matched = TwoCaptures(whole("block in one"), None, ()).match()
    site = matched.sites[0]
    region = matched.regions[site.fqn]
    assert prove_in_graph(site, region).error < 1e-5
    for wrong in ({"scale": site.scale * 1.001}, {"mask": Mask(kind="window", window=9)}, {"q": site.k}):
        with pytest.raises(VerificationError, match="computes something that the site does not say"):
            prove_in_graph(dataclasses.replace(site, **wrong), region)


class Twice(nn.Module):
    """A module of PyTorch's that is called twice, or once with its attention weights returned."""

    def __init__(self, batch_first: bool, weights: bool = False):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            mixed, weights = self.attention(x, x, x, need_weights=self.weights)
            x = x + mixed if weights is None else (x + mixed) * weights.sum((1, 2))[:, None, None]
        return x


@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_a_module_the_tokens_may_stand_first(batch_first: bool) -> None:
    report = fs.inspect(Twice(batch_first), torch.randn(2, 9, 16))
    assert [(s.fqn, s.call.time_first, s.proved) for s in report.sites] == [
        (f"attention#{n}", True, True) for n in (0, 1)
    ]


def test_attention_weights_that_somebody_reads_would_be_the_old_ones() -> None:
    report = fs.inspect(Twice(True, weights=True), torch.randn(2, 9, 16), strict=False)
    assert not report.sites and len(report.near_misses) == 2 and {m.slot for m in report.near_misses} == {"owner"}
