"""The mask and the ALiBi slopes of one attention: what all its heads, at every captured length, agree on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fla_swap.patterns.catalogue import Catalogue
from fla_swap.patterns.cores import core_facts, sized
from fla_swap.patterns.graph import CapturedGraph, shape
from fla_swap.patterns.hints import spelled
from fla_swap.patterns.mask import MaskTable, alibi_slopes, classify, evaluate_mask, length_hints
from fla_swap.patterns.mask_kinds import MaskRefused
from fla_swap.patterns.parts import Part, Stop
from fla_swap.types import Mask


def read_masks(
    parts: Sequence[Part],
    order: Tensor,
    graphs: Sequence[CapturedGraph],
    view: CapturedGraph,
    patterns: Catalogue,
) -> tuple[Mask, tuple[float, ...] | None, bool]:
    """(the mask, the slopes of all heads or None, whether the site has one token count in every graph).

    `order`: the heads in the order of the output projection. `view`: the first graph as the site sees it. Raises
    `Stop` when the mask is none that a site can state, or the heads have different ones.
    """
    node = parts[0].nodes[0]
    found = [_read_mask(p, graphs, view, patterns) for p in parts]
    mask, slopes, one_length = found[0][0], [a for _, a, _ in found], all(one for *_, one in found)
    if any(other != mask for other, *_ in found):
        raise Stop("mask", "the heads have different masks", node)
    fixed = any(a is not None for a in slopes) or parts[0].core.get("sinks") is not None
    if fixed and len(order) > 1 and not bool((order.diff() == 1).all()):
        raise Stop("output", "the heads enter the output projection in another order than the queries", node)
    if all(a is None for a in slopes):
        return mask, None, one_length
    together = tuple(x for p, a in zip(parts, slopes, strict=True) for x in a or (0.0,) * len(p.tables.q))
    return mask, together, one_length


def _read_mask(
    part: Part, graphs: Sequence[CapturedGraph], view: CapturedGraph, patterns: Catalogue
) -> tuple[Mask, tuple[float, ...] | None, bool]:
    node = part.nodes[0]
    try:
        tables = [_table(part, n, g, view, patterns) for n, g in zip(part.nodes, graphs, strict=True)]
        mask, alibi = _kind(tables, len(part.tables.q), graphs[0])
    except MaskRefused as refused:
        raise Stop("mask", str(refused), node) from refused
    one_length = len({t.seen.shape for t in tables}) == 1
    if mask.kind != "bidirectional" and one_length:
        reason = (
            f"the model was captured at one length only ({tables[0].seen.shape[0]} tokens): whether the mask is "
            f"{mask.kind} at every length cannot be told"
        )
        raise Stop("mask", reason, node)
    longest = max(t.seen.shape[1] for t in tables)
    hints = length_hints(part.core["mask"], view)
    open_ended = mask.kind in ("causal", "bidirectional") and not one_length
    if open_ended and any(longest <= h < graphs[-1].limit for h in hints):
        reason = f"the mask uses a constant {max(hints)}, beyond the longest length that was evaluated ({longest})"
        raise Stop("mask", reason, node)
    return mask, alibi, one_length


def _kind(tables: Sequence[MaskTable], heads: int, graph: CapturedGraph) -> tuple[Mask, tuple[float, ...] | None]:
    """What the tables mean; `graph` remembers it for the sites that have the same ones."""
    key = ("mask kind", heads, *map(id, tables))
    if key not in graph.known:
        graph.known[key] = classify(tables), alibi_slopes(tables, heads), tables
    return graph.known[key][:2]


def _table(part: Part, node: fx.Node, graph: CapturedGraph, view: CapturedGraph, patterns: Catalogue) -> MaskTable:
    """What the mask is in one of the graphs; equal masks are evaluated once."""
    core, axes = core_facts(node, graph, patterns), part.tables.axes
    own = sized(graph, core)
    own = own.sized(length=own.length, keys=own.key_length, batch=view.batch)
    numbers = spelled(graph)
    terms = [(t.kind, numbers.get(t.node, t.node), t.factor, shape(t.at)) for t in core["mask"]]
    key = ("mask", own.batch, own.length, own.keys, core["causal"], axes, *terms)
    if key not in graph.known:
        graph.known[key] = evaluate_mask(core["mask"], core["causal"], own, axes)
    return graph.known[key]
