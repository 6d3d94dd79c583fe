"""FlexAttention, `flex_attention(q, k, v, score_mod, block_mask, …)`: its two functions are read off their values.

They stand in the graph as modules of their own, called with a score and its (batch, head, query, key); evaluated over
the whole grid they are tables. (2412.05496)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fla_swap.errors import NoValue
from fla_swap.patterns.base import ABSENT, Found, Refused, Result
from fla_swap.patterns.core import MaskTerm
from fla_swap.patterns.graph import CapturedGraph, shape

PROBES = (1.0, -2.0, 7.5, 30.0)
_HIDDEN = -1e4
_LARGE = 1e6
_CLOSE = 1e-5


class FlexRefused(Exception):
    """A function of the call does something that a site cannot state."""


@dataclass(frozen=True, kw_only=True)
class FlexCore:
    """The higher-order operator: (q, k, v, score_mod, block mask, scale, options, what each function reads besides)."""

    name: str = "flex"
    slot: str = "core"

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        if str(node.target) != "flex_attention" or len(node.args) < 9:
            return ABSENT
        outs = {u.args[1]: u for u in node.users if len(u.args) > 1 and u.users}
        if set(outs) != {0}:
            return Refused("somebody reads the sums of the exponentials that flex_attention returns", node)
        (q, k, v), scale = node.args[:3], node.args[5]
        assert isinstance(scale, float)
        facts: dict[str, Any] = {"q": q, "k": k, "v": v, "out": outs[0], "k_transposed": False, "scale": scale}
        facts |= {"causal": False, "dropout": 0.0, "mask": []}
        try:
            _read_mask(node, graph, facts)
            _read_scores(node, graph, facts)
        except FlexRefused as refused:
            return Refused(str(refused), node)
        return Found(facts=facts, nodes=(node,))


def _read_mask(node: fx.Node, graph: CapturedGraph, facts: dict[str, Any]) -> None:
    blocks: Any = node.args[4]
    mod = _Function.of("mask_mod", node, blocks[-1], node.args[8], graph)
    seen = mod.table(None)
    facts["mask"].append(MaskTerm(kind="keep", node=mod.node, table=seen))
    _check_blocks(blocks, seen, graph)


def _check_blocks(blocks: Any, seen: Tensor, graph: CapturedGraph) -> None:
    """The kernels skip what the blocks leave out, and ask no mask_mod in full ones: both must say what it says.

    `blocks`: the fields of a BlockMask: lengths, then for [B, H, query block] the number of partial key blocks and
    which they are, the same of full ones, …, the sizes of a block, mask_mod. `seen` [B or 1, H or 1, T, S].
    """
    tensors = [b for b in blocks if not isinstance(b, int)][:4]
    if any(graph.is_open(t) for t in tensors):
        raise FlexRefused("a block mask that depends on the values that the model reads")
    size = [min(block, length) for block, length in zip(blocks[-3:-1], seen.shape[-2:], strict=True)]
    counts = [-(-length // block) for block, length in zip(size, seen.shape[-2:], strict=True)]
    try:
        values: list[Any] = [None if t is None else graph.evaluate(t) for t in tensors]
    except (NoValue, RuntimeError) as error:
        raise FlexRefused(f"the blocks of its block mask cannot be evaluated: {error}") from error
    partial = _listed(values[0], values[1], counts)
    full = None if values[2] is None else _listed(values[2], values[3], counts)
    shown = _by_block(seen, size, counts)
    listed = partial if full is None else partial | full
    if bool((shown.any(-1) & ~listed).any()):
        raise FlexRefused("a block mask whose blocks leave out what its mask_mod shows")
    if full is not None and bool((~shown.all(-1) & full).any()):
        raise FlexRefused("a block mask whose full blocks hold what its mask_mod hides")


def _listed(numbers: Tensor, indices: Tensor, counts: Sequence[int]) -> Tensor:
    """bool [B, H, query blocks, key blocks]: those that are listed."""
    numbers, indices = numbers[..., : counts[0]], indices[..., : counts[0], :]
    named = torch.arange(indices.shape[-1]) < numbers[..., None]
    found = torch.zeros(*indices.shape[:-1], max(counts[1], int(indices.max()) + 1), dtype=torch.int64)
    return found.scatter_add(-1, indices.long(), named.long())[..., : counts[1]] > 0


def _by_block(seen: Tensor, size: Sequence[int], counts: Sequence[int]) -> Tensor:
    """bool [B, H, query blocks, key blocks, pairs] of `seen`; a last block that is cut is filled with its end."""
    rows, columns = (
        torch.arange(n * block).clamp(max=length - 1)
        for n, block, length in zip(counts, size, seen.shape[-2:], strict=True)
    )
    whole = seen[..., rows, :][..., columns].unflatten(-1, (counts[1], size[1])).unflatten(-3, (counts[0], size[0]))
    return whole.transpose(-3, -2).flatten(-2)


def _read_scores(node: fx.Node, graph: CapturedGraph, facts: dict[str, Any]) -> None:
    mod = _Function.of("score_mod", node, node.args[3], node.args[7], graph)
    found = read_function(mod.table)
    facts["scale"] *= found.factor
    if found.softcap is not None:
        facts["softcap"] = found.softcap
    if bool((found.bias != 0).any()):
        facts["mask"].append(MaskTerm(kind="add", node=mod.node, table=found.bias))


@dataclass(frozen=True, kw_only=True)
class _Function:
    """`score_mod` or `mask_mod`: its module in the graph, what it reads besides, and the sizes of the grid."""

    name: str
    node: fx.Node
    body: fx.GraphModule
    others: tuple[Any, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(name: str, node: fx.Node, at: Any, others: Any, graph: CapturedGraph) -> _Function:
        body = getattr(graph.module, str(at.target))
        for other in others:
            if graph.is_open(other):
                raise FlexRefused(f"{name} reads values that depend on what the model reads")
            if isinstance(other, fx.Node) and (learned := graph.parameters_of(other)):
                raise FlexRefused(f"{name} reads the parameter {learned[0]!r}: a learned bias on the scores")
        try:
            values = tuple(graph.evaluate(o) if isinstance(o, fx.Node) else o for o in others)
        except NoValue as unknown:
            raise FlexRefused(f"{name} reads {unknown}, which has no values") from unknown
        q, k = shape(node.args[0]), shape(node.args[1])
        assert q is not None and k is not None
        return _Function(name=name, node=at, body=body, others=values, sizes=(*q[:3], k[2]))

    def table(self, score: float | Tensor | None) -> Tensor:
        """[B or 1, H or 1, T, S]: the function of every place, and of one score or one for each place."""
        inputs = [n for n in self.body.graph.nodes if n.op == "placeholder"]
        places = inputs[:4] if score is None else inputs[1:5]
        sizes = [n if p.users else 1 for n, p in zip(self.sizes[:2], places, strict=False)] + list(self.sizes[2:])
        arguments = [torch.arange(n, dtype=torch.int32) for n in sizes]
        call: Callable[..., Tensor] = lambda *a: self.body(*a, *self.others)  # noqa: E731
        for number in (3, 2, 1, 0):
            own = tuple(0 if i == number else None for i in range(4))
            call = torch.vmap(call, in_dims=own if score is None else (0, *own))
        if score is not None:
            whole = torch.as_tensor(score, dtype=torch.float32)
            arguments.insert(0, whole.expand(sizes) if whole.dim() == 0 else whole[: sizes[0], : sizes[1]])
        try:
            with torch.no_grad():
                return call(*arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            raise FlexRefused(f"{self.name} cannot be evaluated for every score: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Read:
    """score ↦ factor · score + bias, or softcap · tanh(factor · score / softcap) + bias; −inf in `bias` hides."""

    bias: Tensor
    factor: float = 1.0
    softcap: float | None = None


def read_function(f: Callable[[float | Tensor], Tensor]) -> Read:
    """The one of the two forms that `f` has on every score that is tried. Raises `FlexRefused`."""
    bias = f(0.0)
    hidden = bias <= _HIDDEN
    if bool(hidden.all()):
        raise FlexRefused("score_mod hides every score")
    bias = bias.masked_fill(hidden, -math.inf)
    for read in (_affine(f, bias, hidden), _capped(f, bias, hidden)):
        if read is not None and _holds(read, f, hidden):
            return read
    if _same(f(1.0), bias, hidden) and _same(f(_LARGE), bias, hidden):
        raise FlexRefused("score_mod does not depend on the score")
    raise FlexRefused(
        "score_mod is neither a bias, a constant factor nor a softcap of the score: a site cannot state what it is"
    )


def _affine(f: Callable[[float | Tensor], Tensor], bias: Tensor, hidden: Tensor) -> Read | None:
    factor = _at_least_bias(f(PROBES[-1]) - bias, bias, hidden) / PROBES[-1]
    if not factor > 0:
        return None
    return Read(bias=bias, factor=1.0 if abs(factor - 1.0) < _CLOSE else factor)


def _capped(f: Callable[[float | Tensor], Tensor], bias: Tensor, hidden: Tensor) -> Read | None:
    cap = _at_least_bias(f(_LARGE) - bias, bias, hidden)
    slope = _at_least_bias(f(1.0) - bias, bias, hidden) / cap if cap > 0 else math.nan
    if not (0 < cap < _LARGE / 10 and 0 < slope < 1):
        return None
    factor = math.atanh(slope) * cap
    cap, factor = (round(x, 4) if abs(x - round(x, 4)) < _CLOSE * abs(x) else x for x in (cap, factor))
    return Read(bias=bias, factor=factor, softcap=cap)


def _at_least_bias(values: Tensor, bias: Tensor, hidden: Tensor) -> float:
    """The value where the bias is smallest, so where least is lost to rounding."""
    return float(values.flatten()[bias.abs().masked_fill(hidden, math.inf).argmin()])


def _holds(read: Read, f: Callable[[float | Tensor], Tensor], hidden: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    scores: Sequence[float | Tensor] = (
        *PROBES,
        _LARGE,
        *(size * torch.randn(hidden.shape, generator=generator) for size in (1.0, 5.0, 50.0)),
    )
    return all(_same(f(s), _predicted(read, s), hidden) for s in scores)


def _predicted(read: Read, score: float | Tensor) -> Tensor:
    score = torch.as_tensor(score) * read.factor
    return read.bias + (score if read.softcap is None else read.softcap * torch.tanh(score / read.softcap))


def _same(found: Tensor, wanted: Tensor, hidden: Tensor) -> bool:
    if not bool((found[hidden] <= _HIDDEN / 10).all()):
        return False
    difference = (found - wanted)[~hidden].abs()
    return bool((difference <= _CLOSE * (1 + wanted[~hidden].abs())).all())
