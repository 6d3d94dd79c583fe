"""One attention core in a graph with plain sizes: q, k, v, scores, mask and output, held against what an operator can
compute.

A core is `softmax(scores(q kᵀ) + mask) v`, or a fused call. The *region* is everything between the product q kᵀ and the
output: all of it must be understood, and nothing in it may be used elsewhere.

Legend: L leading dimensions (batch and heads), T tokens, K key width, V value width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.errors import NoValue
from fla_swap.patterns.base import Absent, Found, Refused
from fla_swap.patterns.catalogue import Catalogue
from fla_swap.patterns.graph import CAST, CONTRACTION, DROPOUT, LAYOUT, CapturedGraph, _ops, argument, op_name, shape
from fla_swap.patterns.mask_kinds import MaskRefused
from fla_swap.patterns.parts import unread
from fla_swap.patterns.rows import RowEvaluator, RowsRefused
from fla_swap.rewriting.masks import Term, Visible, read_mask

_FACTS = frozenset({"q", "k", "v", "out", "k_transposed", "scale", "mask", "causal", "dropout", "softcap", "sinks"})
_PLACES = frozenset({"product", "scores", "dim", "same", "mixed", "v_first"})
_KEPT = _ops("view", "reshape", "_unsafe_view", "contiguous", "clone", "alias", "detach", "unsqueeze", "squeeze")
_SLICE, _GETITEM, _CAT = _ops("slice"), frozenset({operator.getitem}), _ops("cat", "concat")
SDPA_OPS = _ops("scaled_dot_product_attention")
FLEX = "flex_attention"
_PRODUCT = _ops("matmul", "bmm", "baddbmm")
_REGION = 64
_LOOKUP = _ops("embedding")
_PADDING = (
    "its mask depends on the input {} (padding): an operator gives zeros for tokens that do not count, this program "
    "what they see, so they are not the same function"
)


class CoreRefused(Exception):
    """A core that stays as it is; `.node` is where the reason lies."""

    def __init__(self, reason: str, node: fx.Node):
        super().__init__(reason)
        self.node = node


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node that is a tensor."""
    dims = shape(node)
    assert dims is not None, node
    return dims


@dataclass(frozen=True, kw_only=True)
class Core:
    """A core that was understood. `k` is [L, K, T] when `k_transposed`. `region`: its nodes, the output last."""

    anchor: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    k_transposed: bool
    fused: bool
    scale: float
    softcap: float | None
    sinks: fx.Node | None
    causal: bool
    terms: tuple[Term, ...]
    region: tuple[fx.Node, ...] = field(repr=False)

    @property
    def lead(self) -> tuple[int, ...]:
        return sizes(self.q)[:-2]

    @property
    def length(self) -> int:
        return sizes(self.q)[-2]

    def visible(self, evaluator: RowEvaluator) -> Visible:
        """The kind of its mask; CoreRefused when it has none that is known."""
        try:
            return read_mask(self.terms, self.causal, self.lead, self.length, evaluator)
        except (MaskRefused, RowsRefused) as refused:
            raise CoreRefused(str(refused), self.anchor) from refused
        except (ValueError, NoValue) as error:
            raise CoreRefused(f"the mask is no constant of the graph: {error}", self.anchor) from error


def candidates(graph: CapturedGraph, patterns: Catalogue) -> list[fx.Node]:
    """Every node that the core recognisers know, whether they accept it or refuse it."""
    return [n for n in graph.nodes if n.op == "call_function" and not isinstance(_match(n, graph, patterns), Absent)]


def _match(node: fx.Node, graph: CapturedGraph, patterns: Catalogue) -> Any:
    if not graph.is_open(node):
        return Absent()
    for recogniser in patterns.cores:
        try:
            result = recogniser.match(node, graph)
        except (ValueError, NoValue) as error:
            return Refused(f"a number in it is no constant of the graph: {error}", node)
        except Exception as error:  # whatever a graph that nobody has seen does to a recogniser
            return Refused(unread(error), node)
        if not isinstance(result, Absent):
            return result
    return Absent()


def read_core(anchor: fx.Node, graph: CapturedGraph, patterns: Catalogue) -> Core:
    """The core at `anchor`, or CoreRefused."""
    result = _match(anchor, graph, patterns)
    if isinstance(result, Refused):
        names = padding_inputs(result.node, graph)
        raise CoreRefused(_PADDING.format(names) if names else result.reason, result.node)
    assert isinstance(result, Found)
    facts = dict(result.facts)
    unknown = sorted(n for n in facts if n not in _FACTS | _PLACES and facts[n] is not None)
    if unknown:
        raise CoreRefused(f"{', '.join(unknown)} cannot be expressed by an operator", anchor)
    flex = str(anchor.target) == FLEX
    fused = anchor.target in SDPA_OPS or flex
    if not fused and "product" not in facts:
        raise CoreRefused(f"{op_name(anchor)} is a kernel of its own and stays", anchor)
    if any(t.kind not in ("add", "keep", "drop") for t in facts["mask"]):
        raise CoreRefused("scores multiplied by a table, or probabilities that are masked again", anchor)
    if facts.get("v_first") or facts.get("dim", -1) != -1:
        raise CoreRefused("scores that lie in another order than [..., queries, keys]", anchor)
    q, k = shape(facts["q"]), shape(facts["k"])
    if q is None or k is None or len(q) < 3:
        raise CoreRefused("queries and keys are no batch of matrices", anchor)
    keys = k[-1 if facts["k_transposed"] else -2]
    if q[-2] != keys:
        raise CoreRefused(f"{q[-2]} queries and {keys} keys: only self-attention without a cache is rewritten", anchor)
    region = tuple(dict.fromkeys((anchor, facts["out"]))) if fused else _region(result.nodes, facts["out"], graph)
    if fused:
        if not flex and float(argument(anchor, 4, "dropout_p", 0.0) or 0.0) > 0:
            raise CoreRefused("dropout acts on the probabilities", anchor)
    else:
        _check_region(region, result.nodes, q[-2])
    return Core(
        anchor=anchor,
        q=facts["q"],
        k=facts["k"],
        v=facts["v"],
        out=facts["out"],
        k_transposed=facts["k_transposed"],
        fused=fused,
        scale=facts["scale"],
        softcap=facts.get("softcap"),
        sinks=_sinks(facts.get("sinks"), graph, anchor),
        causal=facts["causal"],
        terms=tuple(_term(t, region, anchor, q[:-2], fused) for t in facts["mask"]),
        region=region,
    )


