"""`inspect`: capture → match → record the calls → prove. The only module that composes these stages."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fla_swap.capture import capture
from fla_swap.contract import CacheRecord, CallRecord, derive_contract, find_entry, readings, record_cache, record_calls
from fla_swap.crosscheck import check_config, unseen_layers
from fla_swap.errors import CaptureError, NoAttentionFound, VerificationError
from fla_swap.exportable import exportable
from fla_swap.graph_proof import finish_in_graph
from fla_swap.lengths import rope_limit
from fla_swap.matching import MATCHED, MatchResult, match
from fla_swap.model_inputs import (
    Example,
    Inputs,
    default_inputs,
    given_tokens,
    inputs_of_length,
    resizable,
    sizes_of,
    takes_cache,
)
from fla_swap.parts import call_of_part
from fla_swap.patterns.base import Recogniser
from fla_swap.patterns.catalogue import catalogue
from fla_swap.patterns.cores import mask_lengths
from fla_swap.patterns.graph import CapturedGraph
from fla_swap.patterns.region import Region
from fla_swap.reporting.explanation import nothing_found
from fla_swap.structure import ProveOnce
from fla_swap.types import ArgPath, AttentionReport, AttentionSite, CallContract, NearMiss
from fla_swap.verification import TOLERANCE, Call, Proof, weights_of
from fla_swap.verification import prove as prove_site

SHORT = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
LONGEST = 8192
PROOF_BYTES = 2**30
CALLED = (*MATCHED, "call")


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
        strict: raise NoAttentionFound (the report is in `.report`) when there is no site.
        verify: prove the sites; without it they are returned with `proved=False`.
        within: names of submodules that hold the attention (decoder layers): only these are exported, each as the model
            calls it, for a model that cannot be exported whole. The model is run, and sites have their names in it.
        sites: stated by hand, in place of what is found in those modules; see `prove`.
    Raises:
        CaptureError: `torch.export` cannot follow the model. NoAttentionFound: see `strict`.
        VerificationError: the sites disagree with the model's own config, or one stated by hand is wrong.
    """
    start = time.perf_counter()
    parts = (within,) if isinstance(within, str) else tuple(within) or ("",)
    with exportable(model) as stand_ins:
        proofs = ProveOnce() if stand_ins.weights else None
        sessions = [_Inspection(model, example_inputs, patterns, proofs, part) for part in parts]
        stated = [_prove(model, site, example_inputs, proofs) for site in sites]
        results = [session.run([s.fqn for s in stated], verify) for session in sessions]
    found = [site for r in results for site in r.sites]
    misses = sorted((miss for r in results for miss in r.near_misses), key=lambda m: -m.progress)
    notes = [*stand_ins.notes, *(note for session in sessions for note in session.notes)]
    if proofs is not None and proofs.groups:
        notes.append(proofs.note())
    if not within:
        notes += _unseen((*found, *stated, *misses), model)
    report = AttentionReport(
        model=type(model).__name__,
        sites=_in_order(model, found, stated),
        near_misses=tuple(misses),
        unclaimed=tuple(core for r in results for core in r.unclaimed),
        notes=tuple(dict.fromkeys(notes)),
        seconds=time.perf_counter() - start,
    )
    if strict and not report.sites:
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
    with exportable(model):
        return _prove(model, site, example_inputs, None)


