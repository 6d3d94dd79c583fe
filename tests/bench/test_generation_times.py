"""The generation benchmark times what it says, on a saved model and on a shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fla_swap.bench.generation import Timing, build, markdown, measure
from fla_swap.cli import app
from fla_swap.errors import FlaSwapError

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "teacher"


def test_times_add_up_and_a_longer_answer_takes_longer():
    model = build("hybrid-tiny", "cpu", torch.float32)
    ids = torch.randint(3, 500, (2, 17))
    short, long = (measure(model, "tiny", ids, new, 1, {"do_sample": False}) for new in (2, 40))
    assert (short.batch, short.prompt, short.new) == (2, 17, 2)
    assert long.total > short.total and long.step > 0
    assert long.total == pytest.approx(long.prefill + 39 * long.step)
    assert f"| tiny | 2 | 17 | 40 | {long.prefill:.1f} |" in markdown([long], "x", "cpu")


def test_the_command_prints_lengths_and_times_of_a_saved_model(tmp_path):
    arguments = ["bench", "generate", str(TEACHER), "--prompt", "def main():", "--lengths", "3,5", "--repeats", "1"]
    arguments += ["--repetition-penalty", "2.0", "--no-compile", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "table.md")])
    assert result.exit_code == 0, result.output
    rows = [Timing(**row) for row in json.loads(result.stdout)]
    assert [row.new for row in rows] == [3, 5] and all(row.prefill > 0 for row in rows)
    assert "| new |" in (tmp_path / "table.md").read_text()


def test_an_unknown_shape_is_named():
    with pytest.raises(FlaSwapError, match=r"hybrid-1\.4b"):
        build("huge", "cpu", torch.float32)
