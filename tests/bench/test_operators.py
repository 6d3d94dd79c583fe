"""The benchmark of operators: what it writes, that it goes on where it stopped, how it takes refusals and hangs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fla_swap.bench import measuring, operators, processes, tables
from fla_swap.bench.catalogue import CASES, Peer, Shape, by_name
from fla_swap.bench.measuring import Row, Task
from fla_swap.bench.processes import Place
from fla_swap.bench.results import Results, rows_of
from fla_swap.bench.turns import Turn
from fla_swap.bench.work import Rates, floors, window_products
from fla_swap.cli import app

TINY = operators.TINY
RATES = Rates(copy=4e12, product=7e14, exponential=4e12)


def turn(folder: Path) -> Turn:
    return Turn(folder / "lock", folder / "waited")


def there(*values: float | None) -> list[float]:
    """The values, all of which must have been measured."""
    assert None not in values
    return [value for value in values if value is not None]


@pytest.mark.parametrize("case", [c for c in CASES if c.load() is not None], ids=lambda c: c.name)
def test_every_operator_is_measured_and_compared(case, tmp_path: Path) -> None:
    task = Task(operator=case.name, way="ours", shapes=(Shape(batch=1, time=16, heads=2, width=8),), device="cpu")
    *_, row = measuring.measure(task, turn(tmp_path))
    assert row.notes == []
    forward, both, cold_forward, cold_both = there(row.forward, row.both, row.cold_forward, row.cold_both)
    assert forward > 0 and both > forward / 10 and cold_both > cold_forward > 0
    error_forward, error_backward = there(row.error_forward, row.error_backward)
    assert 0 < error_forward < 5e-3 and 0 < error_backward < 2e-2


def test_floors_of_the_default_shape() -> None:
    """Retention: 4 tensors of 134 MB forward, 11 with backward; a window of 512: 120 GFLOP, with backward 3.5 times."""
    tensor = 8 * 2048 * 4096 * 2
    forward, both = floors(3 * tensor, tensor, 0.0, 0.0, 2.0, RATES)
    assert forward == pytest.approx(4 * tensor / 4e12 * 1e3) and both == pytest.approx(11 * tensor / 4e12 * 1e3)
    products = window_products(Shape(), 512)
    assert products == pytest.approx(8 * 32 * (512 * 513 / 2 + 1536 * 512) * 512)
    forward, both = floors(3 * tensor, tensor, products, 0.0, 2.5, RATES)
    assert forward == pytest.approx(products / 7e14 * 1e3) and both == pytest.approx(3.5 * forward)


def test_the_error_of_a_wrong_result_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(**inputs):
        from fla_swap.ops import gla

        return gla(**inputs)[0] * 1.1

    fake = Peer(name="fla", module="fla_swap.ops", function="gla", adapt=lambda function, x: peer(**x))
    monkeypatch.setattr(measuring, "by_name", lambda: {"gla": _with(by_name()["gla"], peers=(fake,))})
    *_, row = measuring.measure(Task(operator="gla", way="fla", shapes=(TINY,), device="cpu"), turn(tmp_path))
    assert row.error_forward == pytest.approx(0.1, rel=0.05)


def test_a_backward_that_is_refused_leaves_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("unsafe on this compiler")

    fake = Peer(name="fla", module="fla_swap.ops", function="gla", adapt=lambda f, x: Refuse.apply(f(**x)[0]))
    monkeypatch.setattr(measuring, "by_name", lambda: {"gla": _with(by_name()["gla"], peers=(fake,))})
    *_, row = measuring.measure(Task(operator="gla", way="fla", shapes=(TINY,), device="cpu"), turn(tmp_path))
    assert row.forward is not None and row.both is None and there(row.error_forward)[0] < 5e-3
    assert row.notes == ["backward: RuntimeError: unsafe on this compiler"]


def _with(case, **changes):
    return type(case)(**{**vars(case), **changes})


def test_what_was_measured_before_the_time_limit_is_kept() -> None:
    task = Task(operator="gla", way="ours", shapes=(TINY,), device="cpu")
    row = Row(operator="gla", way="ours", shape=TINY.label, forward=1.0, notes=["backward: no result"])
    (kept,) = rows_of(task, ([asdict(row)], "not done after 60 s"), where="here", code="1")
    assert kept.forward == 1.0 and kept.notes == ["backward: not done after 60 s"] and kept.where == "here"
    (nothing,) = rows_of(task, ([], "not done after 60 s"), where="here", code="1")
    assert nothing.shape == TINY.label and nothing.notes == ["not done after 60 s"]


def test_a_process_over_its_limit_is_stopped(tmp_path: Path) -> None:
    task = Task(operator="gla", way="ours", shapes=(TINY,), device="cpu")
    assert processes.run_task(task, Place(lock=tmp_path / "lock"), 0.01) == ([], "not done after 0.01 s")


def test_time_spent_waiting_for_the_gpu_is_not_counted(tmp_path: Path) -> None:
    notes = tmp_path / "waited"
    assert processes._waited(notes) == 0
    notes.write_text(json.dumps([7.0, None]))
    assert processes._waited(notes) == 7
    notes.write_text(json.dumps([7.0, processes.time.time() - 5]))
    assert processes._waited(notes) == pytest.approx(12, abs=0.5)


def test_only_what_is_missing_or_changed_is_measured() -> None:
    task = Task(operator="gla", way="ours", shapes=(TINY, Shape()), device="cpu")
    results = Results(where="here")
    assert operators.open_shapes(task, results, "code", retry=False) == task.shapes
    results.add([Row(operator="gla", way="ours", shape=TINY.label, where="here", code="code", notes=["crashed"])])
    assert operators.open_shapes(task, results, "code", retry=False) == (Shape(),)
    assert operators.open_shapes(task, results, "code", retry=True) == task.shapes
    assert operators.open_shapes(task, results, "newer code", retry=False) == task.shapes
    assert operators.open_shapes(task, Results(where="there", rows=results.rows), "code", retry=False) == task.shapes


def test_results_survive_a_file(tmp_path: Path) -> None:
    results = Results(where="here", rates={"here": RATES})
    results.add([Row(operator="gla", way="ours", shape=TINY.label, forward=1.5, where="here", code="1")])
    results.write(tmp_path / "raw.json")
    other = Results(where="here")
    other.read(tmp_path / "raw.json")
    assert other.rows == results.rows and other.rates == results.rates


def test_tables_show_floor_ratio_bars_and_reasons() -> None:
    results = Results(where="here", rates={"here": RATES}, about={"GPU": "one"})
    label = Shape().label
    sizes = {"inputs": 4 * 8 * 2048 * 4096 * 2, "output": 8 * 2048 * 4096 * 2, "where": "here"}
    ours = Row(operator="gla", way="ours", shape=label, forward=0.4, both=2.0, peak_both=2.0, cold_both=9.0, **sizes)
    peer = Row(operator="gla", way="fla", shape=label, forward=0.8, both=2.0, peak_both=2.5, **sizes)
    peer.clock_both = "events"
    peer.notes.append("backward: not captured in a CUDA graph, timed by events: it asks")
    results.add([ours, peer])
    text = tables.markdown(results)
    assert f"| gla | {label} | 0.168 | 0.400 | 2.38× | 0.800 | 2.00× |" in text
    assert "forward+backward 1.00× the peer's speed" in text and "0.80 of the peer's peak memory" in text
    assert "cold start, both, 9.0 s" in text and f"- gla, fla, {label}: backward: not captured in a CUDA graph" in text
    assert "× | 2.000 ᵉ | 1.00× |" in text


@pytest.mark.parametrize(
    ("note", "forward", "both"),
    [
        ("backward: RuntimeError: Triton >= 3.4.0 on Hopper produces incorrect results", "0.100", "refused"),
        ("backward: not done after 150 s", "0.100", "not done"),
        ("forward: not done after 150 s", "not done", "not done"),
        ("backward: no result", "0.100", "–"),
    ],
)
def test_a_peer_without_a_result_shows_why(note: str, forward: str, both: str) -> None:
    results = Results(where="here", rates={"here": RATES})
    peer = Row(operator="gla", way="fla", shape=TINY.label, forward=0.1 if forward == "0.100" else None, where="here")
    peer.notes.append(note)
    results.add([Row(operator="gla", way="ours", shape=TINY.label, forward=0.1, both=0.2, where="here"), peer])
    cells = tables.markdown(results).split(f"| gla | {TINY.label} |")[1].splitlines()[0].split(" | ")
    assert cells[3] == forward and cells[8] == both


def test_newer_code_replaces_older_rows_in_the_table() -> None:
    rows = [Row(operator="gla", way="ours", shape=TINY.label, forward=t, code=c) for t, c in ((2.0, "a"), (1.0, "b"))]
    assert tables.newest(rows)["gla", TINY.label]["ours"].forward == 1.0


def test_steps_are_measured(tmp_path: Path) -> None:
    from fla_swap.bench.decode import measure

    shape = Shape(batch=2, time=1, heads=2, width=8)
    task = Task(operator="gated_delta_rule", way="ours", shapes=(shape,), device="cpu", kind="decode")
    (row,) = measure(task, turn(tmp_path))
    assert row.notes == [] and there(row.eager)[0] > 0 and row.state == 2 * 2 * 8 * 8 * 4


def test_ours_are_measured_before_the_peers_and_a_shared_cache_is_no_cold_start() -> None:
    settings = operators.Settings(device="cpu", peer="fla")
    ways = [task.way for task in operators.tasks_of(settings)]
    assert ways == sorted(ways, key=lambda way: way != "ours") and ways.count("ours") == len(CASES)
    assert all(task.cold for task in operators.tasks_of(settings))
    assert not any(t.cold for t in operators.tasks_of(operators.Settings(device="cpu", shapes="all", quick=True)))
    assert not any(t.cold for t in operators.tasks_of(operators.Settings(device="cpu", decode=True)))


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner().invoke
    common = ["--device", "cpu", "--tiny", "--lock", str(tmp_path / "lock"), "--peer", "fla"]
    raw, page = tmp_path / "raw.json", tmp_path / "ops.md"
    done = run(app, ["bench", "ops", *common, "--ops", "gla", "--json", str(raw), "--out", str(page)])
    assert done.exit_code == 0, done.output
    rows = {row["way"]: row for row in json.loads(raw.read_text())["rows"]}
    assert rows["ours"]["both"] > 0 and "ModuleNotFoundError" in rows["fla"]["notes"][0]
    assert "fla-swap bench ops --peer fla --ops gla --tiny" in page.read_text()
    done = run(app, ["bench", "retention", *common, "--out", str(tmp_path / "retention")])
    assert done.exit_code == 0, done.output
    assert {p.name for p in (tmp_path / "retention").iterdir()} == {f"retention.{s}" for s in ("md", "png", "json")}
