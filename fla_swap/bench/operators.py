"""Every operator against its floor and a peer: time, memory, cold start, error.

    fla-swap bench ops [--peer fla] [--ops gla,hgrn] [--shapes all] [--decode] [--json raw.json] [--out table.md]

Each operator and way runs in a process of its own with fresh compiler caches and a time limit; several compile at
once, one at a time measures. A peer that refuses, crashes or hangs is recorded with its reason. Rows are written as
they come; the same command with the same `--json` goes on where it stopped (an operator whose code has changed since is
measured again).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fla_swap.bench import decode
from fla_swap.bench.catalogue import CASES, Case, Shape, by_name
from fla_swap.bench.measuring import Row, Task, failed
from fla_swap.bench.numerics import environment
from fla_swap.bench.processes import run_task
from fla_swap.bench.work import Rates

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
DEFAULT = Shape()
TINY = Shape(batch=1, time=64, heads=2, width=16)
TOKENS, CHANNELS = 16_384, 4096
TIMES, WIDTHS = (512, 2048, 8192, 16_384), (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str
    peer: str | None = None
    operators: tuple[str, ...] = tuple(case.name for case in CASES)
    shapes: str = "default"
    tiny: bool = False
    decode: bool = False
    retry: bool = False
    time_limit: float = 60.0
    workers: int = 8
    lock: Path = Path(tempfile.gettempdir()) / "gpu.lock"


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


def shapes_of(settings: Settings) -> list[tuple[Shape, ...]]:
    """Groups of shapes that one process measures: equal widths, so that they share compiled kernels."""
    if settings.tiny:
        return [(TINY,)]
    if settings.shapes == "default":
        return [(DEFAULT,)]
    return [
        tuple(Shape(batch=TOKENS // t, time=t, heads=CHANNELS // width, width=width) for t in TIMES) for width in WIDTHS
    ]


def code_of(case: Case, way: str) -> str:
    """What a row depends on: our sources of the operator's folder, or the peer's version."""
    if way == "fla":
        return f"fla {peer_version()}"
    operator = case.load()
    if way != "ours" or operator is None:
        return f"torch {torch.__version__}"
    module = str(operator.__module__).split(".")
    folder = KERNELS / module[module.index("kernels") + 1] if "kernels" in module else KERNELS
    digest = hashlib.sha256()
    for path in [KERNELS / "common.py", *sorted(folder.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def peer_version() -> str:
    for package in ("flash-linear-attention", "fla-core"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def ways_of(case: Case, settings: Settings) -> list[str]:
    peers = [peer.name for peer in case.peers if peer.name != "sdpa" or case.name == "window_attention"]
    peers = peers if settings.peer else []
    if settings.decode:
        peers = ["fla"] if settings.peer and case.name in decode.PEERS else []
    return ["ours", *peers]


def tasks_of(settings: Settings) -> list[Task]:
    """Ours first, so that a run cut short has them all."""
    groups = shapes_of(settings)
    if settings.decode:
        heads, width = (2, 16) if settings.tiny else (DEFAULT.heads, DEFAULT.width)
        groups = [tuple(Shape(batch=b, time=1, heads=heads, width=width) for b in (1, 64))]
    kind = "decode" if settings.decode else "operator"
    tasks = [
        Task(operator=name, way=way, shapes=shapes, device=settings.device, kind=kind)
        for name in settings.operators
        for way in ways_of(by_name()[name], settings)
        for shapes in groups
    ]
    return sorted(tasks, key=lambda task: task.way != "ours")


def absent(settings: Settings) -> dict[str, str]:
    """Operators that are left out, and why."""
    found = {}
    for name in settings.operators:
        case = by_name()[name]
        if case.load() is None:
            found[name] = f"fla_swap.ops has no {name} yet"
        elif settings.decode and case.step() is None:
            found[name] = f"fla_swap.ops has no {name}_step yet"
    return found


def label(task: Task, shape: Shape) -> str:
    return ("step " if task.kind == "decode" else "") + shape.label


def open_shapes(task: Task, results: Results, code: str, retry: bool) -> tuple[Shape, ...]:
    """The shapes that the file has no row for (or only a failed one, where failures are tried again)."""
    found = {
        row.shape: row
        for row in results.here()
        if (row.operator, row.way, row.code) == (*_which(task), code) and not any("no result" in n for n in row.notes)
    }
    return tuple(s for s in task.shapes if label(task, s) not in found or (retry and found[label(task, s)].notes))


def _which(task: Task) -> tuple[str, str]:
    return task.operator, task.way


def run(settings: Settings, results: Results, console: Console, report: Callable[[], None]) -> None:
    """Measure what is missing; `report` is called after each process."""
    task = Task(operator="rates", way="", shapes=(), device=settings.device, kind="rates")
    lines, note = run_task(task, settings.lock, settings.time_limit)
    if not lines:
        raise SystemExit(f"could not measure this machine's rates: {note}")
    results.rates[results.where] = Rates(**lines[-1])
    console.print(_rates(results.rates[results.where]))
    left_out = absent(settings)
    for name, reason in left_out.items():
        console.print(f"{name}: left out: {reason}")
    begin = time.perf_counter()
    with ThreadPoolExecutor(settings.workers) as pool:
        waiting = {}
        for task in tasks_of(settings):
            if task.operator in left_out:
                continue
            code = code_of(by_name()[task.operator], task.way)
            shapes = open_shapes(task, results, code, settings.retry)
            if shapes:
                task = replace(task, shapes=shapes)
                limit = settings.time_limit * len(shapes)
                keep = partial(_keep, task, results, code, report)
                waiting[pool.submit(run_task, task, settings.lock, limit, keep)] = task, code
        for number, future in enumerate(as_completed(waiting), 1):
            task, code = waiting[future]
            rows = rows_of(task, future.result(), where=results.where, code=code)
            results.add(rows)
            report()
            spent = f"[{number}/{len(waiting)}, {time.perf_counter() - begin:.0f} s]"
            console.print(f"{spent} {task.name}: {describe(rows)}", markup=False, highlight=False)


def _keep(task: Task, results: Results, code: str, report: Callable[[], None], lines: list[dict[str, Any]]) -> None:
    """What a process has measured so far, should nobody be there when it ends."""
    results.add(rows_of(task, (lines, ""), where=results.where, code=code))
    report()


def rows_of(task: Task, found: tuple[list[dict[str, Any]], str], *, where: str, code: str) -> list[Row]:
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


def _rates(rates: Rates) -> str:
    return (
        f"copy {rates.copy / 1e12:.2f} TB/s, bf16 product {rates.product / 1e12:.0f} TFLOP/s, "
        f"exponentials {rates.exponential / 1e12:.2f} T/s"
    )


def command_of(settings: Settings) -> str:
    """The command that measures this, without files and limits."""
    parts = ["fla-swap bench ops"]
    if settings.peer:
        parts.append(f"--peer {settings.peer}")
    if settings.operators != Settings.operators:
        parts.append("--ops " + ",".join(settings.operators))
    if settings.shapes != "default":
        parts.append(f"--shapes {settings.shapes}")
    parts += ["--decode"] * settings.decode + ["--tiny"] * settings.tiny
    return " ".join(parts)


def about(settings: Settings) -> dict[str, str]:
    found = environment(settings.device)
    if settings.peer:
        found["peer"] = f"flash-linear-attention {peer_version()}"
    found["command"] = command_of(settings)
    found["load"] = f"{os.getloadavg()[0]:.1f} at the start; {settings.workers} processes compile at once"
    return found


def where_of(device: str) -> str:
    facts = environment(device)
    return f"{facts['GPU'] if device.startswith('cuda') else device}, torch {facts['torch']}, triton {facts['triton']}"


def names(text: str | None) -> tuple[str, ...]:
    """The operators of a comma-separated list."""
    if text is None:
        return Settings.operators
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in chosen if name not in by_name()]
    if unknown:
        raise typer.BadParameter(f"no operator called {unknown[0]!r}; there are {', '.join(by_name())}")
    return chosen


def ops_command(
    peer: Annotated[str | None, typer.Option(help="Measure this library's operators beside ours: fla.")] = None,
    ops: Annotated[str | None, typer.Option(help="Only these operators, separated by commas.")] = None,
    shapes: Annotated[str, typer.Option(help="default (B8 T2048 H32 D128) or all.")] = "default",
    decode: Annotated[bool, typer.Option("--decode", help="Measure decode steps instead of whole sequences.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Every row; the run goes on from it.")] = None,
    table: Annotated[Path | None, typer.Option("--out", help="Write the tables to this Markdown file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny shape, to try the command on a CPU.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Measure again what failed.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds a shape; waiting for the GPU is not counted.")] = 60.0,
    workers: Annotated[int, typer.Option(help="Processes that compile at once.")] = 8,
    lock: Annotated[Path, typer.Option(help="Who holds this file's lock may time on the GPU.")] = Settings.lock,
) -> None:
    """Every operator against its floor and a peer: time, memory, cold start, error."""
    from fla_swap.bench.tables import markdown

    if peer not in (None, "fla"):
        raise typer.BadParameter(f"--peer takes fla, got {peer!r}")
    if shapes not in ("default", "all"):
        raise typer.BadParameter(f"--shapes takes default or all, got {shapes!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        device=device,
        peer=peer,
        operators=names(ops),
        shapes=shapes,
        tiny=tiny,
        decode=decode,
        retry=retry,
        time_limit=time_limit,
        workers=workers,
        lock=lock,
    )
    console = Console(width=None if sys.stdout.isatty() else 200)
    results = Results(where=where_of(device), about=about(settings))
    results.read(json_file)
    begin = time.perf_counter()

    def report() -> None:
        with results.writing:
            results.about["seconds"] = f"{time.perf_counter() - begin:.0f}"
            results.write(json_file)
            if table is not None:
                table.parent.mkdir(parents=True, exist_ok=True)
                table.write_text(markdown(results))

    run(settings, results, console, report)
    report()
    console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(ops_command)
