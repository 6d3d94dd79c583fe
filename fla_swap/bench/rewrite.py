"""What an exact rewrite of attention gains: time and peak memory of two models before and after.

    python -m fla_swap.bench.rewrite --device cuda --out DIR [--quick]

The attention is that of Gemma-2 9B (16 heads of 256, 8 key/value heads, softcap 50, window 4096 in every second layer)
and of gpt-oss 20B (64 heads of 64, 8 key/value heads, sinks, window 128 in every second layer), in two layers each, a
small vocabulary and, for gpt-oss, a dense feed-forward instead of the experts. Compared are transformers' eager
attention (the spelling that keeps softcap and sinks), `torch.compile` of it, transformers' flex attention compiled, and
`torch.compile(backend="fla_swap")` of the eager model. Sizes are dynamic, so each is compiled once.

Each model and way runs in a process of its own under a time limit; several compile at once, one at a time measures.
Out of memory and errors are rows like others. Writes `rewrite.jsonl` and `rewrite.md`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fla_swap.bench.numerics import environment

MODELS = ("gemma2", "gpt_oss")
WAYS = ("eager", "inductor", "flex", "fla_swap")
MODES = ("forward", "forward+backward")
LENGTHS, QUICK_LENGTHS = (4096, 8192, 16384, 32768), (64, 128)
ACCURACY_LENGTH, QUICK_ACCURACY_LENGTH = 5120, 96
SECONDS, REPEATS = 2.0, 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. `milliseconds` is a median, `gigabytes` the peak of allocated memory (2^30 bytes)."""

    model: str
    way: str
    mode: str
    length: int
    milliseconds: float | None = None
    gigabytes: float | None = None
    difference: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: str
    quick: bool
    time_limit: float
    workers: int
    models: tuple[str, ...] = MODELS
    ways: tuple[str, ...] = WAYS


