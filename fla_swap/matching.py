"""CapturedGraph × recognisers → attention sites, near misses, and cores that belong to no site.

A match starts from a core and walks outwards: scores, the q, k and v paths, the output projection, the owner, the mask.
Each step that holds counts as progress; the first that does not becomes the near miss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.errors import CaptureError, NoValue
from fla_swap.patterns.base import Absent, Found, Refused
from fla_swap.patterns.catalogue import Catalogue
from fla_swap.patterns.graph import CapturedGraph, modules_of, op_name, shape, source_of
from fla_swap.patterns.heads import Heads, HeadsRefused, group, trace_heads
from fla_swap.patterns.latent import describe_latent
from fla_swap.patterns.mask import MaskRefused, MaskTable, alibi_slopes, classify, evaluate_mask, length_hints
from fla_swap.patterns.norm import NormRefused, state_norm
from fla_swap.patterns.output import (
    Boundary,
    Output,
    OutwardsRefused,
    Places,
    check_order,
    find_outwards,
    head_places,
    output_facts,
)
from fla_swap.patterns.path import Path, paths_disagree, walk_path
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.rope import same_rotation
from fla_swap.types import AttentionSite, Mask, NearMiss, Norm, Projection

MATCHED = ("core", "q", "k", "v", "output", "owner", "heads", "mask")
"""The slots that hold when a core becomes a site, in the order in which they are tried."""


class _Stop(Exception):
    """A slot of the grammar that did not hold."""

    def __init__(self, slot: str, reason: str, node: fx.Node):
        super().__init__(reason)
        self.slot, self.reason, self.node = slot, reason, node


@dataclass(frozen=True, kw_only=True)
class MatchResult:
    """Sites (not yet proved, `call` still empty), near misses (furthest first), and cores that belong to no site.

    `fixed`: the sites that had the same token counts in every graph; `varied`: whether any core had not.
    """

    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...]
    unclaimed: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    varied: bool = False


def match(graphs: Sequence[CapturedGraph], patterns: Catalogue, *, rope_limit: int | None = None) -> MatchResult:
    """Match the same model captured at two (or more) lengths; heads are traced on the first graph.

    `rope_limit`: the longest input for which the rotary frequencies of the first graph hold.

    Raises CaptureError when the graphs do not have the same cores: the model takes another path at another length.
    """
    cores = [_core_nodes(g, patterns) for g in graphs]
    if len({tuple(op_name(n) for n, _ in c) for c in cores}) != 1:
        raise CaptureError(f"at lengths {[g.length for g in graphs]} the model runs different attention code")
    sites: list[AttentionSite] = []
    misses: list[NearMiss] = []
    unclaimed: list[str] = []
    fixed: list[str] = []
    for group_ in zip(*cores, strict=True):
        nodes = [n for n, _ in group_]
        if isinstance(group_[0][1], Absent):
            unclaimed.append(_where(nodes[0]))
            continue
        attempt = _Attempt(graphs, nodes, patterns, rope_limit)
        try:
            sites.append(attempt.run(len(sites)))
            fixed += [sites[-1].fqn] if attempt.one_length else []
        except _Stop as stop:
            misses.append(attempt.near_miss(attempt.explained(stop)))
        except NoValue as unknown:
            misses.append(attempt.near_miss(_Stop("values", str(unknown), nodes[0])))
    found = [
        [_sized(g, r.facts) for (_, r), g in zip(group_, graphs, strict=True)]
        for group_ in zip(*cores, strict=True)
        if isinstance(group_[0][1], Found)
    ]
    varied = any(len({(v.length, v.keys) for v in views}) > 1 for views in found)
    misses.sort(key=lambda m: -m.progress)
    return MatchResult(
        sites=tuple(sites), near_misses=tuple(misses), unclaimed=tuple(unclaimed), fixed=tuple(fixed), varied=varied
    )


def mask_lengths(graph: CapturedGraph, patterns: Catalogue) -> set[int]:
    """Integer constants of the masks: windows and chunks are among them, so a second capture must be longer."""
    hints: set[int] = set()
    for _, result in _core_nodes(graph, patterns):
        if isinstance(result, Found):
            hints |= length_hints(result.facts["mask"], _sized(graph, result.facts))
    return hints


def _core_nodes(graph: CapturedGraph, patterns: Catalogue) -> list[tuple[fx.Node, Any]]:
    """Every fused attention or softmax over open values, with what the core recognisers say."""
    if "cores" in graph.known:
        return graph.known["cores"]
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or not graph.is_open(node):
            continue
        results = [r.match(node, graph) for r in patterns.cores]
        result = next((r for r in results if not isinstance(r, Absent)), results[0])
        if not isinstance(result, Absent) or "softmax" in op_name(node):
            found.append((node, result))
    graph.known["cores"] = found
    return found


def _sized(graph: CapturedGraph, core: Mapping[str, Any]) -> CapturedGraph:
    """The graph with the core's own query and key counts."""
    q, k = shape(core["q"]), shape(core["k"])
    assert q is not None and k is not None
    return graph.sized(length=q[-2], keys=k[-1 if core["k_transposed"] else -2])


