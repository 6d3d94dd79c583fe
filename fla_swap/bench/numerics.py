"""Every operator against its float64 reference: outputs, final states and all gradients.

    python -m fla_swap.bench.numerics --device cuda --out DIR [--quick]
    TRITON_INTERPRET=1 python -m fla_swap.bench.numerics --device cpu      # the kernels too, in Triton's interpreter

An error is RMS(reference − result) / RMS(reference); where the reference is exactly zero it is RMS(result). The bars
stand in `comparison.BARS`. Prints a table, writes `numerics.json` (every comparison) and `numerics.md`; exit status 1
when a bar is missed or an operator crashed. On a GPU every case and dtype runs in a process of its own, because a first
fault poisons the process (and most of the time goes into compiling, which runs in parallel so), and memory is filled
with NaN before every call, so that reading what was never written shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fla_swap.bench.comparison import BARS, Row, Settings, load_cases, run_case
from fla_swap.kernels.common import triton_interpreted


def run_in_process(name: str, settings: Settings) -> list[Row]:
    """Run one case in a process of its own. What it compared before a crash or the time limit is kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "fla_swap.bench.numerics",
            "--device",
            settings.device,
            "--seed",
            str(settings.seed),
        ]
        command += ["--case", name, "--rows", str(path)] + (["--quick"] if settings.quick else [])
        for dtype in settings.dtypes:
            command += ["--dtype", dtype]
        try:
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            done = subprocess.run(command, capture_output=True, text=True, timeout=settings.time_limit, env=environment)
            note = "" if done.returncode == 0 else _last_lines(done.stderr) or f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            note = f"not done after {settings.time_limit:g} s"
        rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    if note or not rows:
        rows.append(crash(name, rows[-1] if rows else None, note or "nothing was compared"))
    return rows


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])[-600:]


def crash(name: str, after: Row | None, note: str) -> Row:
    where = (
        "before the first comparison" if after is None else f"after {after.shape} {after.dtype} {after.implementation}"
    )
    return Row(
        case=name,
        implementation="?",
        dtype="?",
        shape="-",
        quantity="crash",
        kind="crash",
        error=None,
        bar=0.0,
        note=f"{where}: {note}",
    )


def run(settings: Settings, console: Console, report: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """All cases, in processes of their own on a GPU (bf16 first), in this process on a CPU.

    `report` gets all rows after each case.
    """
    cases = load_cases()
    unknown = [name for name in settings.only if name not in cases]
    if unknown:
        raise SystemExit(f"no case called {unknown[0]!r}; the cases are: {', '.join(cases)}")
    names = settings.only or tuple(cases)
    found: dict[tuple[str, str], list[Row]] = {}

    def add(name: str, dtype: str, rows: list[Row]) -> None:
        found[name, dtype] = rows
        _progress(console, f"{name} {dtype}".strip(), rows)
        report(ordered())

    def ordered() -> list[Row]:
        return [row for name in names for dtype in (*settings.dtypes, "") for row in found.get((name, dtype), [])]

    if settings.device.startswith("cuda"):
        with ThreadPoolExecutor(settings.workers) as pool:
            waiting = {
                pool.submit(run_in_process, name, replace(settings, dtypes=(dtype,))): (name, dtype)
                for dtype in sorted(settings.dtypes)
                for name in names
            }
            for future in as_completed(waiting):
                add(*waiting[future], future.result())
        return ordered()
    for name in names:
        rows: list[Row] = []
        try:
            for row in run_case(name, cases[name], settings):
                rows.append(row)
        except Exception as error:
            rows.append(crash(name, rows[-1] if rows else None, f"{type(error).__name__}: {error}"))
        add(name, "", rows)
    return ordered()


def _progress(console: Console, name: str, rows: list[Row]) -> None:
    missed = sum(not row.passed for row in rows)
    console.print(f"{name}: {len(rows)} comparisons, " + (f"[red]{missed} missed" if missed else "all within the bars"))


def worst(rows: list[Row]) -> list[Row]:
    """For each case, implementation, dtype and kind the comparison nearest to, or furthest over, its bar."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.case, row.implementation, row.dtype, row.kind)
        if key not in found or _ratio(row) > _ratio(found[key]):
            found[key] = row
    return list(found.values())


def _ratio(row: Row) -> float:
    return float("inf") if row.error is None or row.bar == 0 else row.error / row.bar


def _cells(row: Row) -> list[str]:
    error = "none" if row.error is None else f"{row.error:.1e}"
    where = row.note if row.error is None else f"{row.quantity}, {row.shape}"
    verdict = "ok" if row.passed else "MISSED"
    return [row.case, row.implementation, row.dtype, row.kind, error, f"{row.bar:.0e}", verdict, where]


COLUMNS = ("operator", "implementation", "dtype", "quantity", "worst error", "bar", "", "where")


def show(rows: list[Row], console: Console) -> None:
    table = Table(*COLUMNS, title="Error against float64, RMS(reference − result) / RMS(reference)")
    for row in worst(rows):
        table.add_row(*_cells(row), style=None if row.passed else "red")
    console.print(table)


def environment(device: str) -> dict[str, str]:
    """Where the figures come from."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else "none"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return {
        "machine": machine,
        "GPU": gpu,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def write(rows: list[Row], settings: Settings, seconds: float, out: Path) -> None:
    """Write numerics.json and numerics.md into `out`."""
    about = environment(settings.device)
    interpreted = "TRITON_INTERPRET=1 " * (settings.device == "cpu" and triton_interpreted())
    about["command"] = f"{interpreted}python -m fla_swap.bench.numerics --device {settings.device}"
    about["command"] += " --quick" * settings.quick
    if settings.dtypes != Settings.dtypes:
        about["command"] += "".join(f" --dtype {dtype}" for dtype in settings.dtypes)
    about["seconds"] = f"{seconds:.0f}"
    about["comparisons"] = f"{len(rows)}, of which {sum(not row.passed for row in rows)} missed"
    out.mkdir(parents=True, exist_ok=True)
    data = {"environment": about, "bars": BARS, "rows": [asdict(row) | {"passed": row.passed} for row in rows]}
    (out / "numerics.json").write_text(json.dumps(data, indent=1))
    lines = ["# Operators against float64", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Error: RMS(reference − result) / RMS(reference); the worst of all shapes is shown.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in _cells(row)) + " |" for row in worst(rows)]
    (out / "numerics.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fla_swap.bench.numerics", description="Every operator against its float64 reference."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for numerics.json and numerics.md")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", default=[], help="only this case; may be repeated")
    parser.add_argument("--dtype", action="append", choices=Settings.dtypes, help="only this dtype; may be repeated")
    parser.add_argument("--time-limit", type=float, default=240.0, help="seconds for one case on a GPU")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) * 3 // 4)))
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = Settings(
        device=options.device,
        quick=options.quick,
        seed=options.seed,
        time_limit=options.time_limit,
        workers=options.workers,
        only=tuple(options.case),
        dtypes=tuple(options.dtype or Settings.dtypes),
    )
    if options.rows:
        with options.rows.open("w") as file:
            for row in run_case(options.case[0], load_cases()[options.case[0]], settings):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    start = time.perf_counter()

    def report(rows: list[Row]) -> None:
        if options.out:
            write(rows, settings, time.perf_counter() - start, options.out)

    rows = run(settings, console, report)
    show(rows, console)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
