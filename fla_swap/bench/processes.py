"""A benchmark's task in a process of its own: fresh compiler caches, a time limit, what it wrote before it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fla_swap.bench.measuring import Task
from fla_swap.bench.turns import LONGEST, keep_kernels, use_choices

Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where tasks run. `lock`: its holder may time on the GPU.

    `cache`: a folder that keeps what our operators' processes compiled and what a peer's autotuners chose, for later
    processes; a task that measures a cold start compiles in a folder of its own all the same.
    """

    lock: Path
    cache: Path | None = None

    @property
    def kernels(self) -> Path | None:
        return None if self.cache is None else self.cache / "kernels"

    def choices(self, task: Task) -> Path | None:
        return None if self.cache is None or task.way == "ours" else self.cache / "choices"


def run_task(
    task: Task, place: Place, limit: float, meanwhile: Callable[[Lines], None] = lambda lines: None
) -> tuple[Lines, str]:
    """(the lines it wrote, how it ended if badly). `limit`: seconds, those spent waiting for the lock left out.

    `meanwhile` gets what it has written so far whenever that is more.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, waited, triton = folder / "task.jsonl", folder / "task.waited", folder / "triton"
        choices, shared = place.choices(task), place.kernels if task.way == "ours" else None
        if choices is not None and use_choices(choices, triton):
            task = replace(task, cold=False)
        command = [sys.executable, "-m", "fla_swap.bench.measuring", "--task", json.dumps(asdict(task))]
        command += ["--rows", str(rows), "--lock", str(place.lock)]
        command += [] if choices is None else ["--choices", str(choices)]
        caches = {
            "TRITON_CACHE_DIR": str(triton if shared is None or task.cold else shared),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        with (folder / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | caches)
            try:
                note = _wait(process, waited, limit, lambda: meanwhile(_lines(rows)), rows)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            if process.returncode == -signal.SIGALRM:
                note = f"kept the GPU longer than {LONGEST} s"
            elif note == "" and process.returncode:
                note = " | ".join(log.read().strip().splitlines()[-3:])[-400:] or f"exit status {process.returncode}"
        if shared is not None and task.cold:
            keep_kernels(triton, shared)
        return _lines(rows), note


def _lines(rows: Path) -> Lines:
    lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _wait(process: subprocess.Popen[bytes], waited: Path, limit: float, grown: Callable[[], None], rows: Path) -> str:
    begin, length = time.time(), 0
    while True:
        try:
            process.wait(0.25)
            return ""
        except subprocess.TimeoutExpired:
            if rows.exists() and rows.stat().st_size > length:
                length = rows.stat().st_size
                grown()
            if time.time() - begin - _waited(waited) > limit:
                return f"not done after {limit:g} s"


def _waited(path: Path) -> float:
    """Seconds that the process spent, or is spending, waiting for the GPU."""
    try:
        total, since = json.loads(path.read_text())
    except (OSError, ValueError):
        return 0.0
    return total + (time.time() - since if since is not None else 0.0)
