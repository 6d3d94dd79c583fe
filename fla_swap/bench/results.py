"""The rows of a benchmark's file, and what a process wrote as rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from fla_swap.bench.catalogue import Shape
from fla_swap.bench.measuring import Row, Task, failed
from fla_swap.bench.processes import Lines
from fla_swap.bench.work import Rates


@dataclass(kw_only=True)
class Results:
    """All rows of a file, also those of other machines and older code; `rates` by machine."""

    where: str
    rates: dict[str, Rates] = field(default_factory=dict)
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    writing: Lock = field(default_factory=Lock, repr=False)

    def add(self, rows: Iterable[Row]) -> None:
        self.rows |= {row.key: row for row in rows}

    def here(self) -> list[Row]:
        return [row for row in list(self.rows.values()) if row.where == self.where]

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        data = {
            "about": self.about,
            "rates": {where: asdict(rate) for where, rate in self.rates.items()},
            "rows": [asdict(row) for row in list(self.rows.values())],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".writing")
        beside.write_text(json.dumps(data, indent=1))
        beside.replace(path)

    def read(self, path: Path | None) -> None:
        if path is None or not path.exists():
            return
        data = json.loads(path.read_text())
        self.rates = {where: Rates(**rate) for where, rate in data["rates"].items()}
        self.add(Row(**row) for row in data["rows"])


def label(task: Task, shape: Shape) -> str:
    return ("step " if task.kind == "decode" else "") + shape.label


def rows_of(task: Task, found: tuple[Lines, str], *, where: str, code: str) -> list[Row]:
    """The last line of each shape; how the process ended, if badly, is noted on the shape it was at."""
    lines, note = found
    rows: dict[str, Row] = {}
    for line in lines:
        values: dict[str, Any] = {**line, "where": where, "code": code}
        rows[line["shape"]] = Row(**values)
    if note:
        at = next(reversed(rows), None) or label(task, task.shapes[0])
        row = rows.setdefault(at, Row(operator=task.operator, way=task.way, shape=at, where=where, code=code))
        failed(row, note)
    return list(rows.values())


def describe(rows: list[Row]) -> str:
    parts = []
    for row in rows:
        times = [f"{n} {x:.3f}" for n in ("forward", "both", "graph", "eager") if (x := getattr(row, n)) is not None]
        cold = "" if row.cold_forward is None else f", cold {row.cold_forward:.1f} s"
        parts.append(
            f"{row.shape} " + ", ".join(times) + (" ms" if times else "") + cold + "".join(f" ({n})" for n in row.notes)
        )
    return "; ".join(parts) or "nothing"
