"""What `inspect` finds in every model family that transformers has: sites, proofs, refusals with their reasons.

    python -m fla_swap.bench.families [--group decoder] [--only llama,gpt2] [--out results/families.md] [--resume]

Every type of the group is built tiny and random from its own config, in sdpa and in eager, each in a process of its
own with a time limit. A family whose attention is not accounted for shows as such: no silent miss. Each result is
written as it comes, to FAMILIES.jsonl and into the table: a run that was interrupted goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import fla_swap as fs
from fla_swap.bench.tiny_configs import GROUPS, example_for, model_types, tiny_model
from fla_swap.errors import ConfigError, FlaSwapError

IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One family in one implementation. `stage`: how far it got ("built", "exported", "inspected")."""

    family: str
    group: str
    implementation: str
    stage: str
    proved: int = 0
    facts: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    unclaimed: int = 0
    note: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> str:
        if self.stage == "no such code":
            return f"{self.family} has no {self.implementation} code"
        if self.stage != "inspected":
            return f"{self.stage}: {self.note}"
        parts = []
        if self.facts:
            parts.append(f"{self.proved} proved ({'; '.join(self.facts)})")
        parts += [f"refused {r}" for r in self.refusals]
        if self.unclaimed:
            parts.append(f"{self.unclaimed} softmaxes in no attention that is understood (routers, block-wise code)")
        return "; ".join(parts) or "no attention"

    @property
    def outcome(self) -> str:
        """The kind of the verdict, in a few words."""
        if self.stage != "inspected":
            return "not built" if self.stage == "not built" else "could not be followed"
        if self.facts:
            return "proved in part" if self.refusals else "every attention proved"
        return "refused with a reason" if self.refusals else "no attention"


OUTCOMES = (
    *("every attention proved", "proved in part", "refused with a reason"),
    *("could not be followed", "not built", "no attention"),
)


