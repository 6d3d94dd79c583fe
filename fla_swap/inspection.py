"""The verbs `inspect` and `prove`: capture and match (`captures`), then record the calls and prove (`finishing`)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fla_swap.arguments import random_numbers_kept
from fla_swap.captures import TwoCaptures
from fla_swap.crosscheck import check_config, unseen_layers
from fla_swap.errors import ConfigError, NoAttentionFound, VerificationError
from fla_swap.exportable import exportable
from fla_swap.finishing import Finisher
from fla_swap.linear_sites import LinearSites
from fla_swap.matching import MatchResult
from fla_swap.model_inputs import Example, check_example
from fla_swap.naming import with_own_names
from fla_swap.patterns.base import Recogniser
from fla_swap.patterns.region import Region
from fla_swap.reporting.explanation import nothing_found
from fla_swap.structure import ProveOnce
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, CallContract, NearMiss
from fla_swap.wrappers import uncompiled


def inspect(
    model: nn.Module,
    example_inputs: Example | None = None,
    *,
    patterns: Iterable[Recogniser] | None = None,
    strict: bool = True,
    verify: bool = True,
    within: str | Sequence[str] = (),
    sites: Sequence[AttentionSite] = (),
) -> AttentionReport:
    """Find every attention layer of `model` that can be rebuilt from its facts, and prove each.

    Args:
        model: any nn.Module, with weights (quantised too) or on the meta device; it is exported and called, and left as
            it was. Where it runs an attention kernel (flash or flex attention), its eager code is inspected.
        example_inputs: for a model whose forward does not take `input_ids`: one call's arguments (a mapping, a sequence
            or a tensor), tensors [B, T, …]. They are repeated or cut to other lengths.
        patterns: recognisers of your own, tried before the built-in ones. None: those of installed packages (entry
            points of the group "fla_swap.recognisers"); so `patterns=()` leaves the built-in ones alone.
        strict: raise NoAttentionFound (the report is in `.report`) when there is no site and no linear layer.
        verify: prove the sites; without it they are returned with `proved=False`.
        within: names of submodules that hold the attention (decoder layers): only these are exported, each as the model
            calls it, for a model that cannot be exported whole. The model is run, and sites have their names in it.
        sites: stated by hand, in place of what is found in those modules; see `prove`.
    Raises:
        ConfigError: an argument is not what it must be. CaptureError: the model does not run on the inputs, or
            `torch.export` cannot follow it. NoAttentionFound: see `strict`.
        VerificationError: the sites disagree with the model's own config, or one stated by hand is wrong.
    """
    start, given = time.perf_counter(), model
    check_example(example_inputs)
    model, parts, known = _given(model), _outermost(within), []
    if model is not given:
        known.append("the model is compiled: the module inside was inspected, and names are counted from it")
    with random_numbers_kept(model), exportable(model) as stand_ins:
        proofs = ProveOnce() if stand_ins.weights else None
        inspections = [_Inspection(model, example_inputs, patterns, proofs, part) for part in parts]
        stated = [_prove(model, site, example_inputs, proofs) for site in sites]
        results = [one.run([s.fqn for s in stated], verify) for one in inspections]
    found = [site for r in results for site in r.sites]
    misses = sorted((miss for r in results for miss in r.near_misses), key=lambda m: -m.progress)
    linear = [site for one in inspections for site in one.linear]
    notes = [*known, *stand_ins.notes, *(note for one in inspections for note in one.notes)]
    if proofs is not None and proofs.groups:
        notes.append(proofs.note())
    if not within:
        notes += _unseen((*found, *stated, *misses, *linear), model)
    report = AttentionReport(
        model=type(model).__name__,
        sites=_in_order(model, found, stated),
        near_misses=tuple(misses),
        unclaimed=tuple(core for r in results for core in r.unclaimed),
        notes=tuple(dict.fromkeys(notes)),
        seconds=time.perf_counter() - start,
        checked_length=min((n for one in inspections if (n := one.captures.checked) is not None), default=None),
        linear=_in_order(model, linear, ()),
    )
    if strict and not (report.sites or report.linear):
        raise NoAttentionFound(nothing_found(report), report)
    check_config(report.sites, model)
    return report


def prove(model: nn.Module, site: AttentionSite, example_inputs: Example | None = None) -> AttentionSite:
    """Prove a site that was stated by hand, as `inspect` proves those that it finds; the model is not exported.

    Args:
        site: `fqn` names the module that is replaced. `call` left at `CallContract(hidden=ArgPath(position=0))` is
            filled in from one observed call of the model; one that says more must be what is observed.
        example_inputs: as for `inspect`.
    Returns:
        The site with `call`, `proved`, `max_error` and `dropout` filled in: `inspect(model, sites=[site])` and
        `dataclasses.replace(report, sites=…)` put it among others.
    Raises:
        VerificationError: it is not what the module computes, or how it is called cannot be told; the reason is given.
    """
    check_example(example_inputs)
    model = _given(model)
    with random_numbers_kept(model), exportable(model):
        return _prove(model, site, example_inputs, None)


def _given(model: nn.Module) -> nn.Module:
    """The module to look at. Raises ConfigError for anything that is none."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {model!r}, no torch.nn.Module: load it first (fs.load, from_pretrained)")
    return uncompiled(model)


