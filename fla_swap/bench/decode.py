"""One decode step of each operator: in a CUDA graph, and called from Python.

A graph holds one step for each of several states, together larger than the L2 cache, so that every step reads its state
from memory, as the layers of a model do. Floor: the state read and written once (a window is read), and the tensors of
one token, at the copy rate.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fla_swap.bench.catalogue import Case, Shape, by_name
from fla_swap.bench.measuring import Row, Task, short
from fla_swap.bench.timing import synchronize
from fla_swap.bench.turns import Turn
from fla_swap.bench.work import size

READ_ONLY = ("window_attention",)
FLUSH = 1 << 28
"""Bytes of state that one graph goes through."""

PEERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "linear_attention": ("fla.ops.linear_attn", "fused_recurrent_linear_attn", {}),
    "retention": ("fla.ops.retention", "fused_recurrent_retention", {}),
    "simple_gla": ("fla.ops.simple_gla", "fused_recurrent_simple_gla", {}),
    "gla": ("fla.ops.gla", "fused_recurrent_gla", {"g": "gk"}),
    "rwkv6": ("fla.ops.rwkv6", "fused_recurrent_rwkv6", {"q": "r", "g": "w"}),
    "gsa": ("fla.ops.gsa", "fused_recurrent_gsa", {}),
    "hgrn": ("fla.ops.hgrn", "fused_recurrent_hgrn", {}),
    "delta_rule": ("fla.ops.delta_rule", "fused_recurrent_delta_rule", {}),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", {}),
    "kda": ("fla.ops.kda", "fused_recurrent_kda", {}),
}
"""The peer's call for one step, and its names for our arguments. It returns a new state and leaves the old."""

Step = Callable[[Mapping[str, Tensor], Any], Any]


def step_of(case: Case, way: str) -> Step:
    if way == "ours":
        step = case.step()
        if step is None:
            raise ImportError(f"fla_swap.ops has no {case.name}_step yet")
        return lambda inputs, state: step(**inputs, state=state, **case.options)
    module, function, names = PEERS[case.name]
    peer = getattr(importlib.import_module(module), function)

    def call(inputs: Mapping[str, Tensor], state: Any) -> Any:
        renamed = {names.get(n, n): x for n, x in inputs.items()}
        return peer(**renamed, initial_state=state, output_final_state=True)

    return call


@torch.no_grad()
def measure(task: Task, turn: Turn) -> Iterator[Row]:
    """A row for each batch size."""
    case = by_name()[task.operator]
    for shape in task.shapes:
        row = Row(operator=task.operator, way=task.way, shape=f"step {shape.label}")
        try:
            _measure(row, case, shape, task, turn)
        except Exception as error:
            row.notes.append(f"step: {short(error)}")
        yield row


def _measure(row: Row, case: Case, shape: Shape, task: Task, turn: Turn) -> None:
    operator, step = case.load(), step_of(case, task.way)
    if operator is None:
        raise ImportError(f"fla_swap.ops has no {case.name} yet")
    inputs = {n: x.detach() for n, x in case.inputs(shape, task.device, getattr(torch, task.dtype)).items()}
    state = operator(**inputs, **case.options, output_final_state=True)[1]
    row.inputs, row.state = size(inputs.values()), size(x for x in tree_leaves(state) if isinstance(x, Tensor))
    o = step(inputs, state)
    row.output = size([o[0] if isinstance(o, tuple) else o])
    synchronize(task.device)
    copies = max(2, min(64, FLUSH // max(row.state, 1))) if task.device.startswith("cuda") else 2
    states = [tree_map_only(Tensor, torch.clone, state) for _ in range(copies)]

    def steps() -> None:
        for each in states:
            step(inputs, each)

    with turn():
        row.eager = _eager(steps, task.device) / copies
        if task.device.startswith("cuda"):
            row.graph = graph_time(steps) / copies


def _eager(run: Callable[[], None], device: str, rounds: int = 5) -> float:
    times = []
    run()
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def graph_time(run: Callable[[], None], rounds: int = 20) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])
