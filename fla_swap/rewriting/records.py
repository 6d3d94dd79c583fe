"""What a rewrite did, and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram


@dataclass(frozen=True, kw_only=True)
class RewriteRecord:
    """One replaced core.

    `anchor`: the softmax or fused call; `module`: the deepest module around it. `nodes`: the graph nodes that were
    erased, by name (a mask shared by several cores stands with the first). `replacement`: what computes the same
    function now, `facts`: what was read from the graph to say so. `checked_length`: the longest length, or the only
    one, at which the mask was compared.
    """

    anchor: str
    module: str
    nodes: tuple[str, ...]
    replacement: str
    facts: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    checked_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class SkippedCore:
    """One attention core that stays as it was, and why."""

    anchor: str
    module: str
    reason: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """The rewritten program, one record for each replaced core, and the cores that were left alone.

    `note` says so when the graph was passed through untouched.
    """

    program: ExportedProgram | fx.GraphModule
    records: tuple[RewriteRecord, ...] = ()
    skipped: tuple[SkippedCore, ...] = ()
    note: str = ""

    def module(self) -> nn.Module:
        """The program as a callable module."""
        return self.program.module() if isinstance(self.program, ExportedProgram) else self.program

    def summary(self) -> str:
        """One line for a log."""
        reasons = sorted({s.reason for s in self.skipped})
        text = f"{len(self.records)} attention cores rewritten, {len(self.skipped)} left as they are"
        return text + "".join(f"; {r}" for r in reasons) + (f" ({self.note})" if self.note else "")
