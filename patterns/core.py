"""The core of an attention: a fused call, or a softmax between two contractions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fla_swap.patterns.base import ABSENT, Found, Recogniser, Refused, Result
from fla_swap.patterns.graph import (
    CAST,
    CONTRACTION,
    DROPOUT,
    CapturedGraph,
    _ops,
    argument,
    op_name,
    shape,
)

SDPA = _ops("scaled_dot_product_attention")
SOFTMAX = _ops("softmax", "_softmax", "special_softmax", "_safe_softmax")
PRODUCT = _ops("matmul", "bmm")
BADDBMM = _ops("baddbmm")
SLICE = _ops("slice")


@dataclass(frozen=True, kw_only=True)
class MaskTerm:
    """One closed tensor that decides what a query sees; `kind` "add" (to the scores), "keep" or "drop" (where true).

    `factor`: what the scores are multiplied by afterwards. `flat`: it stands against scores [B · H, T, T].
    """

    kind: str
    node: fx.Node
    factor: float = 1.0
    flat: bool = False


@dataclass(frozen=True, kw_only=True)
class FusedCore:
    """`scaled_dot_product_attention(q, k, v, mask)`: scale, mask, causal flag and grouping are arguments."""

    name: str = "sdpa"
    slot: str = "core"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in SDPA:
            return ABSENT
        q, k, v = node.args[:3]
        mask = argument(node, 3, "attn_mask")
        dims = shape(q)
        assert isinstance(q, fx.Node) and dims is not None
        scale = argument(node, 6, "scale")
        terms: list[MaskTerm] = []
        if isinstance(mask, fx.Node):
            if graph.is_open(mask):
                return Refused("the mask depends on the values that the model reads", mask)
            boolean = not mask.meta["val"].dtype.is_floating_point
            terms.append(MaskTerm(kind="keep" if boolean else "add", node=mask))
        facts = {
            "q": q,
            "k": k,
            "v": v,
            "out": node,
            "k_transposed": False,
            "scale": dims[-1] ** -0.5 if scale is None else float(scale),
            "mask": terms,
            "causal": bool(argument(node, 5, "is_causal", False)),
            "dropout": float(argument(node, 4, "dropout_p", 0.0)),
        }
        return Found(facts=facts, nodes=(node,))


@dataclass(frozen=True, kw_only=True)
class SoftmaxCore:
    """`softmax(scores) @ v`, the scores being walked back to `q @ kᵀ` through the `scores` recognisers."""

    scores: Sequence[Recogniser]
    name: str = "softmax"
    slot: str = "core"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if node.target not in SOFTMAX or not graph.is_open(node):
            return ABSENT
        dims = shape(node)
        dim = argument(node, 1, "dim")
        if dims is None or len(dims) < 3 or dim not in (-1, len(dims) - 1):
            return ABSENT
        mixed, dropout = self._forwards(node, graph)
        if mixed is None:
            return ABSENT
        facts = {"out": mixed[0], "v": mixed[1], "scale": 1.0, "mask": [], "causal": False}
        facts["dropout"] = dropout
        nodes = [node]
        dropped = _dropped(node)
        walk: fx.Node = node.all_input_nodes[0]
        while True:
            walk = graph.peel(walk, CAST | DROPOUT | _SAME)[-1]
            result = self._step(walk, graph, facts)
            if not isinstance(result, Found):
                return result
            nodes += result.nodes
            if result.next is None:
                if ("sinks" in facts) != dropped:
                    return Refused("a column of the softmax is dropped that is no sink, or a sink is kept", node)
                return Found(facts=facts, nodes=tuple(nodes))
            walk = result.next

    def _step(self, walk: fx.Node, graph: CapturedGraph, facts: dict) -> Result:
        if walk.target in PRODUCT:
            left, right = walk.args[:2]
            if graph.is_open(left) and graph.is_open(right):
                facts |= {"q": left, "k": right, "k_transposed": True}
                return Found(nodes=(walk,))
            return ABSENT
        if walk.target in BADDBMM:
            return self._baddbmm(walk, graph, facts)
        for recogniser in self.scores:
            result = recogniser.match(walk, graph)
            if isinstance(result, Found):
                new = result.facts
                if "mask" in new and "softcap" in facts:
                    return Refused("a mask is added before the softcap", walk)
                if "softcap" in new and "softcap" in facts:
                    return Refused("two softcaps in one softmax", walk)
                if "softcap" in new and facts["scale"] != 1.0:
                    return Refused("the scores are scaled after the softcap", walk)
                if "sinks" in new and (facts["mask"] or facts["scale"] != 1.0):
                    return Refused("the sinks are masked or scaled with the scores", walk)
                terms = [dataclasses.replace(t, factor=facts["scale"]) for t in new.get("mask", ())]
                facts["mask"] = facts["mask"] + terms
                facts["scale"] *= new.get("scale", 1.0)
                facts |= {n: v for n, v in new.items() if n not in ("mask", "scale")}
                return result
            if isinstance(result, Refused):
                return result
        if len(graph.open_inputs(walk)) != 1 or not facts["mask"]:
            return ABSENT if not _reaches_product(walk, graph) else _unknown(walk)
        return _unknown(walk)

    @staticmethod
    def _baddbmm(walk: fx.Node, graph: CapturedGraph, facts: dict) -> Result:
        bias, left, right = walk.args[:3]
        if graph.is_open(bias) or not (graph.is_open(left) and graph.is_open(right)):
            return _unknown(walk)
        if "softcap" in facts:
            return Refused("a mask is added before the softcap", walk)
        assert isinstance(bias, fx.Node)
        beta, alpha = graph.constant(walk.kwargs.get("beta", 1)), graph.constant(walk.kwargs.get("alpha", 1))
        if beta is None or alpha is None:
            return _unknown(walk)
        facts["mask"] = [*facts["mask"], MaskTerm(kind="add", node=bias, factor=facts["scale"] * beta, flat=True)]
        facts["scale"] *= alpha
        facts |= {"q": left, "k": right, "k_transposed": True}
        return Found(nodes=(walk,))

    def _forwards(self, node: fx.Node, graph: CapturedGraph) -> tuple[tuple[fx.Node, fx.Node] | None, float]:
        """(product, v) that the probabilities go into, and the dropout on the way."""
        dropout, walk = 0.0, node
        while True:
            users = [u for u in walk.users if u.target in PRODUCT | CAST | DROPOUT | _SAME or _drops_last(u)]
            product = next((u for u in users if u.target in PRODUCT), None)
            if product is not None:
                if product.args[0] is walk and graph.is_open(product.args[1]):
                    return (product, product.args[1]), dropout  # type: ignore[return-value]
                return None, dropout
            if len(users) != 1:
                return None, dropout
            walk = users[0]
            if walk.target in DROPOUT:
                dropout = float(argument(walk, 1, "p", 0.0))


_SAME = _ops("view", "reshape", "_unsafe_view", "contiguous", "clone", "alias", "detach", "unsqueeze", "squeeze")


def _unknown(node: fx.Node) -> Refused:
    return Refused(f"{op_name(node)} between the softmax and q kᵀ is not understood", node)


def _drops_last(node: fx.Node) -> bool:
    """Whether `node` takes all columns but the last."""
    dims = shape(node.all_input_nodes[0]) if node.target in SLICE else None
    if (
        dims is None
        or argument(node, 1, "dim", 0) not in (-1, len(dims) - 1)
        or argument(node, 2, "start") not in (0, None)
    ):
        return False
    return argument(node, 3, "end") in (-1, dims[-1] - 1)


def _dropped(softmax: fx.Node) -> bool:
    walk = softmax
    for _ in range(8):
        if any(_drops_last(u) for u in walk.users):
            return True
        users = [u for u in walk.users if u.target in CAST | DROPOUT | _SAME]
        if len(users) != 1:
            return False
        walk = users[0]
    return False


def _reaches_product(node: fx.Node, graph: CapturedGraph) -> bool:
    """Whether a product of two open tensors stands a few steps before: then this softmax is an attention's."""
    seen, frontier = set(), [node]
    for _ in range(24):
        if not frontier:
            return False
        walk = frontier.pop(0)
        if walk in seen:
            continue
        seen.add(walk)
        if walk.target in PRODUCT and all(graph.is_open(a) for a in walk.args[:2]):
            return True
        if walk.target in BADDBMM:
            return True
        if walk.target not in CONTRACTION:
            frontier += graph.open_inputs(walk)
    return False
