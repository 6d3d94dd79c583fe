"""How a run shows itself: a Rich bar on a terminal, a log line now and then elsewhere, or whatever the caller gives."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("fla_swap.distillation")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """Where a stage stands. `fraction` of it is done; `tokens`, `seconds`: since its start, interruptions left out.

    `loss` is the mean since the event before: nats a token when distilling, relative error when aligning.
    """

    stage: str
    step: int
    steps: int | None
    fraction: float
    tokens: int
    seconds: float
    loss: float
    learning_rate: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from what is done so far; None at the very start."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction > 0 else None


Progress = Callable[[ProgressEvent], None]


class LogProgress:
    """A line of `logging` at the first event of a stage, then every `every` seconds, and at the stage's end."""

    def __init__(self, every: float = 15.0):
        self.every, self.next, self.stage = every, 0.0, ""

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if event.stage == self.stage and now < self.next and event.fraction < 1:
            return
        self.stage, self.next = event.stage, now + self.every
        left = event.seconds_left
        logger.info(
            "%s: step %d, %.0f%%, loss %.4f, %.0f tokens/s, %s left",
            event.stage,
            event.step,
            100 * event.fraction,
            event.loss,
            event.tokens_per_second,
            "?" if left is None else f"{left:.0f} s",
        )

    def close(self) -> None:
        """Nothing to release."""


class BarProgress:
    """One Rich bar per stage, with the live loss, tokens a second and the time left."""

    def __init__(self, console: Any = None):
        from rich import progress
        from rich.console import Console

        self.bar = progress.Progress(
            progress.TextColumn("{task.description:>12}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            console=console or Console(stderr=True),
        )
        self.tasks: dict[str, Any] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if not self.tasks:
            self.bar.start()
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bar.add_task(event.stage, total=1.0, figures="")
        left = event.seconds_left
        figures = f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s"
        if left is not None and event.fraction < 1:
            figures += f"  {left // 60:.0f}:{left % 60:02.0f} left"
        self.bar.update(self.tasks[event.stage], completed=event.fraction, figures=figures)

    def close(self) -> None:
        self.bar.stop()


def default_progress() -> LogProgress | BarProgress:
    """The bar on a terminal, log lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else LogProgress()
