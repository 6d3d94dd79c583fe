"""Attention as people write it by hand: every style is found, stated and proved; what only looks like it is refused."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache
from typing import Any

import pytest
import torch
from plain_models import NEAR_MISSES, STYLES, plain

import fla_swap as fs
from fla_swap.errors import VerificationError
from fla_swap.recording import record_calls
from fla_swap.types import AttentionReport, Mask, WeightRef
from fla_swap.verification import Call, prove

CAUSAL = Mask(kind="causal")
FACTS: dict[str, dict[str, Any]] = {
    **{name: {"kv_heads": 2} for name in ("FusedGqa", "RepeatInterleaved", "ExpandedGroups")},
    **{name: {"kv_heads": 2} for name in ("GroupedFive", "GroupedEinsum")},
    **{name: {"kv_heads": 1} for name in ("MultiQuery", "MultiQueryFolded")},
    "FusedOneHead": {"heads": 1, "kv_heads": 1, "head_dim": 32, "scale": 32**-0.5},
    "WindowMask": {"mask": Mask(kind="window", window=9)},
    "Bidirectional": {"mask": Mask(kind="bidirectional")},
    "Alibi": {"alibi": pytest.approx((0.5, 0.25, 0.125, 0.0625))},
    "ModuleListHeads": {"dropout": 0.2},
}
REASONS = {
    "WrongAxis": "the softmax runs over another axis than the one that is summed with the values",
    "OverHeads": "does not run over the keys of one query and one head",
    "ValueMask": "the mask depends on the values that the model reads",
    "SwappedKeyHead": "share a key/value head do not stand together",
    "ShuffledTokens": "the values do not stand at the tokens of their keys",
    "WeightsTimesTable": "mul.Tensor between the softmax and the values scales the probabilities",
    "MaskedAfterwards": "masked_fill.Scalar between the softmax and the values hides keys that took part in it",
    "SumWithoutMask": "the exponentials are divided by the sum of others",
    "EpsilonInSum": "a number is added to the sum",
    "TwoInOne": "sub.Tensor between the softmax and the values",
    "HeadScales": "a learned factor of the scores, made of the parameter",
    "TalkingHeads": "matmul.default with stored weights mixes the heads between q kᵀ and the softmax",
    "TalkingHeadsAfter": "linear.default with stored weights mixes the heads after the softmax",
    "TwoProducts": "the scores are a sum of several products (relative positions)",
    "ProbabilitiesInParts": "the probabilities are taken apart, each part with values of its own",
    "Squared": "square.default between the softmax and q kᵀ",
    **dict.fromkeys(("ExpAlone", "ExpOverLength", "ExpOverClampedSum", "SumAfterwards"), "the weights are exp of the"),
    **dict.fromkeys(("Sigmoid", "SigmoidEinsum"), "the weights are sigmoid of the scores, not their softmax"),
    "Relu": "the weights are relu of the scores, not their softmax",
}


@cache
def found(style: str) -> AttentionReport:
    return fs.inspect(plain(style), strict=False)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_found_stated_and_proved(style: str) -> None:
    report = found(style)
    assert not report.near_misses and not report.unclaimed
    assert [s.fqn for s in report.sites] == ["blocks.0.attn", "blocks.1.attn"]
    wanted = {"heads": 4, "kv_heads": 4, "head_dim": 8, "scale": 8**-0.5, "mask": CAUSAL, "alibi": None, "dropout": 0.0}
    for site in report.sites:
        for name, value in {**wanted, **FACTS.get(style, {})}.items():
            own = getattr(site, name)
            assert own == (pytest.approx(value) if name == "scale" else value), name
        assert site.proved and site.max_error is not None and site.max_error < 5e-6


@pytest.mark.parametrize("style", NEAR_MISSES)
def test_what_only_looks_like_attention_is_refused(style: str) -> None:
    report = found(style)
    assert not report.sites
    assert not report.unclaimed
    assert sum(REASONS[style] in m.reason for m in report.near_misses) == 2, [m.reason for m in report.near_misses]
    assert all(re.search(r"plain_(base|near_misses)\.py:\d+$", m.source) for m in report.near_misses)


@pytest.mark.parametrize(
    "style",
    [
        *("EinsumWeights", "ModuleListHeads", "FusedByHead", "Conv1x1", "GroupedEinsum"),
        *("NegativeRotation", "EmptyJoin"),
    ],
)
def test_swapping_for_softmax_changes_nothing(style: str) -> None:
    model, ids = plain(style), torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    before = model(ids).detach()
    fs.swap_(model, fs.plan(found(style), mixer="softmax", keep=0))
    assert float((model(ids).detach() - before).abs().max()) <= 1e-5


def test_a_rotation_the_other_way_has_negative_frequencies() -> None:
    rope = found("NegativeRotation").sites[0].rope
    assert rope is not None and rope.style == "half"
    assert rope.inv_freq == pytest.approx([-1.0, -0.1, -0.01, -0.001], rel=1e-4)
    assert found("EmptyJoin").sites[0].rope is None


def test_heads_with_projections_of_their_own_are_one_site() -> None:
    site = found("ModuleListHeads").sites[0]
    names = [f"blocks.0.attn.heads.{h}.query.weight" for h in range(4)]
    assert site.q.weight == WeightRef(name=names[0], more=tuple(WeightRef(name=n) for n in names[1:]))
    assert site.q.weight.names == tuple(names)


def test_a_parameter_of_three_dimensions_says_which_count_outputs() -> None:
    site = found("EinsumWeights").sites[0]
    assert site.o is not None
    assert site.q.weight == WeightRef(name="blocks.0.attn.wq", dims=((1, 2), (0,)))
    assert site.o.weight == WeightRef(name="blocks.0.attn.wo", dims=((2,), (0, 1)))
    stacked = found("StackedParameter").sites[0]
    assert stacked.k.weight == WeightRef(name="blocks.0.attn.w", rows=((32, 64),), dims=((0, 1), (2,)))


def test_shared_projections_are_stated_twice() -> None:
    tied, equal = found("TiedQk").sites[0], found("KeysAreValues").sites[0]
    assert tied.q == tied.k != tied.v
    assert equal.k == equal.v != equal.q


def test_facts_that_are_off_by_little_do_not_survive_the_proof() -> None:
    site, model = found("EinsumBthd").sites[0], plain("EinsumBthd")
    ids = torch.arange(26).reshape(2, 13)
    record = record_calls(model, [site.fqn], ((ids,), {}))[site.fqn]
    call = Call(args=record.args, kwargs=record.kwargs, valid=ids >= 0, positions=None)
    owner = model.get_submodule(site.fqn)
    assert prove(site, owner, call).error < 5e-6
    swapped = dataclasses.replace(site, k=dataclasses.replace(site.k, weight=_heads_exchanged(site.k.weight)))
    for wrong in (dataclasses.replace(site, scale=site.scale * 1.001), swapped):
        with pytest.raises(VerificationError, match="computes something that the site does not say"):
            prove(wrong, owner, call)


def _heads_exchanged(ref: WeightRef) -> WeightRef:
    return WeightRef(name=ref.name, rows=((8, 16), (0, 8), (16, 32)))


def test_the_models_are_left_as_they_were() -> None:
    model = plain("LoopOverChunks")
    before = copy.deepcopy(model.state_dict())
    fs.inspect(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
