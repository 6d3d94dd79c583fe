"""One path from the core back to a projection: an ordered grammar of optional steps, tried at each node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torch import fx

from fla_swap.patterns.base import ABSENT, Found, Recogniser, Refused, Result
from fla_swap.patterns.graph import CAST, DROPOUT, LAYOUT, CapturedGraph, _ops, argument, modules_of, shape
from fla_swap.patterns.naming import name_stop
from fla_swap.patterns.norm import NormFacts
from fla_swap.patterns.projection import Linear
from fla_swap.patterns.rope import same_rotation
from fla_swap.patterns.scores import learned_factor, split_factor
from fla_swap.types import Rope, Temperature

CLAMP = _ops("clamp", "clamp_", "clip", "clip_", "hardtanh", "hardtanh_")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """q or k times a constant, on the way to the core."""

    name: str = "factor"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        found = split_factor(node, graph)
        if found is None:
            return ABSENT
        if (learned := learned_factor(node, graph)) is not None:
            return learned
        return Found(facts={"scale": found[0]}, nodes=(node,), next=found[1])


@dataclass(frozen=True, kw_only=True)
class Clip:
    """q, k or v held between −c and c (OLMo, DBRX, MPT)."""

    name: str = "clip"
    slot: str = "path"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in CLAMP or not isinstance(node.args[0], fx.Node) or not graph.is_open(node.args[0]):
            return ABSENT
        low, high = (graph.constant(argument(node, *where)) for where in ((1, "min"), (2, "max")))
        if low is None or high is None or low != -high or high <= 0:
            return Refused(f"a clamp between {low} and {high}, where a site states −c and c", node)
        return Found(facts={"clip": high}, nodes=(node,), next=node.args[0])


@dataclass(kw_only=True)
class Path:
    """What lies between a projection and the core. `steps` names the recognised steps, nearest to the core first."""

    linear: Linear | None = None
    scale: float = 1.0
    rope: Rope | None = None
    norm: NormFacts | None = None
    clip: float | None = None
    temperature: Temperature | None = None
    steps: list[str] = field(default_factory=list)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def norm_after_rope(self) -> bool:
        return "norm" in self.steps and "rope" in self.steps and self.steps.index("norm") < self.steps.index("rope")

    def tokens_of(self, operand: fx.Node) -> Fraction:
        """How much of the projection's input there is for each number in the core's operand: the same at any length."""
        assert self.linear is not None
        given, taken = shape(self.linear.x), shape(operand)
        assert given is not None and taken is not None
        return Fraction(math.prod(given), math.prod(taken))


def walk_path(start: fx.Node, recognisers: Sequence[Recogniser], graph: CapturedGraph) -> Path | Refused:
    """Walk back from an operand of the core to its projection."""
    path, node = Path(), start
    while path.linear is None:
        result = _first(node, recognisers, graph)
        if isinstance(result, Refused):
            return result
        if isinstance(result, Found):
            refused = _take(path, result, node)
            if refused is not None:
                return refused
            if result.next is not None:
                node = result.next
            continue
        inputs = graph.open_inputs(node)
        if node.target not in LAYOUT | CAST | DROPOUT or len(inputs) != 1:
            return Refused(name_stop(node, graph), node)
        node = inputs[0]
    return path


def _first(node: fx.Node, recognisers: Sequence[Recogniser], graph: CapturedGraph) -> Result:
    for recogniser in recognisers:
        result = recogniser.match(node, graph)
        if not isinstance(result, type(ABSENT)):
            return result
    return ABSENT


def _take(path: Path, found: Found, node: fx.Node) -> Refused | None:
    facts = found.facts
    if path.clip is not None and "projection" not in facts:
        return Refused("a clamp that does not follow the projection itself", node)
    if "scale" in facts:
        if path.norm is not None:
            return Refused("a factor before the norm of q or k", node)
        path.scale *= facts["scale"]
    if "temperature" in facts and path.norm is not None:
        return Refused("a factor that depends on the position, before the norm", node)
    for name in ("rope", "norm", "clip", "temperature"):
        if name in facts:
            if getattr(path, name) is not None:
                return Refused(f"two steps of the kind {name!r} on one path", node)
            setattr(path, name, facts[name])
            path.steps.append(name)
    if "projection" in facts:
        path.linear = facts["projection"]
    if found.next is not None:
        path.same[found.out or node] = found.next
    return None


def paths_disagree(q: Path, k: Path, v: Path) -> tuple[str, str] | None:
    """(slot, reason) where the three paths together are more than a site states, or None."""
    if v.rope is not None or v.temperature is not None:
        steps = [s for s in v.steps if s in ("rope", "temperature")]
        return "v", f"the values pass through {', '.join(steps)}, which a site cannot state"
    if k.temperature is not None:
        return "k", "the keys are scaled by an amount that depends on the position"
    if len({q.clip, k.clip, v.clip}) != 1:
        return "clip", f"q, k and v are clamped differently (to ±{q.clip}, ±{k.clip} and ±{v.clip})"
    if not same_rotation(q.rope, k.rope):
        return "rope", "q and k are rotated differently"
    if q.norm is not None and k.norm is not None and q.norm_after_rope != k.norm_after_rope:
        return "norm", "one of q and k is normed before, the other after the rotation"
    return None


def projected_elsewhere(core: fx.Node, linears: Sequence[Linear]) -> str | None:
    """The reason when the core's module projects its queries, but not its keys and values (layers share them)."""
    owners = modules_of(core)
    q, *others = (modules_of(linear.out) for linear in linears)
    if not owners or owners[-1] not in q:
        return None
    outside = next((o[-1] for o in others if o and owners[-1] not in o), None)
    if outside is None:
        return None
    return f"keys and values come from {outside!r}, outside {owners[-1]!r}: layers share them, a site has its own"
