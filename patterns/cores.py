"""Where attention starts: the cores of a graph, with what the recognisers say, and those that belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fla_swap.errors import FlaSwapError
from fla_swap.patterns.base import ABSENT, Absent, Found, Refused, Result
from fla_swap.patterns.catalogue import Catalogue
from fla_swap.patterns.graph import CapturedGraph, modules_of, op_name, shape, source_of
from fla_swap.patterns.hints import before_projections, cone, table_sizes, thresholds
from fla_swap.patterns.mask import length_hints
from fla_swap.patterns.output import Output, find_output
from fla_swap.patterns.parts import Stop, unread


@dataclass(frozen=True)
class Failed(Refused):
    """A refusal because a recogniser raised `error`."""

    error: Exception | None = None


def core_nodes(graph: CapturedGraph, patterns: Catalogue) -> list[tuple[fx.Node, Any]]:
    """Every fused attention or softmax over open values, with what the core recognisers say."""
    if "cores" in graph.known:
        return graph.known["cores"]
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or not graph.is_open(node):
            continue
        result = _asked(node, graph, patterns)
        if not isinstance(result, Absent) or "softmax" in op_name(node):
            found.append((node, result))
    inner = {n for node, r in found if not isinstance(r, Absent) for n in getattr(r, "nodes", ()) if n is not node}
    found = [(node, r) for node, r in found if node not in inner]
    graph.known["cores"] = found
    return found


def _asked(node: fx.Node, graph: CapturedGraph, patterns: Catalogue) -> Result:
    """What the first core recogniser says that knows the node; one that fails on it refuses it."""
    for recogniser in patterns.cores:
        try:
            result = recogniser.match(node, graph)
        except FlaSwapError:
            raise
        except Exception as error:  # whatever a graph that nobody has seen does to it
            return Failed(unread(error), node, error=error)
        if not isinstance(result, Absent):
            return result
    return ABSENT


def core_facts(node: fx.Node, graph: CapturedGraph, patterns: Catalogue) -> dict[str, Any]:
    """What the core recognisers found at `node`. Raises `Stop` with their reason where they refused it."""
    result = dict(core_nodes(graph, patterns))[node]
    if isinstance(result, Refused):
        raise Stop("scores", result.reason, result.node)
    return dict(result.facts)


def mask_lengths(graph: CapturedGraph, patterns: Catalogue) -> set[int]:
    """Numbers at which the masks may change: windows and chunks are among them, so another capture must be longer."""
    hints: set[int] = set()
    for _, result in core_nodes(graph, patterns):
        if isinstance(result, Found):
            hints |= length_hints(result.facts["mask"], sized(graph, result.facts))
    return hints


def table_lengths(graph: CapturedGraph, patterns: Catalogue) -> set[int]:
    """Numbers at which q, k or v may change on the way to the cores, and the sizes of all stored tables."""
    results = [r.facts for _, r in core_nodes(graph, patterns) if isinstance(r, Found)]
    paths = before_projections((facts[side] for facts in results for side in "qkv"), graph)
    masks = cone((t.node for facts in results for t in facts["mask"]), graph)
    closed = [n for n in paths if not graph.is_open(n)]
    return thresholds(paths, graph, graph.length) | table_sizes((*closed, *masks), graph, graph.length)


def groups(
    cores: Sequence[tuple[tuple[fx.Node, Any], ...]], graph: CapturedGraph, unclaimed: list[str]
) -> list[list[list[fx.Node]]]:
    """The cores that are one attention together: those whose heads go into the same output projection."""
    groups: dict[Any, list[list[fx.Node]]] = {}
    for found in cores:
        node, result = found[0]
        if isinstance(result, Absent):
            unclaimed.append(where(node))
            continue
        key: Any = node
        if isinstance(result, Found):
            output = find_output(result.facts["out"], graph)
            key = output.out if isinstance(output, Output) else node
        groups.setdefault(key, []).append([n for n, _ in found])
    return list(groups.values())


def sized(graph: CapturedGraph, core: Mapping[str, Any]) -> CapturedGraph:
    """The graph with the core's own query and key counts."""
    q, k = shape(core["q"]), shape(core["k"])
    assert q is not None and k is not None
    length, keys = _count(q, q[-2], graph), _count(k, k[-1 if core["k_transposed"] else -2], graph)
    return graph.sized(length=length, keys=keys)


def _count(dims: tuple[int, ...], rows: int, graph: CapturedGraph) -> int:
    """How many tokens an operand holds: the model's own count wherever that is among its sizes."""
    return graph.length if rows % graph.length == 0 or graph.length in dims else rows


def token_counts(
    cores: Sequence[Sequence[tuple[fx.Node, Any]]], graphs: Sequence[CapturedGraph]
) -> list[list[CapturedGraph]]:
    """For each core, every graph with the core's own query and key counts."""
    return [
        [sized(g, r.facts) for (_, r), g in zip(found, graphs, strict=True)]
        for found in zip(*cores, strict=True)
        if all(isinstance(r, Found) for _, r in found)
    ]


def where(node: fx.Node) -> str:
    modules = modules_of(node)
    return f"{modules[-1] if modules else ''} {op_name(node)} {source_of(node)}".strip()
