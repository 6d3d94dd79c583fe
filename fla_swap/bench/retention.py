"""Retention against softmax attention as sequences grow: the table and the picture.

    fla-swap bench retention [--peer fla] [--out DIR]

B 8, H 32, D 128, bf16, T from 128 to 16,384, forward, and forward and backward: our retention, PyTorch's flash
attention (`scaled_dot_product_attention`, causal), and the peer's chunked retention if asked for.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from fla_swap.bench.catalogue import Shape
from fla_swap.bench.measuring import Row, Task
from fla_swap.bench.operators import PLACE, Settings, about, where_of
from fla_swap.bench.processes import Place, run_task
from fla_swap.bench.results import describe, rows_of
from fla_swap.bench.tables import markdown_table, milliseconds_text, times_text

TIMES = tuple(1 << power for power in range(7, 15))
TINY_TIMES = (32, 64)
LABELS = {
    "ours": "retention (fla_swap)",
    "fla": "retention (flash-linear-attention)",
    "sdpa": "softmax (flash attention)",
}


def run(settings: Settings, console: Console, report: Callable[[list[Row]], None]) -> None:
    """All lengths of one way in one process, the shortest first; `report` gets all rows after each way."""
    base = Shape(batch=1, heads=2, width=16) if settings.tiny else Shape()
    shapes = tuple(replace(base, time=t) for t in (TINY_TIMES if settings.tiny else TIMES))
    ways = ("ours", "sdpa", "fla") if settings.peer else ("ours", "sdpa")
    where, rows = where_of(settings.device), []
    with ThreadPoolExecutor(len(ways)) as pool:
        waiting = {}
        for way in ways:
            task = Task(
                operator="retention", way=way, shapes=shapes, device=settings.device, cold=False, compared=False
            )
            waiting[pool.submit(run_task, task, settings.place, settings.time_limit)] = task
        for future in as_completed(waiting):
            task = waiting[future]
            found = rows_of(task, future.result(), where=where, code="")
            console.print(f"{task.name}: {describe(found)}", markup=False, highlight=False)
            rows += found
            report(sorted(rows, key=lambda row: (ways.index(row.way), time_of(row))))


def time_of(row: Row) -> int:
    return int(row.shape.split()[1][1:])


def by_time(rows: list[Row]) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(time_of(row), {})[row.way] = row
    return dict(sorted(found.items()))


def table(rows: list[Row]) -> list[str]:
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = []
    for field, title in (("forward", "Forward"), ("both", "Forward and backward")):
        head = ["T", *(LABELS[way] for way in ways), *(f"{LABELS[w]} / ours" for w in ways if w != "ours")]
        body = []
        for length, found in by_time(rows).items():
            values = {way: getattr(found[way], field) if way in found else None for way in ways}
            cells = [milliseconds_text(values[way]) for way in ways]
            gains = [times_text(values[way], values.get("ours")) for way in ways if way != "ours"]
            body.append([f"{length:,}", *cells, *gains])
        lines += [f"{title}, milliseconds (median):", "", *markdown_table([head, *body]), ""]
    lines += [f"- {LABELS[row.way]}, {row.shape}: {note}" for row in rows for note in row.notes]
    return lines


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Milliseconds over T, both axes logarithmic; a panel for forward, one for forward and backward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), (("forward", "forward"), ("both", "forward and backward")), strict=True)
    for axes, (field, name) in panels:
        for way in dict.fromkeys(row.way for row in rows):
            points = [(time_of(r), getattr(r, field)) for r in rows if r.way == way and getattr(r, field) is not None]
            axes.plot([t for t, _ in points], [y for _, y in points], marker="o", label=LABELS[way])
        axes.set(title=name, xlabel="tokens in a sequence", ylabel="milliseconds")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(str(path), dpi=110)


def retention_command(
    peer: Annotated[str | None, typer.Option(help="Beside ours, measure this library's retention: fla.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for retention.md, .png and .json.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the command on a CPU.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds for one way; waiting for the GPU not counted.")] = 120.0,
    cache: Annotated[Path | None, typer.Option(help="Keeps kernels and the peer's choices for later runs.")] = None,
    lock: Annotated[Path, typer.Option(help="Who holds this file's lock may time on the GPU.")] = PLACE.lock,
) -> None:
    """Retention against flash attention, T from 128 to 16,384."""
    if peer not in (None, "fla"):
        raise typer.BadParameter(f"--peer takes fla, got {peer!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = Place(lock=lock, cache=cache)
    settings = Settings(device=device, peer=peer, tiny=tiny, time_limit=time_limit, place=place)
    console = Console(width=None if sys.stdout.isatty() else 200)
    facts = about(settings)
    facts["command"] = "fla-swap bench retention" + f" --peer {peer}" * bool(peer) + " --tiny" * tiny
    shape = Shape(batch=1, heads=2, width=16) if tiny else Shape()
    sizes = f"B {shape.batch}, H {shape.heads}, D {shape.width}, bf16"
    begin = time.perf_counter()

    def report(rows: list[Row]) -> None:
        facts["seconds"] = f"{time.perf_counter() - begin:.0f}"
        if folder is not None:
            write(rows, facts, sizes, f"{sizes}; {where_of(device)}", folder)
        if len({row.way for row in rows}) == (3 if peer else 2):
            console.print("\n".join(page(rows, facts, sizes)), markup=False, highlight=False, soft_wrap=True)

    run(settings, console, report)


def page(rows: list[Row], facts: dict[str, str], sizes: str) -> list[str]:
    lines = ["# Retention against softmax attention", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    how = "replays of a CUDA graph, L2 cache overwritten before each"
    return [*lines, f"{sizes}, causal; {how}.", "", *table(rows)]


def write(rows: list[Row], facts: dict[str, str], sizes: str, title: str, folder: Path) -> None:
    """retention.json, retention.png and retention.md, which shows the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": facts, "rows": [asdict(row) for row in rows]}
    (folder / "retention.json").write_text(json.dumps(data, indent=1))
    plot(rows, title, folder / "retention.png")
    head, *rest = page(rows, facts, sizes)
    text = "\n".join([head, "", "![milliseconds over T](retention.png)", *rest])
    (folder / "retention.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    typer.run(retention_command)
