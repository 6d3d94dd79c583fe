"""How the processes of a benchmark share one GPU: one at a time measures, also when a peer's autotuner does.

An autotuner tries its configurations one after the other, each compiled when its time comes. Here all of a kernel's are
compiled at once in threads first, and what it chose can be handed to a later process: `keep_choices`, `use_choices`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LONGEST = 30
"""Seconds that a process may keep the GPU for itself."""
TUNING = {"warmup": 5, "rep": 15}
"""The milliseconds for each configuration that a peer's autotuner tries: shorter than its own, alone on the GPU."""
CHOICES = "*/*.autotune.json"
"""Where Triton's cache holds what an autotuner measured."""


class Turn:
    """One process at a time on the GPU. Time spent waiting is written down: it is nobody's cold start or time limit.

    A process that keeps its turn longer than `LONGEST` ends by SIGALRM: what hangs on the GPU holds up nobody else.
    """

    def __init__(self, lock: Path, notes: Path):
        self.lock, self.notes, self.waited, self.held = lock, notes, 0.0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.held:
            yield
            return
        begin = time.time()
        self._note(begin)
        with self.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.waited += time.time() - begin
            self._note(None)
            self.held = True
            signal.alarm(LONGEST)
            try:
                yield
            finally:
                signal.alarm(0)
                self.held = False

    def _note(self, since: float | None) -> None:
        self.notes.write_text(json.dumps([self.waited, since]))


def tune_alone(turn: Turn, threads: int, searching: Callable[[], None] = lambda: None) -> None:
    """Autotuners of this process time their configurations alone on the GPU, and compile them ahead in `threads`.

    `searching` is called at the start of every search, when what the last one chose is in Triton's cache.
    """
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    original, bench = triton.testing.do_bench, Autotuner._bench

    def do_bench(fn: Callable[[], Any], **options: Any) -> Any:
        fn()
        options.update(TUNING)
        with turn():
            return original(fn, **options)

    def _bench(self: Any, *args: Any, config: Any, **options: Any) -> Any:
        if self.__dict__.get("compiled_for") is not self.nargs:  # made anew by every search
            self.compiled_for = self.nargs
            searching()
            compile_ahead(self, args, options, threads)
        return bench(self, *args, config=config, **options)

    triton.testing.do_bench = do_bench
    Autotuner._bench = _bench


def compile_ahead(tuner: Any, args: tuple[Any, ...], options: Mapping[str, Any], threads: int) -> None:
    """Compile all configurations that an autotuner is about to try. What does not compile fails when it is tried."""
    from triton.runtime._async_compile import AsyncCompileMode

    with (
        suppress(Exception),
        ThreadPoolExecutor(threads) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        for config in tuner.prune_configs(options):
            tuner.fn.run(*args, **{**options, **config.all_kwargs(), "warmup": True})


def use_choices(choices: Path, cache: Path) -> bool:
    """Give a new Triton cache the choices of earlier processes; whether there were any."""
    found = list(choices.glob(CHOICES))
    for path in found:
        _copy(path, cache / path.parent.name / path.name)
    return bool(found)


def keep_choices(cache: Path, choices: Path) -> None:
    """Keep what the autotuners of a process chose."""
    for path in cache.glob(CHOICES):
        if not (choices / path.parent.name / path.name).exists():
            with suppress(FileNotFoundError):  # another process with the same kernel was faster
                _copy(path, choices / path.parent.name / path.name)


def keep_kernels(cache: Path, kernels: Path) -> None:
    """Move what a process compiled into another Triton cache (folders are named after their content)."""
    kernels.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob("*"):
        target = kernels / folder.name
        for listing in folder.glob("__grp__*.json"):  # these name their files with the whole path
            listing.write_text(listing.read_text().replace(str(folder), str(target)))
        if not target.exists():
            with suppress(OSError):  # another process was faster
                folder.rename(target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".writing")
    shutil.copyfile(source, beside)
    beside.replace(target)
