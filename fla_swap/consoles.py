"""The two consoles of the command line, and what every command shows on them: results, progress, log lines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fla_swap.errors import FlaSwapError

NOTES = (("torchao", "Failed to load "), ("torch.utils._pytree", "%s is an Enum subclass"))
"""What libraries tell their own developers whenever they are imported, as (logger, start of the message)."""

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or another program: module names must not be cut."""

out = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPED_WIDTH)


def progress_bar() -> Any:
    from fla_swap.distillation import BarProgress, LogProgress

    return BarProgress(err) if err.is_terminal else LogProgress()


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """When what is inside stops with something to go on from, say how."""
    from fla_swap.output import TRAINING

    try:
        yield
    except (FlaSwapError, KeyboardInterrupt):
        if (folder / TRAINING / "run.json").exists():
            err.print(f"what was trained so far is in {folder / TRAINING}; the same command with --resume continues it")
        raise


def show(table: Any, data: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data) + "\n")
    else:
        out.print(table)


class ConsoleHandler(logging.Handler):
    """Log lines on the error console, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def log_to_console() -> None:
    """What fla_swap logs goes to the error console; what libraries tell their own developers goes nowhere."""
    own = logging.getLogger("fla_swap")
    own.setLevel(logging.INFO)
    if not own.handlers:  # ours alone: a handler at the root would repeat what libraries print themselves
        own.addHandler(ConsoleHandler())
    for name, start in NOTES:
        logging.getLogger(name).addFilter(lambda record, start=start: not str(record.msg).startswith(start))
