"""What `inspect` finds in every model family that transformers has: sites, proofs, refusals with their reasons.

    python -m fla_swap.bench.families [--group decoder] [--only llama,gpt2] [--out results/families.md]

Every type of the group is built tiny and random from its own config, in sdpa and in eager, each in a process of its
own with a time limit. A family whose attention is not accounted for shows as such: no silent miss.
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
from rich.progress import Progress

import fla_swap as fs
from fla_swap.bench.tiny_configs import GROUPS, model_types, tiny_model
from fla_swap.errors import FlaSwapError

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
        report = fs.inspect(model, strict=False)
    except FlaSwapError as error:
        return Result(**common, stage=type(error).__name__, note=_short(error), seconds=time.perf_counter() - start)
    except Exception as error:
        note = f"{type(error).__name__}: {_short(error)}"
        return Result(**common, stage="crashed", note=note, seconds=time.perf_counter() - start)
    misses = collections.Counter((m.slot, re.sub(r"\.\d+\b", ".*", m.reason)) for m in report.near_misses)
    return Result(
        **common,
        stage="inspected",
        proved=sum(s.proved for s in report.sites),
        facts=tuple(_facts(report.sites)),
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


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


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


def markdown(results: list[Result], command: str) -> str:
    """The table, with what made it."""
    count = collections.Counter(r.group for r in results if r.implementation == IMPLEMENTATIONS[0])
    lines = [
        "# What `inspect` finds in transformers' model families",
        "",
        f"- transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"python {platform.python_version()}; {', '.join(f'{n} {g}s' for g, n in count.items())}",
        f"- command: `{command}`",
        "- each family: random, tiny, from its own config; a proved site was rebuilt from its facts alone, in fp32",
        "",
    ]
    for group in GROUPS:
        rows: dict[str, dict[str, str]] = {}
        for r in results:
            if r.group == group and r.stage != "no such code":
                rows.setdefault(r.family, {})[r.implementation] = r.verdict.replace("|", "\\|")
        if not rows:
            continue
        lines += [f"## {group}", "", "| family | result |", "|---|---|"]
        for family, verdicts in rows.items():
            same = len(verdicts) == len(IMPLEMENTATIONS) and len(set(verdicts.values())) == 1
            text = next(iter(verdicts.values())) if same else "<br>".join(f"{k}: {v}" for k, v in verdicts.items())
            lines.append(f"| {family} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all groups")
    parser.add_argument("--only", default="", help="comma-separated model types")
    parser.add_argument("--implementation", action="append", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one family")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the results go beside it as JSON lines")
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
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("families", total=len(wanted))
        for result in inspect_all(wanted, options.limit, options.workers):
            results.append(result)
            line = f"{result.family} [dim]{result.group} {result.implementation}[/dim] {result.verdict}"
            progress.console.print(line, highlight=False, soft_wrap=True)
            progress.advance(task)
    results.sort(key=lambda r: wanted.index((r.family, r.group, r.implementation)))
    if options.out:
        command = "python -m fla_swap.bench.families " + " ".join(arguments if arguments is not None else sys.argv[1:])
        options.out.write_text(markdown(results, command.strip()) + "\n", encoding="utf-8")
        rows = "".join(json.dumps(asdict(r)) + "\n" for r in results)
        options.out.with_suffix(".jsonl").write_text(rows, encoding="utf-8")
    return 0 if all(r.stage in ("inspected", "no such code") for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
