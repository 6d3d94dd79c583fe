"""When two sites compute the same function of their own weights: everything they state and every node of their graphs
agree, names of layers and weights apart. One proof on random weights then holds for both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from fla_swap.errors import VerificationError
from fla_swap.patterns.graph import CapturedGraph
from fla_swap.patterns.output import inside_of
from fla_swap.types import AttentionSite, to_jsonable

Key = tuple[Any, ...]


def structure(site: AttentionSite, graph: CapturedGraph) -> Key | None:
    """Equal for sites of one function, `site.call` among the facts compared; None for a site without a module."""
    if site.place != "module":
        return None
    facts = dataclasses.replace(site, layer=0, anchor="", call=dataclasses.replace(site.call, cache_index=None))
    return _relative(to_jsonable(facts), site.fqn), *_region(site.fqn, graph)


def _relative(value: Any, fqn: str) -> Any:
    """Names inside the owner are counted from there."""
    if isinstance(value, str):
        return value[len(fqn) :] if value == fqn or value.startswith(f"{fqn}.") else value
    if isinstance(value, dict):
        return tuple((k, _relative(v, fqn)) for k, v in value.items())
    return tuple(_relative(v, fqn) for v in value) if isinstance(value, list | tuple) else value


def _region(fqn: str, graph: CapturedGraph) -> Key:
    """The owner's nodes in order: operation, arguments by number, shape and dtype; and which are read from outside."""
    inside = inside_of(fqn, graph)
    numbers: dict[fx.Node, Any] = {node: position for position, node in enumerate(inside)}
    given = 0
    rows = []
    for node in inside:
        for value in node.all_input_nodes:
            if value in numbers:
                continue
            if graph.is_open(value):
                numbers[value] = ("given", given, *_size(value))
                given += 1
            else:
                numbers[value] = ("closed", *_closed(value, fqn, graph))
        operands = map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        rows.append((str(node.target), str(operands), *_size(node)))
    members = set(inside)
    read = tuple(p for p, node in enumerate(inside) if any(user not in members for user in node.users))
    return tuple(rows), read


class ProveOnce:
    """Proves one site of each structure; the others get its result. `groups` counts the sites of each, by its first.

    `graphs`: the captures that hold the sites; a site in none of them is proved by itself.
    """

    def __init__(self) -> None:
        self.graphs: list[CapturedGraph] = []
        self.groups: dict[str, int] = {}
        self._results: dict[Key, tuple[str, Any]] = {}

    def __call__(self, site: AttentionSite, prove: Callable[[], Any]) -> Any:
        """What `prove()` returns, or the VerificationError that it raises, for the first site of this structure."""
        graph = next((g for g in self.graphs if inside_of(site.fqn, g)), None)
        key = None if graph is None else structure(site, graph)
        if key is None:
            result = prove()
            self.groups[site.fqn] = 1
            return result
        if key not in self._results:
            try:
                self._results[key] = site.fqn, prove()
            except VerificationError as error:
                self._results[key] = site.fqn, error
        first, result = self._results[key]
        if isinstance(result, VerificationError):
            raise result if first == site.fqn else VerificationError(f"as {first}, whose graph is the same: {result}")
        self.groups[first] = self.groups.get(first, 0) + 1
        return result

    def note(self) -> str:
        """What was proved for whom, as a sentence."""
        return "the proofs ran on random weights, one for each structure: " + ", ".join(
            first if count == 1 else f"{first} and {count - 1} more layer{'s' * (count > 2)} of its structure"
            for first, count in self.groups.items()
        )


def _closed(node: fx.Node, fqn: str, graph: CapturedGraph) -> Key:
    """A weight without values counts by its place in the owner; any other closed input is itself, or its value."""
    value = graph.values.get(node.name)
    if isinstance(value, FakeTensor):
        return (_relative(graph.weights.get(node.name, node.name), fqn), *_size(node))
    if isinstance(value, Tensor):
        return (_digest(value), *_size(node))
    return (node.name,)


def _size(node: fx.Node) -> Key:
    value = node.meta.get("val")
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (str(type(value)),)


def _digest(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
