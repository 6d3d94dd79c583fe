"""One core of a site with what lies before it, and whether two of them are heads of the same attention."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fla_swap.patterns.heads import HeadTables
from fla_swap.patterns.path import Path
from fla_swap.patterns.rope import same_rotation


class Stop(Exception):
    """A slot of the grammar that did not hold."""

    def __init__(self, slot: str, reason: str, node: fx.Node):
        super().__init__(reason)
        self.slot, self.reason, self.node = slot, reason, node


def unread(error: Exception) -> str:
    """Why code that a recogniser or the matcher failed on is refused: which error it was, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename] or frames
    where = f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""
    lines = str(error).strip().splitlines()
    said = f": {lines[0][:200]}" if lines else ""
    return f"fla_swap could not read this code, {type(error).__name__}{said}{where}: please report it"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One core of a site (code that loops over heads has several): its node in each graph, its facts and paths."""

    nodes: tuple[fx.Node, ...]
    core: dict[str, Any]
    q: Path
    k: Path
    v: Path
    heads: HeadTables | None = None
    rows_at: Mapping[str, Tensor | None] = field(default_factory=dict)

    @property
    def tables(self) -> HeadTables:
        assert self.heads is not None
        return self.heads


def agree(a: Part, b: Part) -> bool:
    """Whether two heads of one attention are alike but for their projections and masks."""
    same = all(a.core.get(n) == b.core.get(n) for n in ("scale", "softcap", "dropout", "causal"))
    paths = all(_alike(x, y) for x, y in ((a.q, b.q), (a.k, b.k), (a.v, b.v)))
    return same and paths and a.core.get("sinks") is b.core.get("sinks") is None


def _alike(a: Path, b: Path) -> bool:
    numbers = (a.scale, a.clip, a.temperature) == (b.scale, b.clip, b.temperature)
    return numbers and same_rotation(a.rope, b.rope) and (a.norm is None) == (b.norm is None)
