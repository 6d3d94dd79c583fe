"""The process that measures one operator one way: cold start first, then times and memory under a lock.

Started by `operators`, one process for each task, with caches of its own. Every row is written again after each stage,
so that what was measured before a crash or the time limit is kept; the last line of a row counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla_swap.bench.catalogue import Case, Shape, by_name
from fla_swap.bench.timing import peak, synchronize, timed
from fla_swap.bench.turns import Turn, keep_choices, tune_alone
from fla_swap.bench.work import Rates, size

Call = Callable[[Mapping[str, Tensor]], Tensor]
REFERENCE_STEPS = 2048
"""Steps compared with the float64 recurrence; of longer sequences the first ones, without gradients."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One operator one way ("ours" or a peer's name), on shapes that share its compiled kernels.

    `kind`: operator, decode, or rates (of the machine). `cold`: it starts with empty caches, its first call is a cold
    start. `compared`: also against the float64 recurrence (`quick`: the first shape alone, and few repetitions).
    `threads`: compile a peer's configurations before its autotuner tries them.
    """

    operator: str
    way: str
    shapes: tuple[Shape, ...]
    device: str
    dtype: str = "bfloat16"
    kind: str = "operator"
    cold: bool = True
    compared: bool = True
    quick: bool = False
    threads: int = 4

    @property
    def name(self) -> str:
        return f"{self.operator} {self.way}" if self.way else self.operator

    @staticmethod
    def of(data: dict[str, Any]) -> Task:
        shapes = tuple(Shape(**s) for s in data.pop("shapes"))
        return Task(**data, shapes=shapes)


@dataclass(kw_only=True)
class Row:
    """One operator one way on one shape. Milliseconds, GiB beyond the inputs, seconds; None is not measured.

    `clock_forward`, `clock_both`: what timed it (see `timing`).
    """

    operator: str
    way: str
    shape: str
    forward: float | None = None
    both: float | None = None
    clock_forward: str = ""
    clock_both: str = ""
    peak_forward: float | None = None
    peak_both: float | None = None
    cold_forward: float | None = None
    cold_both: float | None = None
    error_forward: float | None = None
    error_backward: float | None = None
    worst_gradient: str = ""
    graph: float | None = None
    eager: float | None = None
    inputs: int = 0
    output: int = 0
    state: int = 0
    notes: list[str] = field(default_factory=list)
    where: str = ""
    code: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.operator, self.way, self.shape, self.where, self.code


def call_of(case: Case, way: str) -> Call:
    """The function to measure, from our arguments to its output. Raises ImportError where it is not there."""
    if way != "ours":
        return next(peer for peer in case.peers if peer.name == way).load()
    operator = case.load()
    if operator is None:
        raise ImportError(f"fla_swap.ops has no {case.name} yet")
    return lambda inputs: operator(**inputs, **case.options)[0]


def measure(task: Task, turn: Turn) -> Iterator[Row]:
    """The row of every shape, again after each stage."""
    case = by_name()[task.operator]
    import torch._dynamo  # the first call of a custom operator imports it, and so does `import fla`: no cold start

    if task.device.startswith("cuda"):
        import triton  # noqa: F401
    for number, shape in enumerate(task.shapes):
        row = Row(operator=task.operator, way=task.way, shape=shape.label)
        try:
            yield from _stages(row, case, shape, task, turn, first=number == 0)
        except Exception as error:
            failed(row, short(error))
            yield row
            return
        if task.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _stages(row: Row, case: Case, shape: Shape, task: Task, turn: Turn, first: bool) -> Iterator[Row]:
    call = call_of(case, task.way)
    inputs = case.inputs(shape, task.device, getattr(torch, task.dtype))
    leaves = list(inputs.values())

    def forward() -> Tensor:
        with torch.no_grad():
            return call(inputs)

    def both() -> tuple[Tensor, ...]:
        o = call(inputs)
        return o.detach(), *torch.autograd.grad(o, leaves, out_grad, allow_unused=True, materialize_grads=True)

    row.notes.append("forward: no result")
    yield row
    o, row.cold_forward = _timed(forward, task.device, turn)
    row.notes.pop()
    row.inputs, row.output = size(leaves), size([o])
    out_grad = torch.randn_like(o)
    compared = _cut(case, inputs, (o,), out_grad, shape)
    del o
    with turn():
        row.peak_forward = peak(forward, task.device)
        found = timed(forward, task.device, quick=task.quick)
    row.forward, row.clock_forward = found.milliseconds, found.clock
    row.notes += [f"forward: {found.reason}"] * bool(found.reason)
    row.notes.append("backward: no result")
    yield row
    try:
        results, seconds = _timed(both, task.device, turn)
        row.notes.pop()
        row.cold_both = row.cold_forward + seconds
        compared = _cut(case, inputs, results, out_grad, shape)
        del results
        with turn():
            row.peak_both = peak(both, task.device)
            found = timed(both, task.device, quick=task.quick)
        row.both, row.clock_both = found.milliseconds, found.clock
        row.notes += [f"backward: {found.reason}"] * bool(found.reason)
    except Exception as error:
        failed(row, short(error))
    if not (first and task.cold):
        row.cold_forward = row.cold_both = None
    yield row
    if not task.compared or (task.quick and not first):
        return
    try:
        compare(row, case, compared, list(inputs), shape)
    except Exception as error:
        row.notes.append(f"float64: {short(error)}")
    yield row


def failed(row: Row, reason: str) -> None:
    """Note why the stage that the row is at has no result."""
    stage = row.notes.pop().removesuffix("no result") if row.notes and row.notes[-1].endswith("no result") else ""
    row.notes.append(stage + reason)


def _timed(run: Callable[[], Any], device: str, turn: Turn) -> tuple[Any, float]:
    """The result and the seconds until it is there, waiting for the lock left out."""
    waited, begin = turn.waited, time.perf_counter()
    synchronize(device)
    result = run()
    synchronize(device)
    return result, time.perf_counter() - begin - (turn.waited - waited)


def _heads(case: Case, inputs: Mapping[str, Tensor]) -> int:
    """One head is compared, or 64 channels of an operator without heads."""
    return 1 if "q" in inputs else min(64, inputs["x"].shape[2])


def _part(x: Tensor, shared: bool, count: int, steps: int) -> Tensor:
    """The first sequence and head; of a parameter `(H, …)` the first head."""
    if x.ndim < 3:
        return x[:count]
    return x[:1, :steps] if shared else x[:1, :steps, :count]


def _cut(case: Case, inputs: Mapping[str, Tensor], results: tuple[Tensor, ...], out_grad: Tensor, shape: Shape):
    """What the float64 comparison needs: the inputs' part, the output's gradient's part, the results' parts."""
    count, steps = _heads(case, inputs), min(shape.time, REFERENCE_STEPS)
    shared = [n in case.per_batch for n in inputs]
    parts = [_part(x.detach(), s, count, steps) for x, s in zip(inputs.values(), shared, strict=True)]
    kept = [_part(x.detach(), s, count, steps) for x, s in zip(results, [False, *shared], strict=False)]
    return [x.cpu() for x in (*parts, _part(out_grad, False, count, steps), *kept)]


def compare(row: Row, case: Case, compared: list[Tensor], names: list[str], shape: Shape) -> None:
    """Error ratios RMS(reference − result) / RMS(reference) of one head against the float64 recurrence."""
    if row.way == "sdpa":
        return
    operator = case.load()
    if operator is None:
        raise ImportError(f"fla_swap.ops has no {case.name} yet: nothing to compare with")
    count = len(names)
    leaves = {n: x.double().requires_grad_() for n, x in zip(names, compared[:count], strict=True)}
    out_grad, got, gradients = compared[count].double(), compared[count + 1], compared[count + 2 :]
    backward = bool(gradients) and shape.time <= REFERENCE_STEPS
    with torch.set_grad_enabled(backward):
        o = operator(**leaves, **case.options, implementation="reference")[0]
    row.error_forward = ratio(got, o.detach())
    if not backward:
        return
    wanted = torch.autograd.grad(o, list(leaves.values()), out_grad, allow_unused=True, materialize_grads=True)
    cut = [n not in case.per_batch and leaves[n].ndim >= 3 for n in names]  # gradients that no other head adds to
    errors = {n: ratio(g, w) for n, g, w, own in zip(names, gradients, wanted, cut, strict=True) if own}
    row.worst_gradient = max(errors, key=errors.__getitem__)
    row.error_backward = errors[row.worst_gradient]


def ratio(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30))


def rates(device: str) -> Rates:
    """What this machine does: a copy of 1 GiB, a bf16 product of 8192³, exponentials in registers."""
    cuda = device.startswith("cuda")
    elements, n = (1 << 29, 8192) if cuda else (1 << 20, 128)
    source = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, graph=False).milliseconds
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = timed(lambda: a @ b, device, graph=False).milliseconds
    if cuda:
        from fla_swap.bench.exponentials import run

        operations, run_exponentials = run(device)
    else:
        x = torch.zeros(1 << 16)
        operations, run_exponentials = x.numel(), lambda: x.exp()
    run_exponentials()
    exponential = timed(run_exponentials, device, graph=False).milliseconds
    return Rates(
        copy=2 * size([source]) / copy * 1e3,
        product=2 * n**3 / product * 1e3,
        exponential=operations / exponential * 1e3,
    )


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def keep(choices: Path | None) -> None:
    if choices is not None:
        keep_choices(Path(os.environ["TRITON_CACHE_DIR"]), choices)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fla_swap.bench.measuring")
    parser.add_argument("--task", type=json.loads, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--choices", type=Path, help="keeps what the autotuners of this process choose")
    options = parser.parse_args(arguments)
    task = Task.of(options.task)
    turn = Turn(options.lock, options.rows.with_suffix(".waited"))
    with options.rows.open("w") as file:
        if task.kind == "rates":
            with turn():
                file.write(json.dumps(asdict(rates(task.device))) + "\n")
            return 0
        if task.device.startswith("cuda") and task.way != "ours":
            tune_alone(turn, task.threads, partial(keep, options.choices))
        if task.kind == "decode":
            from fla_swap.bench.decode import measure as rows
        else:
            rows = measure
        for row in rows(task, turn):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            keep(options.choices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