def inspect_family(family: str, group: str, implementation: str) -> Result:
    """Build the tiny model and inspect it."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    common: dict[str, Any] = {"family": family, "group": group, "implementation": implementation}
    start = time.perf_counter()
    try:
        model = tiny_model(family, group, implementation)
    except Exception as error:
        stage = "no such code" if "does not support an attention implementation" in str(error) else "not built"
        return Result(**common, stage=stage, note=_short(error))
    try:
        report = fs.inspect(model, example_for(model, family), strict=False)
    except FlaSwapError as error:
        return Result(**common, stage=type(error).__name__, note=_short(error), seconds=time.perf_counter() - start)
    except Exception as error:
        note = f"{type(error).__name__}: {_short(error)}"
        return Result(**common, stage="crashed", note=note, seconds=time.perf_counter() - start)
    misses = collections.Counter(
        (m.slot, re.sub(r"\.\d+\b", ".*", _without_folders(m.reason))) for m in report.near_misses
    )
    return Result(
        **common,
        stage="inspected",
        proved=sum(s.proved for s in (*report.sites, *report.linear)),
        facts=(*_facts(report.sites), *_linear_facts(report.linear)),
        refusals=tuple(f"{n} at {slot}: {reason}" for (slot, reason), n in misses.items()),
        unclaimed=len(report.unclaimed),
        notes=report.notes,
        seconds=time.perf_counter() - start,
    )


def _facts(sites: tuple[fs.AttentionSite, ...]) -> list[str]:
    """Each kind of site once, with how many there are."""
    kinds: collections.Counter[str] = collections.Counter()
    for s in sites:
        mask = s.mask.kind + (f" {s.mask.window}" if s.mask.window else "")
        words = [mask if s.kind == "self" else f"{s.kind} {mask}", f"{s.heads}/{s.kv_heads}×{s.head_dim}"]
        words += [f"rope {2 * len(s.rope.inv_freq)} {s.rope.style}"] if s.rope else []
        words += ["ALiBi"] if s.alibi else []
        words += [f"softcap {s.softcap:g}"] if s.softcap else []
        words += [f"v × {s.v_scale:g}"] if s.v_scale != 1.0 else []
        named = {"sinks": s.sinks, "q/k norm": s.q_norm, "v norm": s.v_norm, "output norm": s.o_norm, "gate": s.gate}
        named |= {"temperature": s.temperature, "clip": s.clip, "in the graph": s.place == "graph", "no o": s.o is None}
        words += [name for name, there in named.items() if there]
        kinds[", ".join(words)] += 1
    return [f"{n} × {words}" for words, n in kinds.items()]


def _linear_facts(layers: tuple[fs.AttentionSite, ...]) -> list[str]:
    """Layers that are linear already: each rule once, with how many there are."""
    rules = collections.Counter(s.recurrence.rule if s.recurrence else "unknown" for s in layers)
    return [f"{n} × linear: {rule}" for rule, n in rules.items()]


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _without_folders(lines[0] if lines else type(error).__name__)[:400]


def _without_folders(text: str) -> str:
    """Source files named from their package on."""
    return re.sub(r"/\S*/site-packages/", "", text)


def _work(family: str, group: str, implementation: str, out: Any) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)  # what torch and transformers log is no result
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    out.put(inspect_family(family, group, implementation))


def inspect_all(wanted: list[tuple[str, str, str]], limit: float, workers: int) -> Iterator[Result]:
    """`inspect_family` for each (family, group, implementation), `workers` at a time, each in a process of its own."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), []
    while waiting or running:
        while waiting and len(running) < workers:
            task, out = waiting.pop(0), context.SimpleQueue()
            process = context.Process(target=_work, args=(*task, out), daemon=True)
            process.start()
            running.append((task, process, out, time.perf_counter()))
        for entry in list(running):
            task, process, out, start = entry
            late = time.perf_counter() - start > limit
            if not out.empty():
                yield out.get()
            elif late or process.exitcode is not None:
                note = f"not done after {limit:g} s" if late else f"exit status {process.exitcode}"
                common = dict(zip(("family", "group", "implementation"), task, strict=True))
                yield Result(**common, stage="no answer", note=note)
            else:
                continue
            process.kill()
            process.join()
            running.remove(entry)
        time.sleep(0.02)


