"""The core of an attention: a fused call, or a softmax, in any spelling, between two contractions."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fla_swap.patterns.base import ABSENT, Found, Recogniser, Refused, Result
from fla_swap.patterns.graph import (
    CAST,
    DROPOUT,
    LAYOUT,
    CapturedGraph,
    _ops,
    argument,
    op_name,
    shape,
)
from fla_swap.patterns.normalise import find_softmax
from fla_swap.patterns.reach import between_products, mixes_heads
from fla_swap.patterns.steps import MUL

SDPA = _ops("scaled_dot_product_attention")
PRODUCT = _ops("matmul", "bmm")
BADDBMM = _ops("baddbmm")
FILL = _ops("masked_fill", "masked_fill_")
SLICE = _ops("slice")
MOVES = LAYOUT - _ops(
    *("cat", "concat", "stack", "slice", "select", "narrow", "index", "index_select", "split", "split_with_sizes"),
    *("chunk", "unbind", "tensor_split", "flip", "roll", "repeat", "repeat_interleave", "tile"),
)


@dataclass(frozen=True, kw_only=True)
class MaskTerm:
    """One closed tensor that decides what a query sees; `kind` "add" (to the scores), "keep" or "drop" (where true).

    or "times" (multiplied with them, 1 where they count); of the probabilities after the softmax: "times after", and
    "drop after" (set to 0 where true). `factor`: what the scores are multiplied by afterwards.
    `at`: the node whose shape it broadcasts to (None: the fused call's scores [..., T, S]). `table`: its values, where
    no node of the graph has them.
    """

    kind: str
    node: fx.Node
    factor: float = 1.0
    at: fx.Node | None = None
    table: Tensor | None = field(default=None, compare=False, repr=False)


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
    """`softmax(scores) @ v`, the scores being walked back to `q @ kᵀ` through the `scores` recognisers.

    Facts: `q`, `k` the operands of the `product` (which is which is told by `heads.read_heads`), `scores` the
    softmax's input and `dim` its axis from the end, `same` the steps that move nothing, `mixed` the probabilities where
    they enter `out`, and `v_first` when they are its right operand.
    """

    scores: Sequence[Recogniser]
    name: str = "softmax"
    slot: str = "core"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        found = find_softmax(node, graph)
        if found is None:
            return ABSENT
        if not between_products(node, graph):
            return ABSENT
        if found.refused is not None:
            return Refused(found.refused, node)
        facts: dict[str, Any] = {"scale": 1.0, "causal": False, "scores": found.x, "dim": found.dim}
        facts["mask"] = [MaskTerm(kind="keep", node=closed, at=at) for closed, at in found.kept]
        facts["same"] = dict(found.same)
        refused = self._forwards(node, graph, facts)
        if refused is not None:
            return refused
        nodes, walk = [*found.nodes], found.x
        while True:
            walk = graph.peel(walk, CAST | DROPOUT | MOVES)[-1]
            result = self._step(walk, graph, facts)
            if not isinstance(result, Found):
                return result
            nodes += result.nodes
            if result.next is None:
                if ("sinks" in facts) != facts.pop("dropped"):
                    return Refused("a column of the softmax is dropped that is no sink, or a sink is kept", node)
                return Found(facts=facts, nodes=tuple(nodes))
            facts["same"][walk] = result.next
            walk = result.next

    def _step(self, walk: fx.Node, graph: CapturedGraph, facts: dict) -> Result:
        if walk.target in PRODUCT:
            left, right = walk.args[:2]
            if graph.is_open(left) and graph.is_open(right):
                facts |= {"q": left, "k": right, "k_transposed": True, "product": walk}
                return Found(nodes=(walk,))
            return _unknown(walk, graph)
        if walk.target in BADDBMM:
            return self._baddbmm(walk, graph, facts)
        for recogniser in self.scores:
            result = recogniser.match(walk, graph)
            if isinstance(result, Found):
                return self._take(walk, result, facts)
            if isinstance(result, Refused):
                return result
        return _unknown(walk, graph)

    @staticmethod
    def _take(walk: fx.Node, result: Found, facts: dict) -> Result:
        new = result.facts
        if "mask" in new and "softcap" in facts:
            return Refused("a mask is added before the softcap", walk)
        if "softcap" in new and "softcap" in facts:
            return Refused("two softcaps in one softmax", walk)
        if "softcap" in new and facts["scale"] != 1.0:
            return Refused("the scores are scaled after the softcap", walk)
        if "sinks" in new and (facts["mask"] or facts["scale"] != 1.0):
            return Refused("the sinks are masked or scaled with the scores", walk)
        terms = [dataclasses.replace(t, factor=t.factor * facts["scale"], at=t.at or walk) for t in new.get("mask", ())]
        facts["mask"] = facts["mask"] + terms
        facts["scale"] *= new.get("scale", 1.0)
        facts |= {n: v for n, v in new.items() if n not in ("mask", "scale")}
        return result

    @staticmethod
    def _baddbmm(walk: fx.Node, graph: CapturedGraph, facts: dict) -> Result:
        bias, left, right = walk.args[:3]
        if graph.is_open(bias) or not (graph.is_open(left) and graph.is_open(right)):
            return _unknown(walk, graph)
        if "softcap" in facts:
            return Refused("a mask is added before the softcap", walk)
        assert isinstance(bias, fx.Node)
        beta, alpha = graph.constant(walk.kwargs.get("beta", 1)), graph.constant(walk.kwargs.get("alpha", 1))
        if beta is None or alpha is None:
            return _unknown(walk, graph)
        if beta != 0:
            term = MaskTerm(kind="add", node=bias, factor=facts["scale"] * beta, at=walk)
            facts["mask"] = [*facts["mask"], term]
        facts["scale"] *= alpha
        facts |= {"q": left, "k": right, "k_transposed": True, "product": walk}
        return Found(nodes=(walk,))

    @staticmethod
    def _forwards(node: fx.Node, graph: CapturedGraph, facts: dict) -> Refused | None:
        """Adds the product that the probabilities go into, the values, and the dropout on the way."""
        queue: deque[tuple[fx.Node, float, bool]] = deque([(node, 0.0, False)])
        found: dict[fx.Node, tuple[fx.Node, float, bool]] = {}
        blocked: list[fx.Node] = []
        while queue:
            walk, dropout, dropped = queue.popleft()
            for user in walk.users:
                if user.target in PRODUCT and all(graph.is_open(a) for a in user.args[:2]):
                    found[user] = (walk, dropout, dropped)
                elif _drops_last(user):
                    facts["same"][user] = walk
                    queue.append((user, dropout, True))
                elif user.target in CAST | MOVES and len(graph.open_inputs(user)) == 1:
                    queue.append((user, dropout, dropped))
                elif user.target in DROPOUT:
                    queue.append((user, max(dropout, float(argument(user, 1, "p", 0.0))), dropped))
                elif (term := _masked_after(user, graph)) is not None:
                    facts["mask"] = [*facts["mask"], term]
                    facts["same"][user] = walk
                    queue.append((user, dropout, dropped))
                elif user.op == "call_function":
                    blocked.append(user)
        if len(found) != 1:
            if not found and blocked:
                return _blocked(blocked, graph)
            return Refused(f"the softmax goes into {len(found)} products with values, expected one", node)
        ((product, (walk, dropout, dropped)),) = found.items()
        left, right = product.args[:2]
        facts |= {"out": product, "mixed": walk, "v_first": right is walk, "v": left if right is walk else right}
        facts |= {"dropout": dropout, "dropped": dropped}
        return None


def _masked_after(node: fx.Node, graph: CapturedGraph) -> MaskTerm | None:
    """A closed table by which the probabilities are multiplied, or that says which of them are set to 0."""
    if len(graph.open_inputs(node)) != 1 or len(node.args) < 2:
        return None
    if node.target in FILL and graph.is_open(node.args[0]) and graph.constant(node.args[2]) == 0:
        closed, kind = node.args[1], "drop after"
    elif node.target in MUL:
        closed, kind = next((a for a in node.args[:2] if not graph.is_open(a)), None), "times after"
    else:
        return None
    if not isinstance(closed, fx.Node) or graph.is_open(closed) or graph.parameters_of(closed):
        return None
    return MaskTerm(kind=kind, node=closed, at=node)


def _blocked(nodes: Sequence[fx.Node], graph: CapturedGraph) -> Refused:
    """Why the probabilities do not come to a product with the values."""
    if (mixing := next((n for n in nodes if mixes_heads(n, graph)), None)) is not None:
        return Refused(f"{op_name(mixing)} with stored weights mixes the heads after the softmax", mixing)
    reason = f"{' and '.join(dict.fromkeys(map(op_name, nodes)))} between the softmax and the values"
    if (filled := next((n for n in nodes if n.target in FILL), None)) is not None and len(
        graph.open_inputs(filled)
    ) > 1:
        return Refused(f"{reason}: the mask depends on the values that the model reads", filled)
    if all(n.target in MUL for n in nodes):
        return Refused(f"{reason} scales the probabilities, which a site cannot state", nodes[0])
    if all(n.target in LAYOUT for n in nodes):
        return Refused(f"{reason}: the probabilities are taken apart, each part with values of its own", nodes[0])
    return Refused(f"{reason} is not understood", nodes[0])


def _unknown(node: fx.Node, graph: CapturedGraph) -> Refused:
    if mixes_heads(node, graph):
        return Refused(f"{op_name(node)} with stored weights mixes the heads between q kᵀ and the softmax", node)
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
