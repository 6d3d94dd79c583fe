"""Every operator against its floor and a peer: time, memory, cold start, error.

    fla-swap bench ops [--peer fla] [--ops gla,hgrn] [--shapes all] [--decode] [--json raw.json] [--out table.md]

Each operator and way runs in a process of its own with fresh compiler caches and a time limit; several compile at
once, one at a time measures. First all of ours, few at a time (a cold start needs a core for itself), then the peers,
whose autotuners compile in threads. A peer that refuses, crashes or hangs is recorded with its reason. Rows are written
as they come; the same command with the same `--json` goes on where it stopped (an operator whose code has changed since
is measured again). `--cache DIR` keeps compiled kernels and the choices of the peer's autotuners for later commands.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fla_swap.bench import decode
from fla_swap.bench.catalogue import CASES, Case, Shape, by_name
from fla_swap.bench.measuring import Task
from fla_swap.bench.numerics import environment
from fla_swap.bench.processes import Lines, Place, run_task
from fla_swap.bench.results import Results, describe, label, rows_of
from fla_swap.bench.work import Rates

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
DEFAULT = Shape()
TINY = Shape(batch=1, time=64, heads=2, width=16)
TOKENS, CHANNELS = 16_384, 4096
TUNED_LONG = ("gsa", "gla", "retention", "linear_attention", "rwkv6", "simple_gla", "kda", "delta_rule")
"""Operators whose peer tries the most configurations (375 to 87)."""
TIMES, WIDTHS = (512, 2048, 8192, 16_384), (64, 128, 256)


PLACE = Place(lock=Path(tempfile.gettempdir()) / "gpu.lock")


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str
    peer: str | None = None
    operators: tuple[str, ...] = tuple(case.name for case in CASES)
    shapes: str = "default"
    tiny: bool = False
    decode: bool = False
    retry: bool = False
    quick: bool = False
    time_limit: float = 60.0
    peer_limit: float = 150.0
    workers: int = 8
    quiet: int = 5
    threads: int = 4
    place: Place = PLACE


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
    """Ours first, so that a run cut short has them all; peers that tune longest first of those."""
    groups = shapes_of(settings)
    if settings.decode:
        heads, width = (2, 16) if settings.tiny else (DEFAULT.heads, DEFAULT.width)
        groups = [tuple(Shape(batch=b, time=1, heads=heads, width=width) for b in (1, 64))]
    tasks = [
        Task(
            operator=name,
            way=way,
            shapes=shapes,
            device=settings.device,
            kind="decode" if settings.decode else "operator",
            cold=settings.shapes == "default" and not settings.decode,
            quick=settings.quick,
            threads=settings.threads,
        )
        for name in settings.operators
        for way in ways_of(by_name()[name], settings)
        for shapes in groups
    ]
    rank = {name: number for number, name in enumerate(TUNED_LONG)}
    return sorted(
        tasks, key=lambda task: (task.way != "ours", rank.get(task.operator, len(rank)) * (task.way == "fla"))
    )


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
    left_out = absent(settings)
    for name, reason in left_out.items():
        console.print(f"{name}: left out: {reason}")
    tasks = [task for task in tasks_of(settings) if task.operator not in left_out]
    ours = [task for task in tasks if task.way == "ours"]
    rates = Task(operator="rates", way="", shapes=(), device=settings.device, kind="rates")
    begin = time.perf_counter()
    quiet = settings.quiet if any(task.cold for task in ours) else settings.workers
    peers = [task for task in tasks if task.way != "ours"]
    for group, workers in (([rates, *ours], quiet), (peers, settings.workers)):
        with ThreadPoolExecutor(workers) as pool:
            waiting = {}
            for task in group:
                waiting |= _start(task, pool, settings, results, report)
            for number, future in enumerate(as_completed(waiting), 1):
                text = _take(waiting[future], future.result(), results)
                report()
                spent = f"[{number}/{len(waiting)}, {time.perf_counter() - begin:.0f} s]"
                console.print(f"{spent} {waiting[future].name}: {text}", markup=False, highlight=False)


def _start(
    task: Task, pool: ThreadPoolExecutor, settings: Settings, results: Results, report: Callable[[], None]
) -> dict[Future[tuple[Lines, str]], Task]:
    """The running task, or nothing where the file has all its rows."""
    if task.kind == "rates":
        return {pool.submit(run_task, task, settings.place, settings.time_limit): task}
    code = code_of(by_name()[task.operator], task.way)
    shapes = open_shapes(task, results, code, settings.retry)
    if not shapes:
        return {}
    task = replace(task, shapes=shapes)
    limit = (settings.time_limit if task.way == "ours" else settings.peer_limit) * len(shapes)
    keep = partial(_keep, task, results, report)
    return {pool.submit(run_task, task, settings.place, limit, keep): task}


def _take(task: Task, found: tuple[Lines, str], results: Results) -> str:
    """Add what a process has found; says what that is."""
    if task.kind == "rates":
        lines, note = found
        if not lines:
            raise SystemExit(f"could not measure this machine's rates: {note}")
        results.rates[results.where] = Rates(**lines[-1])
        return _rates(results.rates[results.where])
    rows = rows_of(task, found, where=results.where, code=code_of(by_name()[task.operator], task.way))
    results.add(rows)
    return describe(rows)


def _keep(task: Task, results: Results, report: Callable[[], None], lines: Lines) -> None:
    """What a process has measured so far, should nobody be there when it ends."""
    _take(task, (lines, ""), results)
    report()


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
    parts += ["--quick"] * settings.quick
    parts += ["--decode"] * settings.decode + ["--tiny"] * settings.tiny
    return " ".join(parts)


def about(settings: Settings) -> dict[str, str]:
    found = environment(settings.device)
    if settings.peer:
        found["peer"] = f"flash-linear-attention {peer_version()}"
    found["command"] = command_of(settings)
    ours = settings.quiet if any(task.cold for task in tasks_of(settings)) else settings.workers
    found["load"] = f"{os.getloadavg()[0]:.1f} at the start; {ours} processes of ours at once"
    if settings.peer:
        found["load"] += f", then {settings.workers} of the peer's with {settings.threads} compiling threads each"
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
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions; one shape of each width compared.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds a shape; waiting for the GPU is not counted.")] = 60.0,
    peer_limit: Annotated[float, typer.Option(help="The same for a peer, which has to tune.")] = Settings.peer_limit,
    workers: Annotated[int, typer.Option(help="Processes that compile at once.")] = Settings.workers,
    quiet: Annotated[int, typer.Option(help="The same while cold starts are measured.")] = Settings.quiet,
    threads: Annotated[int, typer.Option(help="Threads that compile a peer's configurations.")] = Settings.threads,
    cache: Annotated[Path | None, typer.Option(help="Keeps kernels and the peer's choices for later runs.")] = None,
    lock: Annotated[Path, typer.Option(help="Who holds this file's lock may time on the GPU.")] = PLACE.lock,
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
        quick=quick,
        time_limit=time_limit,
        peer_limit=peer_limit,
        workers=workers,
        quiet=quiet,
        threads=threads,
        place=Place(lock=lock, cache=cache),
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
