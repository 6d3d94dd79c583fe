"""Every mixer by every check: operator, layer, packing, gradients, swap, model, generation, compilation, training.

    python -m fla_swap.bench.mixers [--out results/mixers.md] [--mixer NAME …] [--backend aot_eager] [--cells FILE.json]
    python -m fla_swap.bench.mixers --table generation --out results/generation-equality.md

Prints the table and writes it. Exit status 1 when a cell failed. The checks are those of `mixer_checks` and
`generation_checks`, which the tests run too. `--cells` keeps every cell on disk as it comes: a later run replaces its
own and shows all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from fla_swap.bench import generation_checks
from fla_swap.bench.mixer_checks import CHECKS, Kind, NotApplicable, compiled, compiled_model
from fla_swap.mixers import MIXERS, mixer_class

TABLES: dict[str, tuple[str, dict[str, Callable[[Kind], str]]]] = {
    "mixers": ("Mixers", CHECKS),
    "generation": ("Generation with a state equals generation without", generation_checks.CHECKS),
}
"""Name → title and checks of a table."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One check of one mixer. `passed` is None where the check says nothing about it; `note` is what it measured."""

    mixer: str
    check: str
    passed: bool | None
    seconds: float
    note: str


def run_check(kind: Kind, name: str, check: Callable[[Kind], str]) -> Cell:
    """Run one check; whatever it raises makes the cell fail."""
    started = time.perf_counter()
    try:
        passed, note = True, check(kind)
    except NotApplicable as reason:
        passed, note = None, str(reason)
    except Exception as error:
        passed, note = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Cell(mixer=kind.name, check=name, passed=passed, seconds=time.perf_counter() - started, note=note)


def read_cells(path: Path) -> dict[tuple[str, str], Cell]:
    """The cells of earlier runs by mixer and check; none when there is no such file."""
    if not path.exists():
        return {}
    cells = [Cell(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return {(cell.mixer, cell.check): cell for cell in cells}


def markdown(cells: Sequence[Cell], command: str, table: str = "mixers") -> str:
    """The table: a row for each mixer, a column for each check; failures spelled out below."""
    title, known = TABLES[table]
    names = list(dict.fromkeys(cell.check for cell in cells))
    passed, failed = (sum(cell.passed is wanted for cell in cells) for wanted in (True, False))
    lines = [
        f"# {title}",
        "",
        f"- machine: {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} threads, no GPU",
        f"- versions: python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
        f"- command: `{command}`",
        f"- {passed} cells passed, {failed} failed, {sum(c.seconds for c in cells):.0f} s",
        "",
        "| mixer | " + " | ".join(names) + " | s |",
        "|" + "---|" * (len(names) + 2),
    ]
    for mixer in dict.fromkeys(cell.mixer for cell in cells):
        row = {cell.check: cell for cell in cells if cell.mixer == mixer}
        texts = [_text(row[name]) if name in row else "" for name in names]
        lines.append(f"| {mixer} | " + " | ".join(texts) + f" | {sum(c.seconds for c in row.values()):.1f} |")
    lines += ["", "What a column holds (the last one: seconds on the clock, whatever else ran):", ""]
    lines += [f"- {name}: {' '.join((known[name].__doc__ or '').split())}" for name in names]
    bad = [f"- {cell.mixer}, {cell.check}: {cell.note}" for cell in cells if cell.passed is False]
    lines += ["", "Failed:", "", *bad] if bad else []
    reasons = sorted({cell.note for cell in cells if cell.passed is None})
    lines += ["", *(f"–: {reason}." for reason in reasons)]
    return "\n".join(lines).rstrip() + "\n"


def _text(cell: Cell) -> str:
    if cell.passed is None:
        return "–"
    return f"ok, {cell.note}" if cell.passed and cell.note != "ok" else "ok" if cell.passed else "FAILED"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fla_swap.bench.mixers", description="Every mixer by every check.")
    parser.add_argument("--out", type=Path, help="file for the table, such as results/mixers.md")
    parser.add_argument("--mixer", action="append", help="only this one; may be repeated")
    parser.add_argument("--table", choices=TABLES, default="mixers", help="which checks")
    parser.add_argument("--check", action="append", help="only this one; may be repeated")
    parser.add_argument("--cells", type=Path, help="JSON file of cells; those of earlier runs stay")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile: aot_eager, inductor")
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    console = Console()
    kinds = MIXERS if options.mixer is None else tuple(mixer_class(name) for name in options.mixer)
    known = TABLES[options.table][1]
    unknown = sorted(set(options.check or ()) - set(known))
    if unknown:
        parser.error(f"no check {', '.join(unknown)} in {options.table}: {', '.join(known)}")
    checks = {name: check for name, check in known.items() if options.check is None or name in options.check}
    for name, check in (("compile: layer", compiled), ("compile: model", compiled_model)):
        if name in checks:
            checks[name] = partial(check, backend=options.backend)
    found = {} if options.cells is None else read_cells(options.cells)
    for kind in kinds:
        for name, check in checks.items():
            found[kind.name, name] = cell = run_check(kind, name, check)
            if options.cells is not None:
                options.cells.write_text(json.dumps([asdict(c) for c in found.values()], indent=1), encoding="utf-8")
            word = {True: "ok", False: "FAILED", None: "–"}[cell.passed]
            console.print(
                f"{kind.name:16} {name:20} {word:7}{cell.seconds:6.1f} s  {cell.note}", markup=False, soft_wrap=True
            )
    order = [(kind.name, name) for kind in MIXERS for name in known]
    cells = [found[key] for key in order if key in found]
    command = " ".join(["python -m fla_swap.bench.mixers", *(arguments if arguments is not None else sys.argv[1:])])
    text = markdown(cells, command, options.table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if any(cell.passed is False for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
