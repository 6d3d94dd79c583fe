"""CapturedGraph × recognisers → attention sites, near misses, and cores that belong to no site.

A match starts from a core and walks outwards: scores, the q, k and v paths, the output projection, the owner, the mask.
Each step that holds counts as progress; the first that does not becomes the near miss.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.errors import CaptureError, FlaSwapError, NoValue
from fla_swap.patterns.base import Found, Refused
from fla_swap.patterns.catalogue import Catalogue
from fla_swap.patterns.cores import Failed, core_facts, core_nodes, groups, sized, token_counts, where
from fla_swap.patterns.graph import CapturedGraph, NotLayout, modules_of, op_name, shape, source_of
from fla_swap.patterns.heads import HeadsRefused, number_outputs, read_order
from fla_swap.patterns.latent import name_series
from fla_swap.patterns.output import Boundary, Output, OutwardsRefused, Places, check_order, output_facts
from fla_swap.patterns.parts import Part, Stop, agree, unread
from fla_swap.patterns.path import Path, paths_disagree, projected_elsewhere, walk_path
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.region import Region, apart_by_factor, find_place, separate
from fla_swap.patterns.rope import same_rotation
from fla_swap.patterns.site_heads import join_projections, norm_of, number_heads
from fla_swap.patterns.site_masks import read_masks
from fla_swap.types import AttentionSite, Mask, NearMiss

MATCHED = ("core", "q", "k", "v", "output", "owner", "heads", "mask")
"""The slots that hold when a core becomes a site, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class MatchResult:
    """Sites (not yet proved, `call` still empty), near misses (furthest first), and cores that belong to no site.

    `fixed`: the sites that had the same token counts in every graph; `varied`: whether any core had not.
    `regions`: where the sites without a module of their own stand.
    """

    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...]
    unclaimed: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    varied: bool = False
    regions: Mapping[str, Region] = field(default_factory=dict)


def match(
    graphs: Sequence[CapturedGraph],
    patterns: Catalogue,
    *,
    rope_limit: int | None = None,
    passing: tuple[type[Exception], ...] = (),
) -> MatchResult:
    """Match the same model captured at two (or more) lengths; heads are traced on the first graph.

    `rope_limit`: the longest input for which the rotary frequencies of the first graph hold. `passing`: errors of the
    graph's own code that the caller wants to see; any other makes a near miss of the core that it happened at.

    Raises CaptureError when the graphs do not have the same cores: the model takes another path at another length.
    """
    cores = [core_nodes(g, patterns) for g in graphs]
    for failed in (r.error for c in cores for _, r in c if isinstance(r, Failed)):
        if isinstance(failed, passing):
            raise failed
    if len({tuple(op_name(n) for n, _ in c) for c in cores}) != 1:
        raise CaptureError(_other_code(cores, graphs))
    found: list[tuple[AttentionSite, Boundary, bool]] = []
    misses: list[NearMiss] = []
    unclaimed: list[str] = []
    fixed: list[str] = []
    for members in groups(list(zip(*cores, strict=True)), graphs[0], unclaimed):
        attempt = _Attempt(graphs, members, patterns, rope_limit)
        try:
            site, boundary = attempt.run(len(found))
            found.append((site, boundary, attempt.alone))
            fixed += [site.fqn] if attempt.one_length else []
        except Stop as stop:
            misses.append(attempt.near_miss(attempt.explained(stop)))
        except NoValue as unknown:
            misses.append(attempt.near_miss(Stop("values", str(unknown), members[0][0])))
        except (FlaSwapError, *passing):
            raise
        except Exception as error:  # whatever code that nobody has seen does to the matcher
            misses.append(attempt.near_miss(Stop("matcher", unread(error), members[0][0])))
    varied = any(len({(v.length, v.keys) for v in views}) > 1 for views in token_counts(cores, graphs))
    sites, regions = separate(found, graphs[0])
    misses.sort(key=lambda m: -m.progress)
    return MatchResult(
        sites=tuple(sites),
        near_misses=tuple(misses),
        unclaimed=tuple(unclaimed),
        fixed=tuple(fixed),
        varied=varied,
        regions=regions,
    )


def _other_code(cores: Sequence[Sequence[tuple[fx.Node, Any]]], graphs: Sequence[CapturedGraph]) -> str:
    """Which softmaxes and products a model runs at one length only, and where they stand."""
    places = [Counter((where(n), op_name(n)) for n, _ in found) for found in cores]
    told = []
    for own, graph in zip(places, graphs, strict=True):
        others = [p for p in places if p is not own]
        alone = [place for (place, _), count in own.items() if any(other[place, _] < count for other in others)]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            told.append(f"at {graph.length} tokens alone {alone[0]}{more}")
    found = "; ".join(told) or "the same softmaxes in another order"
    return (
        f"the model runs different attention code at {' and '.join(str(g.length) for g in graphs)} tokens ({found}): "
        "what a site states must hold at every length"
    )


