"""How processes share the GPU and what they compiled, and what times a call."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fla_swap.bench import timing, turns
from fla_swap.bench.measuring import Task
from fla_swap.bench.processes import Place


class Kernel:
    """What an autotuner calls; it writes down how."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def fn(self) -> None: ...

    def run(self, *args: Any, warmup: bool, BLOCK: int, **options: Any) -> None:
        from triton.runtime._async_compile import active_mode

        mode = active_mode.get()
        if mode is None:
            self.log.append(("run", BLOCK))
        else:
            assert warmup
            mode.submit(BLOCK, lambda: self.compile(BLOCK), lambda kernel: self.log.append(("compiled", BLOCK)))

    def compile(self, block: int) -> int:
        if block == 64:
            raise ValueError("does not compile")
        return block


def test_an_autotuners_configurations_are_compiled_before_it_tries_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(triton.testing, "do_bench", lambda fn, **options: fn())
    monkeypatch.setattr(Autotuner, "_bench", Autotuner._bench)
    turns.tune_alone(turns.Turn(tmp_path / "lock", tmp_path / "waited"), threads=2)
    kernel, configs = Kernel(), [triton.Config({"BLOCK": block}) for block in (16, 32, 64)]
    kernel.fn = lambda x: None  # type: ignore[method-assign, assignment]
    times = iter((3.0, 1.0, 2.0))
    tuner = Autotuner(
        kernel, ["x"], configs, ["x"], None, None, do_bench=lambda fn, quantiles: [fn() or next(times)] * 3
    )
    tuner.run(7, grid=(1,), warmup=False)
    assert sorted(kernel.log[:2]) == [("compiled", 16), ("compiled", 32)]
    assert kernel.log[2:] == [("run", 16), ("run", 32), ("run", 64), ("run", 32)]
    tuner.run(7, grid=(1,), warmup=False)
    assert kernel.log[6:] == [("run", 32)]


def test_choices_and_kernels_are_kept_for_later_processes(tmp_path: Path) -> None:
    first, choices, second = tmp_path / "first", tmp_path / "choices", tmp_path / "second"
    (first / "AB").mkdir(parents=True)
    (first / "AB" / "kernel.autotune.json").write_text("32 is best")
    (first / "AB" / "kernel.cubin").write_text("binary")
    (first / "AB" / "__grp__kernel.json").write_text(f'{{"kernel.cubin": "{first}/AB/kernel.cubin"}}')
    assert not turns.use_choices(choices, second)
    turns.keep_choices(first, choices)
    assert turns.use_choices(choices, second)
    assert [p.name for p in second.rglob("*.*")] == ["kernel.autotune.json"]
    turns.keep_kernels(first, tmp_path / "kernels")
    listing = tmp_path / "kernels" / "AB" / "__grp__kernel.json"
    assert listing.read_text() == f'{{"kernel.cubin": "{tmp_path}/kernels/AB/kernel.cubin"}}'


def test_peers_share_choices_ours_share_kernels(tmp_path: Path) -> None:
    place = Place(lock=tmp_path / "lock", cache=tmp_path)
    ours, peer = (Task(operator="gla", way=way, shapes=(), device="cpu") for way in ("ours", "fla"))
    assert place.choices(ours) is None and place.choices(peer) == tmp_path / "choices"
    assert place.kernels == tmp_path / "kernels" and Place(lock=tmp_path).kernels is None


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: timing.Call) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(timing, "captured", refuse)
    monkeypatch.setattr(timing, "_events", lambda run, warmup, repeat: 0.5)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    found = timing.timed(lambda: None, "cuda")
    assert found.milliseconds == 0.5 and found.clock == "events"
    assert "RuntimeError: operation not permitted when stream is capturing" in found.reason


def test_repetitions_fill_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []

    def measured(run: timing.Call, count: int, cache: object) -> list[float]:
        rounds.append(count)
        return [2.0] * count

    monkeypatch.setattr(timing, "_rounds", measured)
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: SimpleNamespace())
    assert timing._events(lambda: None, 10, 60) == 2.0
    assert rounds == [3, 5, 30]
    assert timing.timed(lambda: None, "cpu").clock == "host"
