"""Exact rewrites in place: every core that is understood and proved becomes one operator; its mask becomes dead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.errors import NoValue
from fla_swap.patterns.catalogue import catalogue
from fla_swap.patterns.graph import BATCHED, DROPOUT, LAYOUT, alias_root, argument, modules_of, shape, source_of
from fla_swap.patterns.mask import length_hints
from fla_swap.patterns.mask_kinds import expected
from fla_swap.patterns.parts import unread
from fla_swap.patterns.rows import RowEvaluator
from fla_swap.rewriting.cores import FLEX, SDPA_OPS, Core, CoreRefused, candidates, closed_inputs, prove, read_core
from fla_swap.rewriting.records import RewriteRecord, SkippedCore
from fla_swap.rewriting.replacement import SDPA, Insert, Replacement, choose, eagerly, unrepeated, write
from fla_swap.rewriting.twins import Traced, Twin, bounds, default_sizes, static_twin, symbolic_twin
from fla_swap.types import Mask

TOLERANCE = 1e-4
LONGEST = 16384
FAR, _WHOLE_RANGE = 1024, 4096
PROVABLE = 2**24
_CLOSURE = 256


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A core in the first twin, what will compute it, and the longest length at which that was checked."""

    core: Core
    spec: Replacement
    checked: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`read`: the placeholders of `Traced.values` whose values the rewrites rely on."""

    records: tuple[RewriteRecord, ...]
    skipped: tuple[SkippedCore, ...]
    read: tuple[str, ...]


def rewrite_graph(traced: Traced) -> Outcome:
    """Replace every core of `traced.module` that is proved. The module is changed in place."""
    search = _Search(traced)
    records: list[RewriteRecord] = []
    skipped: list[SkippedCore] = []
    read: dict[str, None] = {}
    for anchor in search.anchors:
        original = search.twin.original[anchor]
        try:
            match = search.match(anchor)
        except CoreRefused as refused:
            skipped.append(_skipped(original, str(refused), source_of(refused.node)))
            continue
        except Exception as error:  # whatever a graph that nobody has seen does to the matcher
            skipped.append(_skipped(original, unread(error)))
            continue
        read |= dict.fromkeys(n.name for n in closed_inputs(match.core, search.twin.graph) if n.name in traced.values)
        records.append(_replace(traced.module.graph, match, search.twin, original))
    traced.module.graph.lint()
    traced.module.recompile()
    return Outcome(records=tuple(records), skipped=tuple(skipped), read=tuple(read))


def _skipped(anchor: fx.Node, reason: str, source: str = "") -> SkippedCore:
    modules = modules_of(anchor)
    return SkippedCore(
        anchor=anchor.name, module=modules[-1] if modules else "", reason=reason, source=source or source_of(anchor)
    )


class _Search:
    """The cores of a graph, read at its own sizes, or at a short and a long length where sizes are symbols."""

    def __init__(self, traced: Traced):
        self.traced, self.patterns = traced, catalogue()
        self.sizes = default_sizes(traced)
        self.twin = symbolic_twin(traced, self.sizes) if self.sizes else static_twin(traced)
        self.evaluator = RowEvaluator(self.twin.graph)
        self.anchors = candidates(self.twin.graph, self.patterns)
        self.long = self._long() if self.sizes else None
        self.long_evaluator = RowEvaluator(self.long.graph) if self.long else None

    def match(self, anchor: fx.Node) -> _Match:
        core = read_core(anchor, self.twin.graph, self.patterns)
        if core.fused and not core.terms:
            raise CoreRefused("it is one fused call without a mask already", anchor)
        visible = core.visible(self.evaluator)
        spec = choose(core, visible)
        checked = core.length
        if self.long is not None:
            spec, checked = self._at_both_lengths(core, visible.mask)
        self._prove(core, spec)
        return _Match(core=core, spec=spec, checked=checked)

    def _long(self) -> Twin:
        """The graph beyond a thousand tokens and every constant of the masks, or at the longest that it takes."""
        lengths, hints = set(), {0}
        for anchor in self.anchors:
            try:
                core = read_core(anchor, self.twin.graph, self.patterns)
            except CoreRefused:
                continue
            lengths |= query_symbols(self.twin.original[core.q])
            hints |= {h for h in length_hints(core.terms, self.twin.graph, core.length) if h <= LONGEST}
        sizes = {}
        for symbol, short in self.sizes.items():
            low, high = bounds(self.traced, symbol)
            far = high if high <= _WHOLE_RANGE else min(high, max(2 * short, FAR, *hints) + 3)
            sizes[symbol] = far if symbol in lengths else max(low, 2)
        return symbolic_twin(self.traced, sizes)

    def _at_both_lengths(self, short: Core, seen: Mask) -> tuple[Replacement, int]:
        """What explains the short and the long graph, and the length of the long one."""
        assert self.long is not None and self.long_evaluator is not None
        back = {original: copy for copy, original in self.long.original.items()}
        anchor = back[self.twin.original[short.anchor]]
        core = read_core(anchor, self.long.graph, self.patterns)
        if query_symbols(self.twin.original[short.q]):
            high = max(bounds(self.traced, s)[1] for s in query_symbols(self.twin.original[short.q]))
            beyond = [h for h in length_hints(short.terms, self.twin.graph, short.length) if core.length <= h < high]
            if beyond:
                reason = f"the mask uses a constant {max(beyond)}, beyond the longest length evaluated, {core.length}"
                raise CoreRefused(reason, short.anchor)
        same = (core.scale, core.softcap, core.causal, core.k_transposed)
        if same != (short.scale, short.softcap, short.causal, short.k_transposed):
            raise CoreRefused("the scale or softcap of the scores depends on the length", short.anchor)
        visible = core.visible(self.long_evaluator)
        rows = [expected(m, short.length) for m in (seen, visible.mask)]
        if not torch.equal(*rows):
            raise CoreRefused("the mask is of another kind at another length", short.anchor)
        return choose(core, visible), core.length

    def _prove(self, core: Core, spec: Replacement) -> None:
        """Region and replacement on random values, where the sizes allow it (always where sizes are symbols)."""
        if torch.Size(core.lead).numel() * core.length**2 > PROVABLE:
            return
        like = {"device": torch.device("cpu"), "lead": core.lead, "dtype": torch.float32, "out_dtype": torch.float32}
        try:
            error = prove(core, self.twin.graph, lambda q, k, v, sinks: write(eagerly, spec, q, k, v, sinks, like))
        except (RuntimeError, ValueError, TypeError, NoValue) as failed:
            raise CoreRefused(f"the core could not be run on its own: {failed}", core.anchor) from failed
        if not error <= TOLERANCE:
            raise CoreRefused(f"{spec.name} differs from the graph by {error:.1e} (relative, fp32)", core.anchor)


def query_symbols(node: fx.Node) -> set[Any]:
    """The symbols in the number of queries."""
    val = node.meta.get("val")
    size = val.shape[-2] if isinstance(val, Tensor) else None
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _replace(graph: fx.Graph, match: _Match, twin: Twin, anchor: fx.Node) -> RewriteRecord:
    core, spec = match.core, match.spec
    q, k, v, out = (twin.original[n] for n in (core.q, core.k, core.v, core.out))
    sinks = None if core.sinks is None else twin.original[core.sinks]
    shared = unrepeated(core.k, core.k_transposed), unrepeated(core.v, False)
    if shared[0] is not None and shared[1] is not None and shape(shared[0])[1] == shape(shared[1])[1]:  # type: ignore[index]
        k, v = twin.original[shared[0]], twin.original[shared[1]]
        groups = core.lead[1] // shape(shared[0])[1]  # type: ignore[index]
        spec = dataclasses.replace(spec, k_transposed=False, groups=groups)
    insert = Insert(graph, out)
    values = [n.meta["val"] for n in (q, k, v)]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    q, k, v = (n if n.meta["val"].dtype == dtype else insert(torch.ops.aten.to.dtype, n, dtype) for n in (q, k, v))
    like = {
        "device": values[0].device,
        "lead": core.lead,
        "dtype": dtype,
        "out_dtype": out.meta["val"].dtype,
    }
    new = write(insert, spec, q, k, v, sinks, like)
    modules = modules_of(anchor)
    name, source = anchor.name, source_of(anchor)
    returned = any(user.op == "output" for user in out.users)
    out.replace_all_uses_with(new)
    erased = tuple(erase_dead(graph, [out]))
    if returned:
        new._rename(erased[0])  # an exported program knows its outputs by name
    heads = {"heads": core.lead[1:], "groups": spec.groups} if len(core.lead) > 1 else {}
    return RewriteRecord(
        anchor=name,
        module=modules[-1] if modules else "",
        nodes=erased,
        replacement=spec.name if spec.name == SDPA else "fla_swap::window_attention_fwd",
        facts=spec.facts() | heads | _sinks(core, twin),
        source=source,
        checked_length=match.checked,
    )


def _sinks(core: Core, twin: Twin) -> dict[str, str]:
    return {} if core.sinks is None else {"sinks": twin.graph.weights[core.sinks.name]}


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[str]:
    """Erase the nodes, and what fed nothing but them, as far as nothing else reads it. Returns the names."""
    erased: list[str] = []
    stack = list(nodes)
    gone: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in gone or node.op in ("placeholder", "output"):
            continue
        dead = _dead_users(node)
        if dead is None:
            continue
        for each in [*reversed(dead), node]:
            stack.extend(each.all_input_nodes)
            graph.erase_node(each)
            gone.add(each)
            erased.append(each.name)
    return erased


def _dead_users(node: fx.Node) -> list[fx.Node] | None:
    """Everything that reads `node`, in order, when it leads nowhere; None when something alive reads it."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op != "call_function" or len(found) > _CLOSURE:
                return None
            if user not in found:
                found[user] = None
                stack.append(user)
    if not all(_erasable(n, node, found) for n in (node, *found)):
        return None
    return sorted(found)


def _idle(node: fx.Node) -> bool:
    if node.target in SDPA_OPS:
        return not argument(node, 4, "dropout_p", 0.0)
    return node.target in DROPOUT and argument(node, 2, "train", True) is False


def _erasable(node: fx.Node, root: fx.Node, together: dict[fx.Node, None]) -> bool:
    if node.op == "get_attr" or node.target in LAYOUT or "_assert_tensor_metadata" in str(node.target):
        return True
    if str(node.target) == FLEX or getattr(node.target, "__name__", "") in BATCHED:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return "_operator" in str(getattr(node.target, "__module__", ""))
    if not schema.is_mutable:
        # A core that drops something is never replaced, so the random operators that feed one draw nothing.
        return torch.Tag.nondeterministic_seeded not in node.target.tags or _idle(node)  # type: ignore[union-attr]
    written = alias_root(node)
    return written is root or written in together or (written is node and not node.users)
