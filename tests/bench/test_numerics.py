"""The numerics table: it passes what is right, and says so when an operator is wrong, crashes or gives NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fla_swap.ops
from fla_swap.bench import comparison, numerics
from fla_swap.bench.comparison import Settings, Shape, compare
from fla_swap.kernels.decay.reference import gla_reference, make_inputs

SHAPE = Shape(time=6, width=8)
CPU = Settings(device="cpu", quick=True)


def case(op) -> dict[str, object]:
    return {"op": op, "reference": gla_reference, "make": make_inputs(("g",)), "kwargs": {}}


def rows_of(op, shape: Shape = SHAPE) -> dict[str, comparison.Row]:
    rows = compare("case", case(op), shape, torch.float32, CPU)
    return {row.quantity: row for row in rows}


def right(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, output_final_state: bool = False, implementation: str, **rest):
    return gla_reference(q, k, v, g, output_final_state=output_final_state, **rest)


def test_the_reference_itself_passes_on_every_quantity() -> None:
    rows = rows_of(right)
    assert set(rows) == {"output", "state", "d q", "d k", "d v", "d g", "d initial_state"}
    assert rows["d g"].kind == "gate gradient" and rows["d g"].bar == 1e-4
    assert all(row.passed and 0 < row.error < 1e-6 for row in rows.values())


def test_an_error_of_one_per_cent_is_seen_where_it_is() -> None:
    def wrong(q, k, v, g, *, output_final_state, implementation, **rest):
        o, state = gla_reference(q, k, v, g, output_final_state=True, **rest)
        return o, state * 1.01

    rows = rows_of(wrong)
    assert rows["output"].passed and not rows["state"].passed
    assert rows["state"].error == pytest.approx(0.01, rel=1e-3)


def test_nan_is_a_miss() -> None:
    def wrong(q, k, v, g, *, output_final_state, implementation, **rest):
        o, state = gla_reference(q, k, v, g, output_final_state=True, **rest)
        return o * float("nan"), state

    row = rows_of(wrong)["output"]
    assert row.error is None and not row.passed and "NaN" in row.note


def test_packed_inputs_and_extreme_gates_reach_the_operator() -> None:
    seen = {}

    def watch(q, k, v, g, *, cu_seqlens, output_final_state, implementation, **rest):
        seen.update(rest, g=g, q=q, cu_seqlens=cu_seqlens)
        return gla_reference(q, k, v, g, cu_seqlens=cu_seqlens, output_final_state=True, **rest)

    assert all(row.passed for row in rows_of(watch, Shape(time=6, width=8, bounds=(0, 2, 2, 5), extreme=True)).values())
    assert seen["cu_seqlens"].tolist() == [0, 2, 2, 5]
    assert seen["q"].shape[0] == 1 and seen["initial_state"].shape[0] == 3
    assert seen["g"].min() == -10 and seen["g"].max() == 0


def test_every_public_operator_has_a_case() -> None:
    public = {name for name in fla_swap.ops.__all__ if not name.endswith("_step")} - {"WindowState", "new_window_state"}
    names = {re.split(r"[,(]", name)[0] for name in comparison.load_cases()}
    assert names == public


@pytest.fixture
def one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "shapes", lambda device, quick: (SHAPE,))


def test_the_command_writes_both_files_and_returns_zero(tmp_path: Path, one_shape: None) -> None:
    assert numerics.main(["--device", "cpu", "--quick", "--case", "gla", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "numerics.json").read_text())
    assert data["environment"]["torch"] == torch.__version__
    assert {row["dtype"] for row in data["rows"]} == {"float32", "bfloat16"}
    assert all(row["passed"] for row in data["rows"])
    text = (tmp_path / "numerics.md").read_text()
    assert "python -m fla_swap.bench.numerics --device cpu --quick" in text and "| gla | torch |" in text


def test_a_missed_bar_gives_status_one(monkeypatch: pytest.MonkeyPatch, one_shape: None) -> None:
    monkeypatch.setitem(comparison.BARS["float32"], "output", 0.0)
    assert numerics.main(["--device", "cpu", "--quick", "--case", "gla"]) == 1


def test_one_dtype_can_be_chosen(tmp_path: Path, one_shape: None) -> None:
    options = ["--device", "cpu", "--case", "gla", "--dtype", "bfloat16", "--out", str(tmp_path)]
    assert numerics.main(options) == 0
    rows = json.loads((tmp_path / "numerics.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_full_attention_is_not_asked_for_a_state(one_shape: None) -> None:
    """window=None has no constant-size state: the case says so, and the comparison must follow."""
    name = "window_attention(window=None)"
    rows = list(comparison.run_case(name, comparison.load_cases()[name], CPU))
    assert {row.quantity for row in rows} == {"output", "d q", "d k", "d v", "d sinks"}
    assert all(row.passed for row in rows)


def test_a_process_of_its_own_reports_a_crash_as_a_miss() -> None:
    (row,) = numerics.run_in_process("no such case", CPU)
    assert not row.passed and "KeyError" in row.note
