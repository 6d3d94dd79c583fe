"""What a matched site lacks: how its module is called, and the proof. A site that fails becomes a near miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from fla_swap.captures import SHORT, TwoCaptures
from fla_swap.contract import derive_contract, find_entry, readings, rounded_alibi
from fla_swap.errors import CaptureError, FlaSwapError, VerificationError, first_line
from fla_swap.graph_proof import finish_in_graph, forget_random
from fla_swap.matching import MATCHED
from fla_swap.model_inputs import Inputs, given_tokens, takes_cache
from fla_swap.ownership import read_outside
from fla_swap.patterns.parts import unread
from fla_swap.patterns.region import Region
from fla_swap.recording import CacheRecord, CallRecord, record_cache, record_calls
from fla_swap.structure import ProveOnce
from fla_swap.types import AttentionSite, NearMiss
from fla_swap.verification import TOLERANCE, Call, Proof, prove

PROOF_BYTES = 2**30
LONGEST_GRAPH_PROOF = 512
CALLED = (*MATCHED, "call")


class Finisher:
    """Records the calls of the sites' modules in eager code, and proves the sites."""

    def __init__(self, captures: TwoCaptures, regions: Mapping[str, Region], proofs: ProveOnce | None):
        self.captures, self.regions, self.proofs = captures, regions, proofs
        self.model, self.notes = captures.model, captures.notes

    def finish(self, found: Sequence[AttentionSite], verify: bool) -> tuple[list[AttentionSite], list[NearMiss]]:
        """Sites with their calls, proved, and those for which that failed."""
        if not found:
            return [], []
        length = self._proof_length(found)
        inputs = self.captures.inputs(length, padded=length // 3)
        owners = [s.fqn for s in found if s.place == "module"]
        self.regions = self._lengthened(length)
        records = record_calls(self.model, owners, inputs)
        caches = self._caches(owners)
        sites: list[AttentionSite] = []
        misses: list[NearMiss] = []
        for site in found:
            try:
                if site.place == "graph":
                    done = self._in_graph(site, verify, length)
                else:
                    done = self._finish_one(site, records.get(site.fqn), caches.get(site.fqn), inputs, verify)
            except FlaSwapError:
                raise
            except Exception as error:  # whatever a module that nobody has seen does to the proof
                done = _miss(site, "proof", unread(error), MATCHED)
            if isinstance(done, NearMiss):
                misses.append(done)
            else:
                sites.append(done)
        for region in self.regions.values():
            forget_random(region.graph)
        return sites, misses

    def _lengthened(self, length: int) -> dict[str, Region]:
        """The regions in a graph of the proof's length, where that has the same nodes."""
        lengths = {r.graph.length for r in self.regions.values()}
        if not lengths or max(lengths) >= length:
            return dict(self.regions)
        second = self.captures.second
        if second is not None and length <= second.length <= LONGEST_GRAPH_PROOF:
            moved = {name: region.at(second) for name, region in self.regions.items()}
            if all(region.graph is second for region in moved.values()):
                return moved
        try:
            graph = self.captures.capture(length)
        except CaptureError:  # the proof refuses where the short graph lies within the window
            return dict(self.regions)
        return {name: region.at(graph) for name, region in self.regions.items()}

    def _prove(self, site: AttentionSite, owner: nn.Module, call: Call) -> Proof:
        if self.proofs is None:
            return prove(site, owner, call)
        return self.proofs(site, lambda: prove(site, owner, call))

    def _in_graph(self, site: AttentionSite, verify: bool, length: int) -> AttentionSite | NearMiss:
        region = self.regions.get(site.fqn)
        if region is not None and region.graph.length < length and (site.mask.window or 0) >= region.graph.length:
            reason = (
                f"{site.fqn}: the graph could be run on {region.graph.length} tokens only, inside its window of "
                f"{site.mask.window}: at {length} tokens it has other nodes"
            )
            return _miss(site, "proof", reason, MATCHED)
        try:
            return finish_in_graph(site, region, verify)
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
        outside = read_outside(site.fqn, self.captures.first, self.model) if self.captures.first is not None else None
        if outside is not None:
            return _miss(site, "owner", outside, MATCHED[: MATCHED.index("owner")])
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
            rounded = rounded_alibi(site, record, valid)
            return _miss(site, "proof", failure if rounded is None else f"{rounded} ({failure})", CALLED)
        if proof.eager_error is not None and proof.eager_error > TOLERANCE:
            self.notes.append(
                f"{site.fqn}: the model runs {_implementation(self.model)!r}, whose output differs from its eager code "
                f"by {proof.eager_error:.1e}: eager is the meaning; load the model with attn_implementation='eager'"
            )
        if proof.call_reason is not None:
            return _miss(site, "call", proof.call_reason, MATCHED)
        for p, size in proof.lost_dropout:
            where = f"{p:g} of a tensor {list(size)} inside it"
            self.notes.append(f"{site.fqn}: training mode drops {where}, which a mixer in its place does not do")
        return dataclasses.replace(
            site,
            proved=True,
            max_error=proof.error,
            dropout=max(site.dropout, proof.dropout),
            output_dropout=proof.output_dropout,
            call=dataclasses.replace(site.call, own_mask=proof.own_mask, unmasked=proof.unmasked),
        )

    def _proof_length(self, sites: Sequence[AttentionSite]) -> int:
        heads = max(s.heads for s in sites)
        length, checked = self.captures.longest, self.captures.checked or self.captures.longest
        length = max(length, min(checked, max((s.mask.window or 0 for s in sites), default=0) + 3))
        if self.captures.rope_limit is not None:
            length = min(length, self.captures.rope_limit)
        while 4 * 2 * heads * length * length > PROOF_BYTES and length > 64:
            length //= 2
        wide = [s for s in sites if s.mask.window is not None and s.mask.window >= length]
        if wide:
            self.notes.append(
                f"the proof ran on {length} tokens, inside the window of {len(wide)} layers; the windows themselves "
                f"were read off the masks at {checked} tokens"
            )
        return length

    def _caches(self, owners: list[str]) -> dict[str, CacheRecord]:
        if not takes_cache(self.model):
            return {}
        try:
            return record_cache(self.model, owners, self.captures.inputs(SHORT[0]))
        except Exception as error:
            self.notes.append(f"the cache argument could not be observed: {type(error).__name__}: {first_line(error)}")
            return {}


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
