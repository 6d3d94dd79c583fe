"""Milliseconds and peak memory of a call.

On a GPU a call is captured into a CUDA graph, and the graph's replays are timed by events with the L2 cache overwritten
before each: no Python, no launches from the host, whatever else the host does meanwhile. A call that cannot be captured
(it asks the GPU for a number, say) is timed by events around the call itself, which cannot be faster than the host's
part of it; the result says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

WARMUP, REPEAT = 10, 60
"""Milliseconds of warm-up and of repetitions behind a median."""
QUICK = 3, 15
FEWEST, MOST = 5, 200
"""Repetitions."""
FLUSH = 512 << 20
"""Bytes overwritten before each repetition: many times the L2 cache, and the host is ready long before it is done."""

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A median. `clock`: graph, events or host; `reason`: why not a graph."""

    milliseconds: float
    clock: str
    reason: str = ""


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Call, device: str, *, quick: bool = False, graph: bool = True) -> Timing:
    """The median of a call that has run before (so that nothing compiles here).

    `graph=False` for one long operation of PyTorch: in a graph a copy would be another engine's, and slower.
    """
    if not device.startswith("cuda"):
        return Timing(milliseconds=_host(run), clock="host")
    warmup, repeat = QUICK if quick else (WARMUP, REPEAT)
    if not graph:
        return Timing(milliseconds=_events(run, warmup, repeat), clock="events")
    try:
        with captured(run) as replays:
            return Timing(milliseconds=_events(replays.replay, warmup, repeat), clock="graph")
    except Exception as error:
        torch.cuda.synchronize()
        reason = f"not captured in a CUDA graph, timed by events: {type(error).__name__}: {error}"
    return Timing(milliseconds=_events(run, warmup, repeat), clock="events", reason=reason.replace("\n", " ")[:200])


@contextmanager
def captured(run: Call) -> Iterator[torch.cuda.CUDAGraph]:
    """A CUDA graph of one call. Its memory is free again afterwards."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = run()
    try:
        yield graph
    finally:
        torch.cuda.synchronize()
        del result
        graph.reset()
        torch.cuda.empty_cache()


def _events(run: Call, warmup: float, repeat: float) -> float:
    """Milliseconds: the median of as many calls as fill `repeat` milliseconds, after `warmup` milliseconds of them."""
    cache = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    once = statistics.median(_rounds(run, 3, cache))
    _rounds(run, max(1, min(MOST, int(warmup / once))), cache)
    return statistics.median(_rounds(run, max(FEWEST, min(MOST, int(repeat / once))), cache))


def _rounds(run: Call, count: int, cache: torch.Tensor) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        cache.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [max(start.elapsed_time(stop), 1e-4) for start, stop in events]


def _host(run: Call) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def peak(run: Call, device: str) -> float | None:
    """GiB of the allocator's peak beyond what is allocated before the call (the result counts)."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