def _prove(model: nn.Module, site: AttentionSite, example: Example | None, proofs: ProveOnce | None) -> AttentionSite:
    if site.place != "module":
        raise VerificationError(f"{site.fqn}: only a site that has a module of its own can be stated by hand")
    if site.fqn not in dict(model.named_modules()):
        raise VerificationError(f"{type(model).__name__} has no module {site.fqn!r}")
    session = _Inspection(model, example, (), proofs)
    session.choose_length(site)
    found, misses = session.finish((site,), verify=True)
    if misses:
        raise VerificationError(f"{site.fqn}: {misses[0].reason.removeprefix(f'{site.fqn}: ')}")
    said = dataclasses.replace(site.call, residual=None, time_first=False)
    if said != CallContract(hidden=ArgPath(position=0)) and site.call != found[0].call:
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
        self.model, self.example, self.proofs, self.part = model, example, proofs, part
        self.catalogue = catalogue(patterns)
        self.longest = 0
        self.resize: list[int] | None = None
        self.time_first = False
        self.notes: list[str] = []
        self.rope_limit: int | None = None
        self.regions: Mapping[str, Region] = {}

    def run(self, stated: Sequence[str], verify: bool) -> MatchResult:
        """The finished sites and near misses, without what lies in the modules that `stated` names."""

        def free(fqn: str) -> bool:
            fqn = fqn.partition("#")[0]
            return not any(not owner or fqn == owner or fqn.startswith(f"{owner}.") for owner in stated)

        matched = self.match()
        self.regions = matched.regions
        sites, misses = self.finish([s for s in matched.sites if free(s.fqn)], verify)
        near = (*misses, *(m for m in matched.near_misses if free(m.fqn)))
        return dataclasses.replace(matched, sites=tuple(sites), near_misses=near)

    def choose_length(self, site: AttentionSite) -> None:
        """The length that a site is proved at when nothing was captured: longer than its window."""
        longest, taken = max(2 * SHORT[0], site.mask.window or 0) + 3, self._sizes()
        while longest in taken:
            longest += 1
        self.longest = min(longest, self._limit(), LONGEST)
        if self.example is not None:
            self.resize = resizable(self.model, self.example, self.longest)

    def match(self) -> MatchResult:
        known = list(self.notes)
        matched = self._match()
        if self.example is None or (matched.varied and matched.sites):
            return matched
        # Nothing depends on the second dimension, or it explains nothing: the tokens may stand in the first.
        before = dict(vars(self))
        self.time_first, self.notes = True, known
        if resizable(self.model, self.example, SHORT[0], time_first=True):
            with contextlib.suppress(CaptureError):
                other = self._match()
                if other.varied and (len(other.sites) > len(matched.sites) or not matched.varied):
                    return other
        vars(self).update(before)
        return matched

    def _match(self) -> MatchResult:
        taken = self._sizes()
        short = next(n for n in SHORT if n not in taken)
        limit = self._limit()
        if self.example is not None:
            self.resize = resizable(self.model, self.example, short, time_first=self.time_first)
        first = self._capture(short, limit)
        if first.branched:
            self._read_rope_limit(short)
        self._note_opaque(first.opaque)
        hints = {h for h in mask_lengths(first, self.catalogue) if h < min(limit, LONGEST)}
        wanted = max((*hints, 2 * short)) + 3
        while wanted in taken and wanted < limit:
            wanted += 1
        self.longest = min(wanted, limit)
        if self.proofs is not None:
            self.proofs.graphs.append(first)
        if sizes_of(self._inputs(self.longest)) == sizes_of(self._inputs(short)):
            self.notes.append("the model was captured at one size only: its inputs have no other, or it takes no other")
            return match((first,), self.catalogue, rope_limit=self.rope_limit)
        matched = match((first, self._longer(hints, limit)), self.catalogue, rope_limit=self.rope_limit)
        if matched.fixed:
            self.notes.append(f"{len(matched.fixed)} layers have one token count only ({matched.fixed[0]} …)")
        return matched

    def _read_rope_limit(self, short: int) -> None:
        """The model's code decides by the length: up to where do the rotary frequencies hold?"""
        self.rope_limit = rope_limit(self.model, self._inputs(short), short)
        if self.rope_limit is not None:
            self.notes.append(
                f"the rotary frequencies hold up to {self.rope_limit} tokens: the model takes others for longer "
                "inputs, a mixer that makes its own tables goes on with these"
            )

    def _note_opaque(self, opaque: Sequence[str]) -> None:
        if opaque:
            more = f" and {len(opaque) - 1} more" if len(opaque) > 1 else ""
            self.notes.append(f"not looked into, torch.export cannot follow it: {opaque[0]}{more}")

    def _longer(self, hints: set[int], limit: int) -> CapturedGraph:
        """The second capture. Where the model takes nothing longer than its largest constant, just below that."""
        try:
            return self._capture(self.longest, limit)
        except CaptureError:
            if not hints:
                raise
            limit = max(hints)
            self.longest = limit - 1
            return self._capture(self.longest, limit)

    def _capture(self, length: int, limit: int) -> CapturedGraph:
        inputs = self._inputs(length)
        if not self.part:
            return capture(self.model, inputs, length=length, limit=limit)
        given, closed = call_of_part(self.model, self.part, inputs)
        module = self.model.get_submodule(self.part)
        return capture(module, given, length=length, limit=limit, name=self.part, closed=closed)

    def finish(self, found: Sequence[AttentionSite], verify: bool) -> tuple[list[AttentionSite], list[NearMiss]]:
        """Sites with their calls, proved, and those for which that failed."""
        if not found:
            return [], []
        length = self._proof_length(found)
        inputs = self._inputs(length, padded=length // 3)
        owners = [s.fqn for s in found if s.place == "module"]
        records = record_calls(self.model, owners, inputs)
        caches = self._caches(owners)
        sites: list[AttentionSite] = []
        misses: list[NearMiss] = []
        for site in found:
            if site.place == "graph":
                done = self._in_graph(site, verify)
            else:
                done = self._finish_one(site, records.get(site.fqn), caches.get(site.fqn), inputs, verify)
            if isinstance(done, NearMiss):
                misses.append(done)
            else:
                sites.append(done)
        return sites, misses

    def _prove(self, site: AttentionSite, owner: nn.Module, call: Call) -> Proof:
        if self.proofs is None:
            return prove_site(site, owner, call)
        return self.proofs(site, lambda: prove_site(site, owner, call))

    def _in_graph(self, site: AttentionSite, verify: bool) -> AttentionSite | NearMiss:
        try:
            return finish_in_graph(site, self.regions.get(site.fqn), verify)
        except VerificationError as error:
            return _miss(site, "proof", str(error), MATCHED)

    def _finish_one(
        self,
        site: AttentionSite,
        record: CallRecord | None,
        cache: CacheRecord | None,
        inputs: Inputs,
        verify: bool,
    ) -> AttentionSite | NearMiss:
        if record is None:
            return _miss(site, "call", "the module is in the graph but its forward was not called", MATCHED)
        entry = find_entry(site, record)
        if isinstance(entry, str):
            return _miss(site, "call", entry, MATCHED)
        valid, positions = given_tokens(inputs, entry.batch, entry.length)
        memory_valid = None if entry.keys is None else given_tokens(inputs, entry.batch, entry.keys)[0]
        contract = derive_contract(site, record, valid, positions, cache, memory_valid=memory_valid)
        if isinstance(contract, str):
            return _miss(site, "call", contract, MATCHED)
        choices = [dataclasses.replace(site, call=c) for c in readings(contract)]
        if not verify and len(choices) == 1:
            return choices[0]
        owner = self.model.get_submodule(site.fqn)
        call = Call(args=record.args, kwargs=record.kwargs, valid=valid, positions=positions, memory_valid=memory_valid)
        for site in choices:
            try:
                proof = self._prove(site, owner, call)
                break
            except VerificationError as error:
                failure = str(error)
        else:
            return _miss(site, "proof", failure, CALLED)
        if proof.eager_error is not None and proof.eager_error > TOLERANCE:
            self.notes.append(
                f"{site.fqn}: the model runs {_implementation(self.model)!r}, whose output differs from its eager code "
                f"by {proof.eager_error:.1e}: eager is the meaning; load the model with attn_implementation='eager'"
            )
        return dataclasses.replace(site, proved=True, max_error=proof.error, dropout=max(site.dropout, proof.dropout))

    def _proof_length(self, sites: Sequence[AttentionSite]) -> int:
        heads = max(s.heads for s in sites)
        length = self.longest if self.rope_limit is None else min(self.longest, self.rope_limit)
        while 4 * 2 * heads * length * length > PROOF_BYTES and length > 64:
            length //= 2
        wide = [s for s in sites if s.mask.window is not None and s.mask.window >= length]
        if wide:
            self.notes.append(
                f"the proof ran on {length} tokens, inside the window of {len(wide)} layers; the windows themselves "
                f"were read off the masks at {self.longest} tokens"
            )
        return length

    def _inputs(self, length: int, padded: int = 0) -> Inputs:
        if self.example is not None:
            return inputs_of_length(self.example, length, padded=padded, resize=self.resize, time_first=self.time_first)
        return default_inputs(self.model, length, padded=padded)

    def _caches(self, owners: list[str]) -> dict[str, CacheRecord]:
        if not takes_cache(self.model):
            return {}
        try:
            return record_cache(self.model, owners, self._inputs(SHORT[0]))
        except Exception as error:
            self.notes.append(f"the cache argument could not be observed: {type(error).__name__}: {error}")
            return {}

    def _limit(self) -> int:
        """The longest input that the model takes."""
        stated = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return stated if isinstance(stated, int) and stated > SHORT[0] else 2**31

    def _sizes(self) -> set[int]:
        """Every size in the model: a captured length must not be one of them."""
        sizes = {d for tensor in weights_of(self.model).values() for d in tensor.shape}
        config = getattr(self.model, "config", None)
        if config is not None:
            sizes |= {v for v in vars(config).values() if isinstance(v, int)}
        return sizes


def _implementation(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "another implementation"))


def _miss(site: AttentionSite, slot: str, reason: str, passed: tuple[str, ...]) -> NearMiss:
    return NearMiss(
        fqn=site.fqn,
        slot=slot,
        reason=reason,
        source=site.source,
        progress=len(passed),
        passed=passed,
        anchor=site.anchor,
    )