def about(command: str) -> dict[str, str]:
    """The machine, the versions and the command: what a table must say of itself."""
    versions = f"python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": f"{versions}, transformers {transformers.__version__}",
        "command": command,
    }


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a run has found so far: `path` a Markdown table, beside it the raw results as JSON lines, `about` first."""

    path: Path
    wanted: list[tuple[str, str, str]]
    about: dict[str, str]
    results: list[Result] = field(default_factory=list)

    @property
    def raw(self) -> Path:
        return self.path.with_suffix(".jsonl")

    @classmethod
    def start(cls, path: Path, wanted: list[tuple[str, str, str]], command: str, *, resume: bool) -> Table:
        """An empty table, or with `resume` one with what is in the file of raw results.

        Raises ConfigError when that holds results and `resume` is not asked for, or they are of other versions.
        """
        path = path if path.suffix == ".md" else path / "families.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = cls(path=path, wanted=wanted, about=about(command))
        lines = table.raw.read_text(encoding="utf-8").splitlines() if table.raw.exists() else []
        if not lines:
            table.raw.write_text(json.dumps(table.about) + "\n", encoding="utf-8")
            return table
        if not resume:
            raise ConfigError(f"{table.raw} holds {len(lines) - 1} results: go on with --resume, or remove it")
        before = json.loads(lines[0])
        if before["versions"] != table.about["versions"] or before["machine"] != table.about["machine"]:
            raise ConfigError(f"{table.raw} is of {before['machine']}, {before['versions']}: remove it to start anew")
        if not table.raw.read_bytes().endswith(b"\n"):  # cut in the middle of a line
            lines = lines[:-1]
            table.raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
        table.results.extend(_read(line) for line in lines[1:])
        return table

    @property
    def left(self) -> list[tuple[str, str, str]]:
        done = {(r.family, r.group, r.implementation) for r in self.results}
        return [task for task in self.wanted if task not in done]

    def add(self, result: Result) -> None:
        """Append the result to the raw ones and write the table anew."""
        self.results.append(result)
        with self.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        place = {task: number for number, task in enumerate(self.wanted)}
        ordered = sorted(self.results, key=lambda r: place.get((r.family, r.group, r.implementation), len(place)))
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(markdown(ordered, self.about, left=len(self.left)) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def _read(line: str) -> Result:
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(line).items()}
    return Result(**values)


def markdown(results: list[Result], about: dict[str, str], left: int = 0) -> str:
    """The table, with what made it; `left`: how many families are still to come."""
    lines = [
        "# What `inspect` finds in transformers' model families",
        "",
        *(f"- {name}: {f'`{text}`' if name == 'command' else text}" for name, text in about.items()),
        "- each family: random, tiny, from its own config; a proved site was rebuilt from its facts alone, in fp32",
        *([f"- not finished: {left} of {left + len(results)} runs are missing"] if left else []),
        "",
    ]
    for group in GROUPS:
        families: dict[str, list[Result]] = {}
        for r in results:
            if r.group == group and r.stage != "no such code":
                families.setdefault(r.family, []).append(r)
        if not families:
            continue
        lines += [f"## {group}", "", _summary(list(families.values())), "", "| family | result |", "|---|---|"]
        for family, own in families.items():
            verdicts = {r.implementation: r.verdict.replace("|", "\\|") for r in own}
            same = len(verdicts) == len(IMPLEMENTATIONS) and len(set(verdicts.values())) == 1
            text = next(iter(verdicts.values())) if same else "<br>".join(f"{k}: {v}" for k, v in verdicts.items())
            lines.append(f"| {family} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _summary(families: list[list[Result]]) -> str:
    """How many types came out how; a type counts by the worse of its implementations."""
    order = {name: number for number, name in enumerate((OUTCOMES[-1], *OUTCOMES[:-1]))}
    count = collections.Counter(max((r.outcome for r in own), key=order.__getitem__) for own in families)
    parts = ", ".join(f"{count[name]} {name}" for name in OUTCOMES if count[name])
    return f"{len(families)} types: {parts} (a type counts by the worse of sdpa and eager)."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all groups")
    parser.add_argument("--only", default="", help="comma-separated model types")
    parser.add_argument("--implementation", action="append", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one family")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="Markdown file (or folder) to write; the raw results go beside it")
    parser.add_argument("--resume", action="store_true", help="go on with the raw results that are there")
    options = parser.parse_args(arguments)
    console = Console()
    only = [t for t in options.only.split(",") if t]
    groups = options.group or list(GROUPS)
    every = [(t, g) for g in groups for t in model_types(g)]
    for name in only:
        if name not in {t for t, _ in every}:
            parser.error(f"transformers has no model type {name!r} in the groups {groups}")
    chosen = [(t, g) for t, g in every if not only or t in only]
    wanted = [(t, g, i) for t, g in chosen for i in options.implementation or IMPLEMENTATIONS]
    command = "python -m fla_swap.bench.families " + " ".join(arguments if arguments is not None else sys.argv[1:])
    table = None
    try:
        if options.out:
            table = Table.start(options.out, wanted, command.strip(), resume=options.resume)
    except ConfigError as error:
        parser.error(str(error))
    stages = {r.stage for r in table.results} if table else set()
    left = table.left if table else wanted
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("families", total=len(wanted), completed=len(wanted) - len(left))
        for result in inspect_all(left, options.limit, options.workers):
            stages.add(result.stage)
            if table:
                table.add(result)
            line = f"{result.family} [dim]{result.group} {result.implementation}[/dim] {escape(result.verdict)}"
            progress.console.print(line, highlight=False, soft_wrap=True)
            progress.advance(task)
    return 0 if stages <= {"inspected", "no such code"} else 1


if __name__ == "__main__":
    sys.exit(main())
