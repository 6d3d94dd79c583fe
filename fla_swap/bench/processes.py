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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fla_swap.bench.measuring import LONGEST, Task

Lines = list[dict[str, Any]]


def run_task(
    task: Task, lock: Path, limit: float, meanwhile: Callable[[Lines], None] = lambda lines: None
) -> tuple[Lines, str]:
    """(the lines it wrote, how it ended if badly). `limit`: seconds, those spent waiting for the lock left out.

    `meanwhile` gets what it has written so far whenever that is more.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, waited = folder / "task.jsonl", folder / "task.waited"
        command = [sys.executable, "-m", "fla_swap.bench.measuring", "--task", json.dumps(asdict(task))]
        command += ["--rows", str(rows), "--lock", str(lock)]
        caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
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