def _where(node: fx.Node) -> str:
    modules = modules_of(node)
    return f"{modules[-1] if modules else ''} {op_name(node)} {source_of(node)}".strip()


class _Attempt:
    """One core, walked outwards. `done` are the slots that held."""

    def __init__(
        self, graphs: Sequence[CapturedGraph], nodes: Sequence[fx.Node], patterns: Catalogue, rope_limit: int | None
    ):
        self.graphs, self.nodes, self.patterns, self.rope_limit = graphs, nodes, patterns, rope_limit
        self.graph, self.node = graphs[0], nodes[0]
        self.done: list[str] = []
        self.view = self.graph
        self.one_length = False

    def near_miss(self, stop: _Stop) -> NearMiss:
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

    def explained(self, stop: _Stop) -> _Stop:
        """Where projections stand in series, that is the reason, whichever slot noticed it first."""
        modules = modules_of(self.node)
        if stop.slot not in ("q", "k", "v", "rope", "norm", "owner") or not modules:
            return stop
        latent = describe_latent(self._core(self.node, self.graph), modules[-1], self.graph)
        return stop if latent is None else _Stop("projection", latent, stop.node)

    def run(self, layer: int) -> AttentionSite:
        core = self._core(self.node, self.graph)
        self.done.append("core")
        q, k, v = (self._path(side, core, self.graph) for side in "qkv")
        disagree = paths_disagree(q, k, v)
        if disagree is not None:
            raise _Stop(*disagree, self.node)
        assert q.linear and k.linear and v.linear
        o, boundary = self._outwards(core["out"], (q.linear, k.linear, v.linear))
        hidden, memory = self._sizes(core, boundary)
        heads, rows = self._heads(core, q, k, v, boundary)
        count = len(rows["q"])
        places = head_places(core["out"], heads["q"].batch_of, count, self.view)
        after = self._after(o, places, boundary, count)
        mask, alibi = self._mask(count)
        self._same_at_every_length(q, k)
        if memory is not None:
            self._check_cross(mask, q)
        return AttentionSite(
            fqn=boundary.owner,
            layer=layer,
            q=q.linear.projection(rows["q"].flatten()),
            k=k.linear.projection(rows["k"].flatten()),
            v=v.linear.projection(rows["v"].flatten()),
            o=None if o.linear is None else _whole(o.linear),
            hidden_size=hidden,
            heads=count,
            kv_heads=len(rows["k"]),
            head_dim=rows["q"].shape[1],
            v_head_dim=rows["v"].shape[1],
            scale=core["scale"] * q.scale * k.scale,
            mask=mask,
            call=boundary.marks(time_first=self.view.time_first),
            rope=None if q.rope is None else dataclasses.replace(q.rope, limit=self.rope_limit),
            q_norm=self._norm("q", q, heads["q"], rows["q"]),
            k_norm=self._norm("k", k, heads["k"], rows["k"]),
            v_norm=self._norm("v", v, heads["v"], rows["v"]),
            clip=q.clip,
            temperature=q.temperature,
            norm_after_rope=q.norm_after_rope or k.norm_after_rope,
            softcap=core.get("softcap"),
            sinks=core.get("sinks"),
            alibi=alibi,
            dropout=core["dropout"],
            **after,
            anchor=self.node.name,
            kind="self" if memory is None else "cross",
            memory_size=memory,
            source=source_of(self.node),
        )

    def _core(self, node: fx.Node, graph: CapturedGraph) -> dict[str, Any]:
        results = dict(_core_nodes(graph, self.patterns))
        result = results[node]
        if isinstance(result, Refused):
            raise _Stop("scores", result.reason, result.node)
        return dict(result.facts)

    def _path(self, side: str, core: dict[str, Any], graph: CapturedGraph) -> Path:
        view = _sized(graph, core)
        view = view if side == "q" else view.sized(length=view.key_length)
        path = walk_path(core[side], self.patterns.path, view)
        if isinstance(path, Refused):
            raise _Stop(path.slot or side, path.reason, path.node)
        if graph is self.graph:
            self.done.append(side)
        return path

    def _outwards(self, out: fx.Node, inputs: tuple[Linear, ...]) -> tuple[Output, Boundary]:
        """What stands after the core, and the owner around it all."""
        cores = [n for n, r in _core_nodes(self.graph, self.patterns) if isinstance(r, Found)]
        try:
            found = find_outwards([out], inputs, [self.node], cores, self.graph)
        except OutwardsRefused as refused:
            self.done += ["output"] if refused.slot == "owner" else []
            raise _Stop(refused.slot, str(refused), refused.node) from refused
        self.done += ["output", "owner"]
        return found

    def _sizes(self, core: dict[str, Any], boundary: Boundary) -> tuple[int, int | None]:
        """Widths of the hidden states and of the memory; sets `view`, the graph with the site's own token counts."""
        view, hidden = _sized(self.graph, core), shape(boundary.hidden)
        if hidden is None or len(hidden) != 3 or view.length not in hidden[:2]:
            reason = f"the owner reads hidden states {hidden} for {view.length} queries, expected [batch, time, hidden]"
            raise _Stop("owner", reason, boundary.hidden)
        time_first = hidden[1] != view.length
        batch = hidden[1] if time_first else hidden[0]
        self.view = view.sized(length=view.length, keys=view.key_length, batch=batch, time_first=time_first)
        if boundary.memory is None:
            if view.key_length != view.length:
                reason = f"{view.key_length} keys for {view.length} tokens: something joins them, or they are pooled"
                raise _Stop("k", reason, self.node)
            return hidden[-1], None
        memory = shape(boundary.memory)
        wanted = (view.key_length, batch) if time_first else (batch, view.key_length)
        if memory is None or memory[:-1] != wanted:
            reason = f"keys and values are made of a tensor {memory}, expected {list(wanted)} and a width"
            raise _Stop("owner", reason, boundary.memory)
        return hidden[-1], memory[-1]

    def _check_cross(self, mask: Mask, q: Path) -> None:
        if mask.kind != "bidirectional":
            raise _Stop("mask", f"a cross-attention under a {mask.kind} mask", self.node)
        if q.rope is not None:
            raise _Stop("rope", "a cross-attention whose queries and keys are rotated", self.node)

    def _heads(
        self, core: dict[str, Any], q: Path, k: Path, v: Path, boundary: Boundary
    ) -> tuple[dict[str, Heads], dict[str, Tensor]]:
        heads: dict[str, Heads] = {}
        for side, path in (("q", q), ("k", k), ("v", v)):
            assert path.linear is not None
            flipped = side == "k" and core["k_transposed"]
            entry, view = boundary.hidden, self.view
            if side != "q":
                entry = boundary.memory or boundary.hidden
                view = view.sized(length=view.key_length, batch=view.batch, time_first=view.time_first)
            try:
                heads[side] = trace_heads(
                    path.linear,
                    entry,
                    core[side],
                    path.same,
                    view,
                    transposed=flipped,
                    also=None if path.norm is None else path.norm.x,
                )
            except HeadsRefused as refused:
                raise _Stop(side, str(refused), path.linear.out) from refused
        count = len(heads["q"].rows)
        rows = {"q": heads["q"].rows}
        repeats = {}
        for side in "kv":
            try:
                rows[side], repeats[side] = group(heads[side].rows, count)
            except HeadsRefused as refused:
                raise _Stop(side, str(refused), self.node) from refused
        if repeats["k"] != repeats["v"]:
            raise _Stop("v", f"keys are shared by {repeats['k']} query heads, values by {repeats['v']}", self.node)
        self.done.append("heads")
        return heads, rows

    def _after(self, o: Output, places: Places, boundary: Boundary, heads: int) -> dict[str, Any]:
        reason = check_order(o, places, boundary.end, self.view)
        if reason is not None:
            raise _Stop("output", reason, o.out)
        facts = output_facts(o, places, boundary.hidden, heads, self.view)
        if isinstance(facts, Refused):
            raise _Stop("output", facts.reason, facts.node)
        return facts

    def _tables(self) -> list[MaskTable]:
        """What the mask is at each length."""
        tables = []
        for node, graph in zip(self.nodes, self.graphs, strict=True):
            core = self._core(node, graph)
            view = _sized(graph, core)
            view = view.sized(length=view.length, keys=view.key_length, batch=self.view.batch)
            key = ("mask", view.batch, view.length, view.keys, core["causal"], *core["mask"])
            if key not in graph.known:
                graph.known[key] = evaluate_mask(core["mask"], core["causal"], view)
            tables.append(graph.known[key])
        return tables

    def _mask(self, heads: int) -> tuple[Mask, tuple[float, ...] | None]:
        try:
            tables = self._tables()
            mask = classify(tables)
            alibi = alibi_slopes(tables[0], heads)
        except MaskRefused as refused:
            raise _Stop("mask", str(refused), self.node) from refused
        self.one_length = len({t.seen.shape for t in tables}) == 1
        if mask.kind != "bidirectional" and self.one_length:
            reason = (
                f"the model was captured at one length only ({tables[0].seen.shape[0]} tokens): whether the mask is "
                f"{mask.kind} at every length cannot be told"
            )
            raise _Stop("mask", reason, self.node)
        longest = max(t.seen.shape[1] for t in tables)
        hints = length_hints(self._core(self.nodes[0], self.graph)["mask"], self.view)
        if mask.kind == "causal" and any(longest <= h < self.graphs[-1].limit for h in hints):
            reason = f"the mask uses a constant {max(hints)}, beyond the longest length that was evaluated ({longest})"
            raise _Stop("mask", reason, self.node)
        self.done.append("mask")
        return mask, alibi

    def _norm(self, side: str, path: Path, heads: Heads, rows: Tensor) -> Norm | None:
        if path.norm is None:
            return None
        assert path.linear is not None and heads.rows_at is not None
        try:
            return state_norm(path.norm, heads.rows_at, rows)
        except NormRefused as refused:
            raise _Stop("norm", f"the norm of {side} {refused}", path.linear.out) from refused

    def _same_at_every_length(self, q: Path, k: Path) -> None:
        """Frequencies and scales that depend on the length (dynamic scaling) cannot be stated in a site."""
        first = self._core(self.node, self.graph)
        for node, graph in zip(self.nodes[1:], self.graphs[1:], strict=True):
            core = self._core(node, graph)
            other_q, other_k = self._path("q", core, graph), self._path("k", core, graph)
            holds = self.rope_limit is None or graph.length <= self.rope_limit
            if holds and not (same_rotation(other_q.rope, q.rope) and same_rotation(other_k.rope, k.rope)):
                raise _Stop("rope", "the rotary frequencies depend on the length", node)
            scales = (core["scale"], other_q.scale, other_k.scale, core.get("softcap"))
            if scales != (first["scale"], q.scale, k.scale, first.get("softcap")):
                raise _Stop("scale", "the scale of the scores depends on the length", node)


def _whole(linear: Linear) -> Projection:
    return linear.projection(torch.arange(linear.outputs))
