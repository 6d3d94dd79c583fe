"""`inspect`: capture → match → record the calls → prove. The only module that composes these stages."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.capture import Inputs, capture, default_inputs, inputs_of_length
from fla_swap.contract import CacheRecord, CallRecord, derive_contract, record_cache, record_calls
from fla_swap.errors import CaptureError, NoAttentionFound, VerificationError
from fla_swap.matching import MATCHED, MatchResult, mask_lengths, match
from fla_swap.patterns.base import Recogniser
from fla_swap.patterns.catalogue import catalogue
from fla_swap.patterns.graph import CapturedGraph
from fla_swap.types import AttentionReport, AttentionSite, NearMiss
from fla_swap.verification import TOLERANCE, Call, check_config, prove, weights_of

Example = Mapping[str, Any] | Sequence[Any] | Tensor
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
) -> AttentionReport:
    """Find every attention layer of `model` that can be rebuilt from its facts, and prove each.

    Args:
        model: any nn.Module with weights; it is exported and called, and left as it was.
        example_inputs: for a model whose forward does not take `input_ids`: one call's arguments (a mapping, a sequence
            or a tensor), tensors [B, T, …]. They are repeated or cut to other lengths.
        patterns: recognisers of your own, tried before the built-in ones. None: those of installed packages (entry
            points of the group "fla_swap.recognisers"); so `patterns=()` leaves the built-in ones alone.
        strict: raise NoAttentionFound (the report is in `.report`) when there is no site.
        verify: prove the sites; without it they are returned with `proved=False`.
    Raises:
        CaptureError: `torch.export` cannot follow the model. NoAttentionFound: see `strict`.
        VerificationError: the sites disagree with the model's own config.
    """
    start = time.perf_counter()
    session = _Inspection(model, example_inputs, patterns)
    matched = session.match()
    sites, misses, notes = session.finish(matched, verify)
    report = AttentionReport(
        model=type(model).__name__,
        sites=tuple(sites),
        near_misses=tuple(sorted((*misses, *matched.near_misses), key=lambda m: -m.progress)),
        unclaimed=matched.unclaimed,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )
    if strict and not report.sites:
        raise NoAttentionFound(_nothing_found(report), report)
    config = getattr(model, "config", None)
    if config is not None:
        check_config(report.sites, config)
    return report


def _nothing_found(report: AttentionReport) -> str:
    if not report.near_misses:
        more = f"; its softmaxes are {list(report.unclaimed)}" if report.unclaimed else ""
        return f"{report.model} has no attention: no fused attention call, and no softmax between two products{more}"
    first = report.near_misses[0]
    count = len(report.near_misses)
    return (
        f"{report.model}: {count} attention cores, none understood. The one that got furthest, {first.fqn}, stopped at "
        f"{first.slot!r}: {first.reason} ({first.source}). All of them are in the error's .report.near_misses; "
        "a recogniser of your own can be passed as patterns="
    )


class _Inspection:
    def __init__(self, model: nn.Module, example: Example | None, patterns: Iterable[Recogniser] | None):
        self.model, self.example = model, example
        self.catalogue = catalogue(patterns)
        self.longest = 0

    def match(self) -> MatchResult:
        taken = self._sizes()
        short = next(n for n in SHORT if n not in taken)
        limit = self._limit()
        first = capture(self.model, self._inputs(short), length=short, limit=limit)
        hints = {h for h in mask_lengths(first, self.catalogue) if h < min(limit, LONGEST)}
        wanted = max((*hints, 2 * short)) + 3
        while wanted in taken and wanted < limit:
            wanted += 1
        self.longest = min(wanted, limit)
        second = self._longer(hints, limit)
        return match((first, second), self.catalogue)

    def _longer(self, hints: set[int], limit: int) -> CapturedGraph:
        """The second capture. Where the model takes nothing longer than its largest constant, just below that."""
        try:
            return capture(self.model, self._inputs(self.longest), length=self.longest, limit=limit)
        except CaptureError:
            if not hints:
                raise
            limit = max(hints)
            self.longest = limit - 1
            return capture(self.model, self._inputs(self.longest), length=self.longest, limit=limit)

    def finish(self, matched: MatchResult, verify: bool) -> tuple[list[AttentionSite], list[NearMiss], list[str]]:
        if not matched.sites:
            return [], [], []
        length, notes = self._proof_length(matched.sites)
        inputs = self._inputs(length, padded=length // 3)
        valid, positions = self._given(inputs, length)
        owners = [s.fqn for s in matched.sites]
        records = record_calls(self.model, owners, inputs)
        caches = self._caches(owners, notes)
        sites: list[AttentionSite] = []
        misses: list[NearMiss] = []
        for site in matched.sites:
            found = self._finish_one(site, records.get(site.fqn), caches.get(site.fqn), valid, positions, verify, notes)
            if isinstance(found, NearMiss):
                misses.append(found)
            else:
                sites.append(dataclasses.replace(found, layer=len(sites)))
        return sites, misses, notes

    def _finish_one(
        self,
        site: AttentionSite,
        record: CallRecord | None,
        cache: CacheRecord | None,
        valid: Tensor,
        positions: Tensor | None,
        verify: bool,
        notes: list[str],
    ) -> AttentionSite | NearMiss:
        if record is None:
            return _miss(site, "call", "the module is in the graph but its forward was not called", MATCHED)
        contract = derive_contract(site, record, valid, positions, cache)
        if isinstance(contract, str):
            return _miss(site, "call", contract, MATCHED)
        site = dataclasses.replace(site, call=contract)
        if not verify:
            return site
        owner = self.model.get_submodule(site.fqn)
        call = Call(args=record.args, kwargs=record.kwargs, valid=valid, positions=positions)
        try:
            proof = prove(site, owner, call)
        except VerificationError as error:
            return _miss(site, "proof", str(error), CALLED)
        if proof.eager_error is not None and proof.eager_error > TOLERANCE:
            notes.append(
                f"{site.fqn}: the model runs {_implementation(self.model)!r}, whose output differs from its eager code "
                f"by {proof.eager_error:.1e}: eager is the meaning; load the model with attn_implementation='eager'"
            )
        return dataclasses.replace(site, proved=True, max_error=proof.error, dropout=max(site.dropout, proof.dropout))

    def _proof_length(self, sites: Sequence[AttentionSite]) -> tuple[int, list[str]]:
        heads = max(s.heads for s in sites)
        length = self.longest
        while 4 * 2 * heads * length * length > PROOF_BYTES and length > 64:
            length //= 2
        wide = [s for s in sites if s.mask.window is not None and s.mask.window >= length]
        if not wide:
            return length, []
        return length, [
            f"the proof ran on {length} tokens, inside the window of {len(wide)} layers; the windows themselves were "
            f"read off the masks at {self.longest} tokens"
        ]

    def _inputs(self, length: int, padded: int = 0) -> Inputs:
        if self.example is not None:
            return inputs_of_length(self.example, length, padded=padded)
        return default_inputs(self.model, length, padded=padded)

    def _given(self, inputs: Inputs, length: int) -> tuple[Tensor, Tensor | None]:
        """bool [B, T] of the tokens that are no padding, and the positions that the model was given."""
        kwargs = inputs[1]
        mask = kwargs.get("attention_mask")
        some = next(v for v in (*inputs[0], *kwargs.values()) if isinstance(v, Tensor))
        valid = torch.ones(some.shape[0], length, dtype=torch.bool, device=some.device)
        if isinstance(mask, Tensor) and mask.shape == valid.shape:
            valid = mask.bool()
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=some.device).expand(some.shape[0], length)
        return valid, positions

    def _caches(self, owners: list[str], notes: list[str]) -> dict[str, CacheRecord]:
        if "past_key_values" not in python_inspect.signature(self.model.forward).parameters:
            return {}
        try:
            return record_cache(self.model, owners, self._inputs(SHORT[0]))
        except Exception as error:
            notes.append(f"the cache argument could not be observed: {type(error).__name__}: {error}")
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