class _Attempt:
    """The cores of one attention (mostly one), walked outwards. `done` are the slots that held."""

    def __init__(
        self,
        graphs: Sequence[CapturedGraph],
        members: Sequence[Sequence[fx.Node]],
        patterns: Catalogue,
        rope_limit: int | None,
    ):
        self.graphs, self.members, self.patterns, self.rope_limit = graphs, members, patterns, rope_limit
        self.graph, self.node = graphs[0], members[0][0]
        self.done: list[str] = []
        self.view = self.graph
        self.one_length = False
        self.alone = True

    def near_miss(self, stop: Stop) -> NearMiss:
        modules = modules_of(self.node)
        return NearMiss(
            fqn=modules[-1] if modules else "",
            slot=stop.slot,
            reason=stop.reason,
            source=source_of(stop.node) or source_of(self.node),
            progress=len(self.done),
            passed=tuple(self.done),
            anchor=self.node.name,
        )

    def explained(self, stop: Stop) -> Stop:
        """Where projections stand in series, that is the reason, whichever slot noticed it first."""
        modules = modules_of(self.node)
        if stop.slot not in ("q", "k", "v", "rope", "norm", "owner") or not modules:
            return stop
        named = name_series(core_facts(self.node, self.graph, self.patterns), modules[-1], stop.slot, self.graph)
        return stop if named is None else Stop("projection", named[0], named[1] or stop.node)

    def run(self, layer: int) -> tuple[AttentionSite, Boundary]:
        parts = self._parts()
        first = parts[0]
        linears = [linear for p in parts for x in (p.q, p.k, p.v) if (linear := x.linear) is not None]
        o, boundary = self._outwards([p.core["out"] for p in parts], linears)
        if o.sinks is not None:
            if len(parts) > 1 or "sinks" in first.core:
                raise Stop("output", "a second set of sinks, or one in a loop over the heads", o.out)
            first.core["sinks"] = o.sinks
        hidden, memory = self._sizes(first.core, boundary)
        parts = [number_heads(p, boundary, self.view) for p in parts]
        first = parts[0]
        order, after = self._after(parts, o, boundary)
        q, k = first.q, first.k
        projections, rows = join_projections(parts, order)
        self.done.append("heads")
        mask, alibi, self.one_length = read_masks(parts, order, self.graphs, self.view, self.patterns)
        self.done.append("mask")
        self._same_at_every_length(parts)
        if memory is not None:
            self._check_cross(mask, q, boundary)
        site = AttentionSite(
            fqn=boundary.owner,
            layer=layer,
            q=projections["q"],
            k=projections["k"],
            v=projections["v"],
            o=None if o.linear is None else o.linear.projection(torch.arange(o.linear.outputs)),
            hidden_size=hidden,
            heads=len(rows["q"]),
            kv_heads=len(rows["k"]),
            head_dim=rows["q"].shape[1],
            v_head_dim=rows["v"].shape[1],
            scale=first.core["scale"] * q.scale * k.scale,
            mask=mask,
            call=boundary.marks(time_first=self.view.time_first),
            rope=None if q.rope is None else dataclasses.replace(q.rope, limit=self.rope_limit),
            q_norm=norm_of("q", parts, rows),
            k_norm=norm_of("k", parts, rows),
            v_norm=norm_of("v", parts, rows),
            v_scale=first.v.scale,
            clip=q.clip,
            temperature=q.temperature,
            norm_after_rope=q.norm_after_rope or k.norm_after_rope,
            softcap=first.core.get("softcap"),
            sinks=first.core.get("sinks"),
            alibi=alibi,
            dropout=first.core["dropout"],
            **after,
            anchor=self.node.name,
            kind="self" if memory is None else "cross",
            memory_size=memory,
            source=source_of(self.node),
        )
        return site, boundary

    def _parts(self) -> list[Part]:
        parts = []
        for nodes in self.members:
            core = core_facts(nodes[0], self.graph, self.patterns)
            if not parts:
                self.done.append("core")
            q, k, v = (self._path(side, core, self.graph) for side in "qkv")
            disagree = paths_disagree(q, k, v)
            if disagree is not None:
                raise Stop(*disagree, nodes[0])
            parts.append(Part(nodes=tuple(nodes), core=core, q=q, k=k, v=v))
        for part in parts[1:]:
            if not agree(parts[0], part):
                raise Stop("core", "the heads differ in more than their projections", part.nodes[0])
        return parts

    def _path(self, side: str, core: dict[str, Any], graph: CapturedGraph) -> Path:
        view = sized(graph, core)
        view = view if side == "q" else view.sized(length=view.key_length)
        path = walk_path(core[side], self.patterns.path, view)
        if isinstance(path, Refused):
            raise Stop(path.slot or side, path.reason, path.node)
        if graph is self.graph and side not in self.done:
            self.done.append(side)
        return path

    def _outwards(self, outs: Sequence[fx.Node], inputs: Sequence[Linear]) -> tuple[Output, Boundary]:
        """What stands after the cores, and the owner around it all."""
        own = [projected_elsewhere(m[0], inputs[3 * i : 3 * i + 3]) for i, m in enumerate(self.members)]
        if (elsewhere := next((reason for reason in own if reason is not None), None)) is not None:
            raise Stop("owner", elsewhere, self.node)
        cores = [n for n, r in core_nodes(self.graph, self.patterns) if isinstance(r, Found)]
        try:
            output, boundary, self.alone = find_place(outs, inputs, [m[0] for m in self.members], cores, self.graph)
        except OutwardsRefused as refused:
            self.done += ["output"] if refused.slot == "owner" else []
            raise Stop(refused.slot, str(refused), refused.node) from refused
        self.done += ["output", "owner"]
        return output, boundary

    def _sizes(self, core: dict[str, Any], boundary: Boundary) -> tuple[int, int | None]:
        """Widths of the hidden states and of the memory; sets `view`, the graph with the site's own token counts."""
        view, hidden = sized(self.graph, core), shape(boundary.hidden)
        if hidden is None or len(hidden) != 3 or view.length not in hidden[:2]:
            reason = f"the owner reads hidden states {hidden} for {view.length} queries, expected [batch, time, hidden]"
            raise Stop("owner", reason, boundary.hidden)
        time_first = hidden[1] != view.length
        batch = hidden[1] if time_first else hidden[0]
        self.view = view.sized(length=view.length, keys=view.key_length, batch=batch, time_first=time_first)
        if boundary.memory is None:
            if view.key_length != view.length:
                reason = f"{view.key_length} keys for {view.length} tokens: something joins them, or they are pooled"
                raise Stop("k", reason, self.node)
            return hidden[-1], None
        memory = shape(boundary.memory)
        wanted = (view.key_length, batch) if time_first else (batch, view.key_length)
        if memory is None or memory[:-1] != wanted:
            reason = f"keys and values are made of a tensor {memory}, expected {list(wanted)} and a width"
            raise Stop("owner", reason, boundary.memory)
        return hidden[-1], memory[-1]

    def _check_cross(self, mask: Mask, q: Path, boundary: Boundary) -> None:
        if (factor := apart_by_factor(boundary, self.graph)) is not None:
            raise Stop("owner", factor, self.node)
        if mask.kind != "bidirectional":
            raise Stop("mask", f"a cross-attention under a {mask.kind} mask", self.node)
        if q.rope is not None:
            raise Stop("rope", "a cross-attention whose queries and keys are rotated", self.node)

    def _after(self, parts: Sequence[Part], o: Output, boundary: Boundary) -> tuple[Tensor, dict[str, Any]]:
        """The heads, numbered one part after the other, in the order of the output projection; what follows them."""
        outs = [(p.core["out"], p.tables) for p in parts]
        total, width = sum(len(p.tables.q) for p in parts), parts[0].tables.v.shape[-1]
        places = Places(known=number_outputs(outs), width=total * width)
        try:
            order = read_order(places.at(o.x, o.same, self.view)[1], total)
        except HeadsRefused as refused:
            raise Stop("output", str(refused), o.out) from refused
        except NotLayout as stop:
            reason = f"the heads are joined with what {op_name(stop.node)} gives, which is no attention"
            raise Stop("output", reason, stop.node) from stop
        places = Places(known=number_outputs(outs, order), width=total * width)
        reason = check_order(o, places, boundary.end, self.view)
        if reason is not None:
            raise Stop("output", reason, o.out)
        facts = output_facts(o, places, boundary.hidden, total, self.view)
        if isinstance(facts, Refused):
            raise Stop("output", facts.reason, facts.node)
        return order, facts

    def _same_at_every_length(self, parts: Sequence[Part]) -> None:
        """What depends on the length (dynamic scaling, a limited number of keys) cannot be stated in a site."""
        for part in parts:
            q, k = (part.k, part.q) if part.tables.swapped else (part.q, part.k)
            for node, graph in zip(part.nodes[1:], self.graphs[1:], strict=True):
                at = f"depends on the length (compared: {self.graph.length} and {graph.length} tokens)"
                core, first = (
                    core_facts(node, graph, self.patterns),
                    core_facts(part.nodes[0], self.graph, self.patterns),
                )
                other_q, other_k, other_v = (self._path(side, core, graph) for side in "qkv")
                for side, path, before in (("q", other_q, q), ("k", other_k, k), ("v", other_v, part.v)):
                    if path.tokens_of(core[side]) != before.tokens_of(first[side]):
                        raise Stop(side, f"which tokens have their own {side} {at}", node)
                    if path.steps != before.steps or path.clip != before.clip or path.scale != before.scale:
                        raise Stop("scale", f"what scales {side} after its projection {at}", node)
                    if path.temperature != before.temperature:
                        raise Stop("temperature", f"the scale of {side} by position {at}", node)
                holds = self.rope_limit is None or graph.length <= self.rope_limit
                if holds and not (same_rotation(other_q.rope, q.rope) and same_rotation(other_k.rope, k.rope)):
                    raise Stop("rope", f"what the rotary frequencies are {at}", node)
                if (core["scale"], core.get("softcap")) != (first["scale"], first.get("softcap")):
                    raise Stop("scale", f"the scale of the scores {at}", node)