class _Dense(nn.Module):
    """A feed-forward with the signature of gpt-oss's mixture of experts."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(nn.functional.silu(self.up(x))), None


def build(name: str, way: str, device: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model with random weights; those of q and k are wide, so that the attention is not flat."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

    small: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    small |= dict(head_dim=16, sliding_window=16)
    sizes: dict[str, Any]
    if name == "gemma2":
        sizes = dict(hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_key_value_heads=8)
        sizes |= dict(head_dim=256, sliding_window=4096)
        config: Any = Gemma2Config(**_shape(small if quick else sizes))
    else:
        sizes = dict(hidden_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128)
        sizes |= dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size=64)
        config = GptOssConfig(**_shape(sizes | small if quick else sizes))
    implementation = "flex_attention" if way == "flex" else "eager"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for layer in model.model.layers:
            if name == "gpt_oss":
                layer.mlp = _Dense(config.hidden_size, config.hidden_size)
                nn.init.normal_(layer.self_attn.sinks)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                nn.init.normal_(projection.weight, std=1.5 / config.hidden_size**0.5)
    return model.to(device=device, dtype=dtype)


def _shape(sizes: dict[str, Any]) -> dict[str, Any]:
    return {**sizes, "num_hidden_layers": 2, "vocab_size": 4096}


def compiled(model: nn.Module, way: str) -> Any:
    if way == "eager":
        return model
    if way == "fla_swap":
        import fla_swap.rewriting  # noqa: F401  makes the backend known where the package is not installed

        return torch.compile(model, backend="fla_swap")
    return torch.compile(model)


def step(model: nn.Module, ids: Tensor, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()


def tokens(length: int, device: str) -> Tensor:
    ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


def measure(run: Callable[[], None], device: str) -> tuple[float, float | None]:
    """(median milliseconds, peak gigabytes) after two warm-up calls."""
    cuda = device.startswith("cuda")
    for _ in range(2):
        run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < REPEATS and (len(times) < 3 or time.perf_counter() - begin < SECONDS):
        times.append(_timed(run, cuda))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def _timed(run: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time measures."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work(name: str, way: str, settings: Settings, lock: Path) -> Iterator[Row]:
    """All measurements of one model and way: compiled first, then measured alone."""
    model = build(name, way, settings.device, settings.quick)
    modes: dict[str, tuple[Any, str]] = {}
    for mode in MODES:
        try:
            fast = compiled(model, way)
            begin = time.perf_counter()
            step(fast, tokens(48 if settings.quick else 512, settings.device), mode)
            modes[mode] = fast, f"first call {time.perf_counter() - begin:.0f} s"
        except Exception as error:
            yield Row(model=name, way=way, mode=mode, length=0, note=_short(error))
    with alone(lock):
        for mode, (fast, first) in modes.items():
            for length in QUICK_LENGTHS if settings.quick else LENGTHS:
                row = _measured(fast, name, way, mode, length, settings.device, first)
                yield row
                if row.milliseconds is None:
                    break
    yield from _differences(name, way, settings, lock)


def _measured(fast: Any, name: str, way: str, mode: str, length: int, device: str, note: str) -> Row:
    cell = {"model": name, "way": way, "mode": mode, "length": length}
    try:
        ids = tokens(length, device)
        milliseconds, gigabytes = measure(lambda: step(fast, ids, mode), device)
        return Row(**cell, milliseconds=milliseconds, gigabytes=gigabytes, note=note)
    except torch.OutOfMemoryError:
        return Row(**cell, note="out of memory")
    except Exception as error:
        return Row(**cell, note=_short(error))
    finally:
        fast.zero_grad(set_to_none=True)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _differences(name: str, way: str, settings: Settings, lock: Path) -> Iterator[Row]:
    """Largest difference of the bf16 logits to eager attention in fp32, relative to the largest logit."""
    length = QUICK_ACCURACY_LENGTH if settings.quick else ACCURACY_LENGTH
    row = {"model": name, "way": way, "mode": "logits", "length": length}
    ids = tokens(length, settings.device)
    try:
        with torch.no_grad():
            own = build(name, way, settings.device, settings.quick)
            exact = build(name, "eager", settings.device, settings.quick, torch.float32)
            exact.load_state_dict(own.state_dict())
            with alone(lock):
                found = compiled(own, way)(input_ids=ids, use_cache=False).logits.float()
                wanted = exact(input_ids=ids, use_cache=False).logits
        yield Row(**row, difference=float((found - wanted).abs().max() / wanted.abs().max()))
    except Exception as error:
        yield Row(**row, note=_short(error))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def in_process(name: str, way: str, settings: Settings, lock: Path) -> list[Row]:
    """`work` in a process of its own; what it measured before a crash or the time limit is kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "fla_swap.bench.rewrite", "--device", settings.device, "--lock", str(lock)]
        command += ["--model", name, "--way", way, "--rows", str(path)] + ["--quick"] * settings.quick
        note = ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=settings.time_limit)
            if done.returncode:
                note = " | ".join(done.stderr.strip().splitlines()[-3:])[-300:] or f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            note = f"not done after {settings.time_limit:g} s"
        rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return rows + [Row(model=name, way=way, mode="process", length=0, note=note)] * bool(note)


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line for each model, mode and length, a column for each way."""
    ways = [w for w in WAYS if any(r.way == w for r in rows)]
    found = {(r.model, r.mode, r.length, r.way): r for r in rows}
    lines = ["| model | pass | tokens | " + " | ".join(ways) + " | time, memory |", "|---" * (len(ways) + 4) + "|"]
    for model, mode, length in dict.fromkeys((r.model, r.mode, r.length) for r in rows if r.mode in MODES and r.length):
        cells = [_cell(found.get((model, mode, length, way))) for way in ways]
        after = found.get((model, mode, length, "fla_swap"))
        gain = _gain([found.get((model, mode, length, w)) for w in ways if w != "fla_swap"], after)
        lines.append(f"| {model} | {mode} | {length} | " + " | ".join(cells) + f" | {gain} |")
    lines += ["", "| model | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for model in dict.fromkeys(r.model for r in rows):
        logits = [next((r for r in rows if (r.model, r.way, r.mode) == (model, w, "logits")), None) for w in ways]
        shown = ["–" if r is None else f"{r.difference:.1e}" if r.difference is not None else "failed" for r in logits]
        lines.append(f"| {model} | " + " | ".join(shown) + " |")
    notes = [f"- {r.model}, {r.way}, {r.mode} {r.length or ''}: {r.note}" for r in rows if _failed(r)]
    return lines + (["", *notes] if notes else [])


def _failed(row: Row) -> bool:
    return row.milliseconds is None and row.difference is None and row.note != "out of memory"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.milliseconds is None:
        return "out of memory" if row.note == "out of memory" else "failed"
    memory = "" if row.gigabytes is None else f", {row.gigabytes:.1f} GiB"
    return f"{row.milliseconds:.1f} ms{memory}"


def _gain(before: list[Row | None], after: Row | None) -> str:
    """Against the fastest, and the smallest, of the others."""
    ran = [r for r in before if r is not None and r.milliseconds is not None]
    if after is None or after.milliseconds is None:
        return "–"
    if not ran:
        return "only this one runs"
    times = min(r.milliseconds for r in ran if r.milliseconds) / after.milliseconds
    sizes = [r.gigabytes for r in ran if r.gigabytes]
    memory = f", {min(sizes) / after.gigabytes:.2f}×" if sizes and after.gigabytes else ""
    return f"{times:.2f}×{memory}"


def run(settings: Settings, console: Console, report: Callable[[list[Row]], None]) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.workers) as pool:
        lock = Path(folder) / "lock"
        parts = [(model, way) for way in settings.ways for model in settings.models]
        for (model, way), found in zip(
            parts, pool.map(lambda p: in_process(p[0], p[1], settings, lock), parts), strict=True
        ):
            console.print(f"{model} {way}: {len(found)} rows")
            rows += found
            report(rows)
    return rows


def write(rows: list[Row], settings: Settings, seconds: float, out: Path) -> None:
    """Write rewrite.jsonl and rewrite.md into `out`."""
    about = environment(settings.device)
    about["command"] = f"python -m fla_swap.bench.rewrite --device {settings.device}" + " --quick" * settings.quick
    about["seconds"] = f"{seconds:.0f}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "rewrite.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    lines = ["# Exact rewrites of attention: before and after", "", *(f"- {n}: {v}" for n, v in about.items()), ""]
    lines += [" ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    lines += [
        "bf16, batch 1: median time of a pass, peak of allocated memory. Last column: the fastest, and the smallest,"
    ]
    lines += ["of the others over fla_swap. Below: largest difference of the bf16 logits to eager attention in fp32,"]
    lines += [f"relative to the largest logit, at {ACCURACY_LENGTH} tokens.", "", *table(rows)]
    (out / "rewrite.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fla_swap.bench.rewrite", description="Exact rewrites of attention: time and memory."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for rewrite.jsonl and rewrite.md")
    parser.add_argument("--quick", action="store_true", help="tiny models and lengths, for a CPU")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this model; may be repeated")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this way; may be repeated")
    parser.add_argument("--time-limit", type=float, default=240.0, help="seconds for one model and way")
    parser.add_argument("--workers", type=int, default=3, help="processes that compile at once")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    settings = Settings(
        device=options.device,
        quick=options.quick,
        time_limit=options.time_limit,
        workers=options.workers,
        models=tuple(options.model or MODELS),
        ways=tuple(options.way or WAYS),
    )
    if options.rows:
        with options.rows.open("w") as file:
            for row in work(settings.models[0], settings.ways[0], settings, options.lock):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
        return 0
    console = Console(width=180)
    start = time.perf_counter()

    def report(rows: list[Row]) -> None:
        if options.out:
            write(rows, settings, time.perf_counter() - start, options.out)

    rows = run(settings, console, report)
    console.print("\n".join(table(rows)))
    return 0 if any(r.way == "fla_swap" and r.milliseconds is not None for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