def padding_inputs(node: fx.Node, graph: CapturedGraph) -> str:
    """The inputs that a mask at `node` is made of, where these say which tokens count: [B, T] of whole numbers or truth
    values that go through no weight. "" for any other."""
    names: dict[str, None] = {}
    for start in (node, *graph.open_inputs(node)):
        found = _made_of(start, graph)
        if found and all(_tells_tokens(n) for n in found):
            names |= dict.fromkeys(n.name for n in found)
    return " and ".join(map(repr, names))


def _made_of(node: fx.Node, graph: CapturedGraph) -> list[fx.Node]:
    """The inputs behind a node; none where a weight or a product stands between."""
    seen, stack, found = {node}, [node], []
    while stack:
        walk = stack.pop()
        if walk.target in CONTRACTION | _LOOKUP:
            return []
        found += [walk] if walk.op == "placeholder" else []
        fresh = [n for n in graph.open_inputs(walk) if n not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _tells_tokens(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 2 and not val.is_floating_point() and not val.is_complex()


def _region(recognised: Sequence[fx.Node], out: fx.Node, graph: CapturedGraph) -> tuple[fx.Node, ...]:
    """Everything that the product q kᵀ reaches, up to `out`. Refused when something else reads it."""
    product = min((n for n in recognised if n.target in _PRODUCT), key=graph.order)
    found: dict[fx.Node, None] = {product: None}
    stack = [product]
    while stack:
        node = stack.pop()
        if node is out:
            continue
        for user in node.users:
            if user.op == "output" or len(found) > _REGION:
                raise CoreRefused("the scores or the probabilities are used elsewhere too", node)
            if user not in found:
                found[user] = None
                stack.append(user)
    return tuple(sorted(found, key=graph.order))


def _check_region(region: Sequence[fx.Node], recognised: Sequence[fx.Node], length: int) -> None:
    known = set(recognised)
    for node in region[:-1]:
        if "_assert_tensor_metadata" in str(node.target):
            continue
        # Of movements only those that keep every row of scores where it is, whatever a recogniser says of them.
        moved = node.target in LAYOUT and node.target not in _KEPT | _SLICE | _GETITEM | _CAT
        understood = node in known or node.target in CAST | DROPOUT | _KEPT | _SLICE | _GETITEM
        if moved or not understood:
            raise CoreRefused(f"{op_name(node)} among the scores is not understood", node)
        if node.target in DROPOUT and float(argument(node, 1, "p", 0.5)) > 0 and bool(argument(node, 2, "train", True)):
            raise CoreRefused("dropout acts on the probabilities", node)
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            continue
        if node.target in CAST and not val.dtype.is_floating_point:
            raise CoreRefused(f"the scores are cast to {val.dtype}", node)
        if node.target in _KEPT | _SLICE and (val.shape[-2] != length or val.shape[-1] not in (length, length + 1)):
            raise CoreRefused(f"the scores are rearranged to {tuple(val.shape)}", node)


def _sinks(ref: Any, graph: CapturedGraph, anchor: fx.Node) -> fx.Node | None:
    if ref is None:
        return None
    found = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and graph.weights.get(n.name) == ref.name]
    if not found or ref.rows is not None:
        raise CoreRefused("the sinks are not one stored vector", anchor)
    return found[0]


def _term(term: Any, region: Sequence[fx.Node], anchor: fx.Node, lead: tuple[int, ...], fused: bool) -> Term:
    if not fused:
        at = [n for n in region if term.node in n.all_input_nodes]
        dims = shape(at[0]) if at else None
        if dims is None:
            raise CoreRefused("a mask that acts on no scores", anchor)
        lead = dims[:-2]
    return Term(kind=term.kind, node=term.node, lead=lead, factor=term.factor, table=term.table)


def closed_inputs(core: Core, graph: CapturedGraph) -> set[fx.Node]:
    """The placeholders behind everything in the region but q, k and v: masks, slopes, scales."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = {core.q, core.k, core.v}
    stack = list(core.region)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def prove(core: Core, graph: CapturedGraph, replacement: Any) -> float:
    """Largest relative difference between the region and `replacement(q, k, v, sinks)` on random values, in fp32.

    `k` is passed as it stands in the graph.
    """
    generator = torch.Generator().manual_seed(0)

    given = (core.q, core.k, core.v, core.sinks)
    values = {n: torch.randn(sizes(n), generator=generator) for n in given if n is not None}
    with torch.no_grad():
        wanted = graph.run(core.out, values)
        found = replacement(*(None if n is None else values[n] for n in given))
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
