"""A load test of `fla-swap serve` on loopback: throughput and tail latency, with slots and one request at a time.

    fla-swap bench serve DIR --clients 16 --requests 64 --new-tokens 64 --slots 8

Clients are OpenAI's own, each asking again as soon as it has its answer. A tenth of the requests is dropped by its
client after some tokens, and malformed and oversized ones come in between; afterwards no slot may be in use, nothing
may wait, and the process's memory is compared with that before.
"""

from __future__ import annotations

import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fla_swap.bench.numerics import environment
from fla_swap.consoles import err, out
from fla_swap.errors import FlaSwapError
from fla_swap.options import Device, Dtype, Json, Model

PROMPTS = ("def read(path):", "class Queue:", "import os\n", "for line in", "    return", "async def handle(", "# The")
BODY_LIMIT = 100_000


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run. Times in seconds; `dropped`, `refused`: requests given up by clients, and bad ones answered as such."""

    slots: int
    clients: int
    answered: int
    dropped: int
    refused: int
    wall: float
    tokens_per_second: float
    latency_p50: float
    latency_p99: float
    first_token_p50: float
    first_token_p99: float
    leaked_slots: int
    grown_mib: float


@contextmanager
def serving(model: Any, tokenizer: Any, slots: int, tokens: int, compiled: bool) -> Iterator[tuple[str, Any]]:
    """A server on a free port of loopback: (address, engine)."""
    import uvicorn

    from fla_swap.serving.engine import Engine
    from fla_swap.serving.server import make_app

    engine = Engine(model, slots=slots, tokens=tokens, waiting=4096, compiled=compiled)
    app = make_app(engine, tokenizer, "model", max_body_bytes=BODY_LIMIT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(60)


def ask(client: Any, number: int, new_tokens: int) -> tuple[str, float, float, int]:
    """One streamed request: what became of it, its latency, the time to its first token, pieces received."""
    start = time.perf_counter()
    first, pieces = 0.0, 0
    drop = number % 10 == 9
    prompt = PROMPTS[number % len(PROMPTS)]
    options = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    stream = client.completions.create(model="model", prompt=prompt, max_tokens=new_tokens, **options)
    made = 0
    with stream:
        for piece in stream:
            if piece.choices and not first:
                first = time.perf_counter() - start
            pieces += 1
            if piece.usage is not None:
                made = piece.usage.completion_tokens
            if drop and pieces >= 3:
                return "dropped", time.perf_counter() - start, first, 0
    return "answered", time.perf_counter() - start, first, made


def bad(address: str) -> int:
    """Malformed and oversized requests; how many were answered as such."""
    import httpx

    url, headers = f"{address}/v1/completions", {"content-type": "application/json"}
    answers = (
        httpx.post(url, content=b'{"prompt": ', headers=headers).status_code == 400,
        httpx.post(url, json={"prompt": "x" * (2 * BODY_LIMIT)}).status_code == 413,
        httpx.post(url, json={"prompt": "x", "max_tokens": -1}).status_code == 400,
        httpx.post(url, json={"prompt": "x", "max_tokens": 10**9}).status_code == 400,
    )
    return sum(answers)


def load_test(
    model: Any, tokenizer: Any, *, slots: int, clients: int, requests: int, new_tokens: int, tokens: int, compiled: bool
) -> Load:
    """Run the load against a server with `slots` slots."""
    try:
        import openai
    except ImportError as error:
        raise FlaSwapError("the load test uses OpenAI's client: pip install openai") from error
    with serving(model, tokenizer, slots, tokens, compiled) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        for number in range(2 * slots):  # compiles, captures, fills the caches
            ask(client, number, min(8, new_tokens))
        before = resident_mib()
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(ask, client, number, new_tokens) for number in range(requests)]
            refused = bad(address)
            results = [f.result() for f in futures]
        wall = time.perf_counter() - start
        deadline = time.monotonic() + 30
        while (engine.running or engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.05)
        leaked, grown = engine.running + len(engine.waiting), resident_mib() - before
    done = [r for r in results if r[0] == "answered"]
    return Load(
        slots=slots,
        clients=clients,
        answered=len(done),
        dropped=len(results) - len(done),
        refused=refused,
        wall=wall,
        tokens_per_second=sum(r[3] for r in done) / wall,
        latency_p50=statistics.median(r[1] for r in done),
        latency_p99=_tail([r[1] for r in done]),
        first_token_p50=statistics.median(r[2] for r in done),
        first_token_p99=_tail([r[2] for r in done]),
        leaked_slots=leaked,
        grown_mib=grown,
    )


def _tail(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


HEADINGS = (
    *("slots", "clients", "answered", "dropped", "refused", "tokens/s", "latency p50 s", "p99 s"),
    *("first token p50 s", "p99 s", "slots leaked", "memory grown MiB"),
)


def _cells(row: Load) -> list[str]:
    counts = (row.slots, row.clients, row.answered, row.dropped, row.refused)
    times = (row.latency_p50, row.latency_p99, row.first_token_p50, row.first_token_p99)
    shown = [str(n) for n in counts] + [f"{row.tokens_per_second:.0f}"] + [f"{t:.3f}" for t in times]
    return [*shown, str(row.leaked_slots), f"{row.grown_mib:.0f}"]


def markdown(rows: list[Load], command: str, device: str) -> str:
    """The table with the machine, the versions and the command."""
    facts = [f"- {name}: {value}" for name, value in environment(device).items()]
    lines = ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    head = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return "\n".join(["# Serving under load", "", *facts, f"- command: `{command}`", "", *head, *lines, ""])


def serve_bench_command(
    model: Model,
    slots: Annotated[int, typer.Option(help="Slots; measured against one.", min=1)] = 8,
    clients: Annotated[int, typer.Option(help="Clients at the same time.", min=1)] = 16,
    requests: Annotated[int, typer.Option(help="Requests in all.", min=10)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="Room of a slot.", min=2)] = 512,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile prefill and step.")] = True,
    file: Annotated[Path | None, typer.Option("--out", help="Write the table here (markdown).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Throughput, tail latency and leaks of `fla-swap serve` under load, with slots and one request at a time."""
    import sys

    from fla_swap.checkpoint import load
    from fla_swap.conversion import find_device, load_tokenizer, pick_dtype

    where = find_device(device)
    loaded: Any = load(model, dtype=pick_dtype(dtype, where), device=where).eval()
    loaded.generation_config.eos_token_id = None  # every answer has its full length
    tokenizer = load_tokenizer(model)
    tokenizer.eos_token = None
    rows = []
    for count in (1, slots):
        sizes = {"clients": clients, "requests": requests, "new_tokens": new_tokens, "tokens": tokens}
        rows.append(load_test(loaded, tokenizer, slots=count, compiled=compiled, **sizes))
        err.print(f"{count} slots: {rows[-1].tokens_per_second:.0f} tokens/s, p99 {rows[-1].latency_p99:.2f} s")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(markdown(rows, "fla-swap " + " ".join(sys.argv[1:]), str(where)), encoding="utf-8")
    if as_json:
        out.print_json(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(*HEADINGS, title="serving under load")
    for row in rows:
        table.add_row(*_cells(row))
    out.print(table)
