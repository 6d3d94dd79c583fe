"""Recognisers from outside: held against the protocol, and found in installed packages through an entry point.

A package brings them with `[project.entry-points."fla_swap.recognisers"]`, `NAME = "package.module:ATTRIBUTE"`, the
attribute being one recogniser or a tuple of them. They are loaded when a catalogue is first made, never on import.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import fx

from fla_swap.errors import RecogniserError
from fla_swap.patterns.base import FACTS, SLOTS, Absent, Found, Recogniser, Refused, Result
from fla_swap.patterns.graph import CapturedGraph, op_name, source_of

GROUP = "fla_swap.recognisers"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A recogniser from outside whose answers are checked; `origin` says where it came from."""

    inner: Recogniser
    origin: str

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def slot(self) -> str:
        return self.inner.slot

    def match(self, node: fx.Node, graph: CapturedGraph) -> Result:
        try:
            result = self.inner.match(node, graph)
        except Exception as error:
            raise RecogniserError(f"{self._where(node)} raised {type(error).__name__}: {error}") from error
        if not isinstance(result, Found | Absent | Refused):
            raise RecogniserError(f"{self._where(node)} answered {result!r}, expected Found, Absent or Refused")
        unknown = set(result.facts) - FACTS[self.slot] if isinstance(result, Found) else set()
        if unknown:
            raise RecogniserError(
                f"{self._where(node)} states {sorted(unknown)}, of which the grammar knows nothing; the facts of slot "
                f"{self.slot!r} are {sorted(FACTS[self.slot])}"
            )
        return result

    def _where(self, node: fx.Node) -> str:
        return f"recogniser {self.name!r} ({self.origin}) at {op_name(node)} ({source_of(node) or 'no source line'})"


def checked(recogniser: Any, origin: str) -> Checked:
    """`recogniser`, held against the protocol. Raises RecogniserError for anything else than an instance of one."""
    if isinstance(recogniser, Checked):
        return recogniser
    name, slot = getattr(recogniser, "name", None), getattr(recogniser, "slot", None)
    if isinstance(recogniser, type) or not isinstance(name, str) or not callable(getattr(recogniser, "match", None)):
        raise RecogniserError(
            f"{origin}: {recogniser!r} is no recogniser: an instance with `name`, `slot` and `match(node, graph)`"
        )
    if slot not in SLOTS:
        raise RecogniserError(f"{origin}: recogniser {name!r} has slot {slot!r}; the slots are {SLOTS}")
    return Checked(inner=recogniser, origin=origin)


def installed_recognisers() -> tuple[Recogniser, ...]:
    """The recognisers of every installed package that declares some, by the names of the entry points.

    Raises RecogniserError, naming the package, when one cannot be loaded or is none.
    """
    found: list[Recogniser] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        found += _loaded(entry)
    return tuple(found)


def _loaded(entry: EntryPoint) -> list[Checked]:
    package = entry.dist.name if entry.dist is not None else "unknown"
    origin = f"package {package!r}, entry point {entry.name} = {entry.value!r}"
    try:
        value = entry.load()
    except Exception as error:
        raise RecogniserError(
            f"{origin}: could not be loaded: {type(error).__name__}: {error}. Repair or uninstall the package, or pass "
            "patterns=() to do without the recognisers of installed packages"
        ) from error
    several = isinstance(value, Iterable) and not hasattr(value, "match")
    return [checked(r, origin) for r in (value if several else (value,))]
