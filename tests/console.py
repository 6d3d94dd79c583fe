"""Run `fla-swap` in this process, as a shell would."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fla_swap import cli


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def fla_swap(capsys, monkeypatch, *arguments: object) -> Ended:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["fla-swap", *map(str, arguments)])
    status: object = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return Ended(int(status or 0), captured.out, captured.err)  # type: ignore[call-overload]
