"""Every mixer by every check of `fla_swap.bench.mixer_checks`; `results/mixers.md` is the same, as a table."""

from __future__ import annotations

import pytest
import torch

from fla_swap.bench.layer_checks import windows_by_loops
from fla_swap.bench.mixer_checks import CHECKS, SLOW, NotApplicable, looped
from fla_swap.bench.mixers import Cell, main, markdown, read_cells, run_check
from fla_swap.kernels.decay import ops
from fla_swap.kernels.window.ops import window_attention_lse
from fla_swap.mixers import GLA, MIXERS, Softmax, Window, decay


def cells():
    for kind in MIXERS:
        for name in CHECKS:
            marks = [pytest.mark.slow] if name in SLOW else []
            yield pytest.param(kind, name, id=f"{kind.name}-{name}", marks=marks)


@pytest.mark.parametrize(("kind", "name"), cells())
def test_a_mixer_passes_a_check(kind, name):
    try:
        CHECKS[name](kind)
    except NotApplicable as reason:
        assert kind in (Softmax, Window), reason  # the only ones without a state of their own, or gates


def test_the_loop_takes_the_place_of_every_operator():
    before = decay.gla
    with looped() as found:
        assert decay.gla is not before and decay.gla.keywords == {"implementation": "reference"} and found > 5
    assert decay.gla is before is ops.gla


def test_the_table_shows_what_failed_and_what_says_nothing():
    def broken(kind):
        """Half right."""
        raise AssertionError("1.0 against\n2.0")

    def silent(kind):
        raise NotApplicable("no state")

    checks = list(CHECKS)
    cells = [
        run_check(GLA, checks[0], broken),
        run_check(GLA, checks[1], lambda kind: "4 kB"),
        run_check(Softmax, checks[1], silent),
    ]
    assert [cell.passed for cell in cells] == [False, True, None]
    cells.append(Cell(mixer="softmax", check=checks[0], passed=True, seconds=2.0, note="ok"))
    text = markdown(cells, "command")
    assert "| gla | FAILED | ok, 4 kB |" in text and "| softmax | ok | – | 2.0 |" in text
    assert f"- gla, {checks[0]}: AssertionError: 1.0 against 2.0" in text and "–: no state." in text
    assert "2 cells passed, 1 failed" in text


def test_cells_of_earlier_runs_stay(tmp_path, capsys):
    file, out = tmp_path / "cells.json", tmp_path / "mixers.md"
    shared = ["--cells", str(file), "--out", str(out), "--check", "from scratch"]
    assert main([*shared, "--mixer", "gla"]) == 0 and main([*shared, "--mixer", "retnet"]) == 0
    assert [key[0] for key in read_cells(file)] == ["gla", "retnet"]
    text = out.read_text(encoding="utf-8")
    assert text.index("| retnet | ok") < text.index("| gla | ok") and "2 cells passed, 0 failed" in text
    assert text in capsys.readouterr().out


def test_windows_by_loops_have_the_denominators_of_the_operator():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 5, dtype=torch.float64) for _ in range(3))
    for sinks in (None, torch.randn(4, dtype=torch.float64)):
        expected = window_attention_lse(q, k, v, window=4, sinks=sinks, output_final_state=True)
        found = windows_by_loops(q, k, v, window=4, sinks=sinks, output_final_state=True)
        torch.testing.assert_close(found, expected)
