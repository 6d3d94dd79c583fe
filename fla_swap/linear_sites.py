"""The layers of a model that are linear already: found in the graph, their calls recorded, proved."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from fla_swap.captures import SHORT, TwoCaptures
from fla_swap.contract import derive_contract, find_entry
from fla_swap.errors import CaptureError, VerificationError, first_line
from fla_swap.linear_proof import prove_linear
from fla_swap.model_inputs import given_tokens
from fla_swap.ownership import read_outside
from fla_swap.patterns.cores import core_nodes
from fla_swap.patterns.graph import source_of
from fla_swap.patterns.linear import read_linear
from fla_swap.patterns.linear_owners import linear_owners
from fla_swap.patterns.parts import Stop, unread
from fla_swap.recording import CacheRecord, CallRecord, record_cache, record_calls
from fla_swap.structure import ProveOnce
from fla_swap.types import AttentionSite, NearMiss
from fla_swap.verification import Call

LENGTHS = (31, 147)
"""Tokens at which a layer is compared: within a chunk of any usual length, and across several."""


class LinearSites:
    """What `captures` (matched already) shows of linear layers: `found` and `misses`."""

    def __init__(self, captures: TwoCaptures, proofs: ProveOnce | None):
        self.captures, self.proofs, self.model = captures, proofs, captures.model
        self.found: list[AttentionSite] = []
        self.misses: list[NearMiss] = []

    def run(self, verify: bool) -> None:
        """Fill in `found` and `misses`."""
        graph = self.captures.first
        if graph is None:
            return
        try:
            owners = linear_owners(graph, [n for n, _ in core_nodes(graph, self.captures.catalogue)])
        except Exception as error:  # whatever a graph that nobody has seen does to the search
            self.captures.notes.append(f"layers that are linear already were not looked for: {unread(error)}")
            return
        read: dict[str, list[AttentionSite]] = {}
        for owner in owners:
            try:
                read[owner] = read_linear(owner, len(read), graph)
            except Stop as stop:
                self._miss(owner, stop.slot, stop.reason, source_of(stop.node))
            except Exception as error:  # whatever code that nobody has seen does to the reader
                self._miss(owner, "recurrence", unread(error), "")
        if not read:
            return
        records = [self._records(list(read), length) for length in LENGTHS]
        caches = self._caches(list(read))
        for owner, candidates in read.items():
            self._finish(candidates, [r for r in records if owner in r[0]], caches.get(owner), verify)

    def _miss(self, owner: str, slot: str, reason: str, source: str) -> None:
        reason = f"it mixes tokens without a softmax, and is no linear recurrence that is known: {reason}"
        self.misses.append(NearMiss(fqn=owner, slot=slot, reason=reason, source=source))

    def _records(self, owners: list[str], length: int) -> tuple[dict[str, CallRecord], Any]:
        """The calls of the owners in a batch of `length` tokens, one row padded; none where the model does not run."""
        with contextlib.suppress(CaptureError):
            inputs = self.captures.inputs(length, padded=length // 3)
            return record_calls(self.model, owners, inputs), inputs
        return {}, None

    def _caches(self, owners: list[str]) -> dict[str, CacheRecord]:
        try:
            return record_cache(self.model, owners, self.captures.inputs(SHORT[0]))
        except Exception as error:
            self.captures.notes.append(
                f"the cache argument could not be observed: {type(error).__name__}: {first_line(error)}"
            )
            return {}

    def _finish(
        self, candidates: list[AttentionSite], records: list[Any], cache: CacheRecord | None, verify: bool
    ) -> None:
        site, graph = candidates[0], self.captures.first
        assert graph is not None
        outside = read_outside(site.fqn, graph, self.model)
        if outside is not None or not records:
            self._miss(site.fqn, "owner", outside or "its forward was not called", site.source)
            return
        calls = []
        for known, inputs in records:
            record = known[site.fqn]
            entry = find_entry(site, record)
            if isinstance(entry, str):
                self._miss(site.fqn, "call", entry, site.source)
                return
            valid, positions = given_tokens(inputs, entry.batch, entry.length)
            contract = derive_contract(site, record, valid, positions, cache)
            if isinstance(contract, str):
                self._miss(site.fqn, "call", contract, site.source)
                return
            calls.append(Call(args=record.args, kwargs=record.kwargs, valid=valid, positions=positions))
            candidates = [dataclasses.replace(c, call=contract) for c in candidates]
        if not verify:
            self.found.append(candidates[0])
            return
        owner = self.model.get_submodule(site.fqn)
        try:
            number, error = self._once(candidates[0], lambda: prove_linear(candidates, owner, calls))
        except VerificationError as error:
            self._miss(site.fqn, "proof", str(error), site.source)
            return
        self.found.append(dataclasses.replace(candidates[number], proved=True, max_error=error))

    def _once(self, site: AttentionSite, prove: Callable[[], tuple[int, float]]) -> tuple[int, float]:
        return prove() if self.proofs is None else self.proofs(site, prove)