def _outermost(within: str | Sequence[str]) -> list[str]:
    """The parts, each once and none that lies in another; [""] is the whole model."""
    parts = [within] if isinstance(within, str) else list(within) or [""]
    if wrong := [part for part in parts if not isinstance(part, str)]:
        raise ConfigError(f"within={within!r}: names of submodules are strings, {wrong[0]!r} is none")
    return [p for p in dict.fromkeys(parts) if not any(o != p and (not o or p.startswith(f"{o}.")) for o in parts)]


def _prove(model: nn.Module, site: AttentionSite, example: Example | None, proofs: ProveOnce | None) -> AttentionSite:
    if site.place != "module":
        raise VerificationError(f"{site.fqn}: only a site that has a module of its own can be stated by hand")
    if site.fqn not in dict(model.named_modules()):
        raise VerificationError(f"{type(model).__name__} has no module {site.fqn!r}")
    inspection = _Inspection(model, example, (), proofs)
    inspection.captures.choose_length(site)
    found, misses = inspection.finish((site,), verify=True, regions={})
    if misses:
        raise VerificationError(f"{site.fqn}: {misses[0].reason.removeprefix(f'{site.fqn}: ')}")
    said = dataclasses.replace(site.call, residual=None, time_first=False)
    observed = dataclasses.replace(found[0].call, unmasked=site.call.unmasked)
    if site.call.seen is None:
        observed = dataclasses.replace(observed, seen=None, own_mask=site.call.own_mask)
    if said != CallContract(hidden=ArgPath(position=0)) and site.call != observed:
        raise VerificationError(f"{site.fqn}: the site says {site.call}, the module is called as {found[0].call}")
    return dataclasses.replace(found[0], layer=site.layer)


def _in_order(
    model: nn.Module, found: Sequence[AttentionSite], stated: Sequence[AttentionSite]
) -> tuple[AttentionSite, ...]:
    """Sites numbered from 0: as they were found, or in the order of the model's modules where some were stated."""
    ordered = [*found, *stated]
    if stated:
        order = {name: number for number, (name, _) in enumerate(model.named_modules())}
        ordered.sort(key=lambda s: order.get(s.fqn, len(order)))
    return tuple(dataclasses.replace(site, layer=number) for number, site in enumerate(ordered))


def _unseen(found: Iterable[AttentionSite | NearMiss], model: nn.Module) -> list[str]:
    return [
        f"{name}: it is built like modules whose attention was found, but none was seen in it: it was not called, or "
        "nothing reads what it returns"
        for name in unseen_layers([item.fqn for item in found], model)
    ]


class _Inspection:
    """One model, or `part` of it: captured at two lengths, matched, its calls recorded, its sites proved."""

    def __init__(
        self,
        model: nn.Module,
        example: Example | None,
        patterns: Iterable[Recogniser] | None,
        proofs: ProveOnce | None,
        part: str = "",
    ):
        self.captures, self.proofs = TwoCaptures(model, example, patterns, part), proofs
        self.linear: list[AttentionSite] = []

    @property
    def notes(self) -> list[str]:
        return self.captures.notes

    def run(self, stated: Sequence[str], verify: bool) -> MatchResult:
        """The finished sites and near misses, without what lies in the modules that `stated` names."""

        def free(fqn: str) -> bool:
            fqn = fqn.partition("#")[0]
            return not any(not owner or fqn == owner or fqn.startswith(f"{owner}.") for owner in stated)

        matched = self.captures.match()
        if self.proofs is not None and self.captures.first is not None:
            self.proofs.graphs.append(self.captures.first)
        named = with_own_names([s for s in matched.sites if free(s.fqn)], self.captures.model)
        sites, misses = self.finish(named, verify, matched.regions)
        linear = LinearSites(self.captures, self.proofs)
        linear.run(verify)
        self.linear = [s for s in linear.found if free(s.fqn)]
        near = (*misses, *(m for m in (*matched.near_misses, *linear.misses) if free(m.fqn)))
        return dataclasses.replace(matched, sites=tuple(sites), near_misses=near)

    def finish(
        self, sites: Sequence[AttentionSite], verify: bool, regions: Mapping[str, Region]
    ) -> tuple[list[AttentionSite], list[NearMiss]]:
        """Sites with their calls, proved, and those for which that failed."""
        return Finisher(self.captures, regions, self.proofs).finish(sites, verify)
