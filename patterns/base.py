"""What a recogniser is: one small class that looks at one node and says Found, Absent or Refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from fla_swap.patterns.graph import CapturedGraph


@dataclass(frozen=True, kw_only=True)
class Found:
    """The recogniser's step is here: `facts` say what, `nodes` are its graph nodes, `next` is where data comes from.

    `out` is the node that has the shape and order of `next` after the step (None: the node that was asked about).
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    next: fx.Node | None = None
    out: fx.Node | None = None


@dataclass(frozen=True)
class Absent:
    """Nothing of the recogniser's kind is here; the next one is tried."""


@dataclass(frozen=True)
class Refused:
    """The step is of the recogniser's kind but cannot be expressed in a site. Ends the match with this reason.

    `slot`: what a near miss calls the failing part, where that is not the part that was being walked.
    """

    reason: str
    node: fx.Node
    slot: str | None = None


Result = Found | Absent | Refused
ABSENT = Absent()


class Recogniser(Protocol):
    """`slot`: "core" (starts a match), "scores" (softmax back to q kᵀ) or "path" (core back to a projection).

    `match` is asked at one node and looks backwards from there. What `Found.facts` may hold is in `FACTS`; a step that
    changes nothing which a site would have to say has none.
    """

    @property
    def name(self) -> str: ...

    @property
    def slot(self) -> str: ...

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result: ...


SLOTS = ("core", "scores", "path")

FACTS: Mapping[str, frozenset[str]] = {
    "core": frozenset({"q", "k", "v", "out", "k_transposed", "scale", "mask", "causal", "dropout", "softcap", "sinks"}),
    "scores": frozenset({"scale", "mask", "softcap", "sinks"}),
    "path": frozenset({"scale", "rope", "norm", "clip", "temperature", "projection"}),
}
"""What the facts of each slot may be called.

core: the nodes of `q`, `k`, `v` and of the attention's output `out`; whether k arrives as [..., K, T]; the score's
`scale`; `mask`, a list of MaskTerm; `causal`; `dropout`. scores: a factor `scale`, terms of the `mask`, `softcap`,
`sinks` (WeightRef). path: a factor `scale`, `rope` (Rope), `norm` (NormFacts), `clip`
(a number), `temperature` (Temperature), `projection` (Linear; it ends the path).
"""
