"""The identity proof for an attention without a module of its own: its part of the graph is run, and compared."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import FlaSwapError, VerificationError
from fla_swap.mixers.softmax import Softmax
from fla_swap.noise import random_tokens, random_weight
from fla_swap.patterns.graph import CapturedGraph, shape
from fla_swap.patterns.region import Region
from fla_swap.types import AttentionSite
from fla_swap.verification import TOLERANCE, Proof

_RANDOM = "random weights"


def finish_in_graph(site: AttentionSite, region: Region | None, verify: bool) -> AttentionSite:
    """The site, proved if `verify`. VerificationError when it is not what its region computes, or has none."""
    if region is None:
        raise VerificationError(f"{site.fqn}: it was not found in the graph, so it cannot be proved there")
    if not verify:
        return site
    return dataclasses.replace(site, proved=True, max_error=prove_in_graph(site, region).error)


def prove_in_graph(site: AttentionSite, region: Region) -> Proof:
    """Run the region on random hidden states, fp32, with random weights, and the attention rebuilt from `site`.

    Where the model takes an attention mask, a part of its second row is padding. Raises VerificationError when the
    two differ by more than `TOLERANCE`, or when either cannot be run.
    """
    graph, weights, valid = _random(region.graph)
    inputs = {
        n: random_tokens(shape(n) or (), seed)
        for seed, n in enumerate((region.hidden, region.memory), start=1)
        if n is not None
    }
    hidden = inputs[region.hidden]
    given = _batch_first(hidden, site)
    if valid is None or valid.shape != given.shape[:2]:
        valid = torch.ones(given.shape[:2], dtype=torch.bool)
    more: dict[str, Any] = {"valid": valid}
    if region.memory is not None:
        memory = _batch_first(inputs[region.memory], site)
        more |= {"memory": memory, "memory_valid": torch.ones(memory.shape[:2], dtype=torch.bool)}
    with torch.no_grad():
        try:
            wanted = _batch_first(graph.run(region.end, inputs), site)
            mixer = Softmax.from_attention(site, weights).eval()
        except (FlaSwapError, KeyError, RuntimeError, ValueError) as error:
            raise VerificationError(f"{site.fqn}: the attention cannot be rebuilt from its site: {error}") from error
        found = mixer(given, **more)[0]
    found, wanted = found[valid].double(), wanted[valid].double()
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise VerificationError(
            f"{site.fqn}: the rebuilt attention differs from what the graph computes by {error:.2e} (relative, fp32; "
            f"at most {TOLERANCE:.0e} is accepted): {site.source} computes something that the site does not say"
        )
    return Proof(error=error)


def _batch_first(states: Tensor, site: AttentionSite) -> Tensor:
    return states.transpose(0, 1) if site.call.time_first else states


def _random(graph: CapturedGraph) -> tuple[CapturedGraph, dict[str, Tensor], Tensor | None]:
    """The graph with random parameters and a padded mask, its weights by name, and which tokens are no padding.

    Made once for all sites of a graph; `forget_random` frees it.
    """
    if _RANDOM not in graph.known:
        graph.known[_RANDOM] = _make_random(graph)
    return graph.known[_RANDOM]


def forget_random(graph: CapturedGraph) -> None:
    """Free the random weights with which sites of the graph were proved."""
    graph.known.pop(_RANDOM, None)


def _make_random(graph: CapturedGraph) -> tuple[CapturedGraph, dict[str, Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    values, weights, valid = dict(graph.values), {}, None
    for name, value in graph.values.items():
        if name in graph.weights:
            if isinstance(value, torch.nn.Parameter) and value.is_floating_point():
                value = random_weight(value.cpu(), generator)
            weights[graph.weights[name]] = values[name] = value
        elif _shows_all_tokens(value, graph):
            padded = torch.ones_like(value)
            padded[1, : value.shape[1] // 3] = 0
            values[name], valid = padded, padded.bool()
    twin = copy.copy(graph)
    object.__setattr__(twin, "values", values)
    object.__setattr__(twin, "known", {})
    object.__setattr__(twin, "_memo", {})
    return twin, weights, valid


def _shows_all_tokens(value: Any, graph: CapturedGraph) -> bool:
    """Whether an input is a padding mask [B, T] that hides nothing."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.shape != (graph.batch, graph.length):
        return False
    return bool((value == 1).all())
