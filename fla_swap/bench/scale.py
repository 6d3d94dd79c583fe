"""How long `inspect` takes, and how much memory, on a model the size of Llama 3 70B without weights.

    python -m fla_swap.bench.scale [--layers 80] [--runs 3] [--out DIR]

Every run is a process of its own: the peak is the whole process's resident memory, imports and building included. A run
counts only when every site is found and proved. Writes `scale.md`; exit status 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

SECONDS, GIGABYTES = 60.0, 4.0
BUILDERS = ("torch.device", "init_empty_weights")
SHAPE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def build(builder: str, layers: int) -> torch.nn.Module:
    """The model without weights, built in one of the two usual ways."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)
    with torch.device("meta") if builder == "torch.device" else init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(builder: str, layers: int) -> dict[str, Any]:
    """Inspect once, in this process."""
    from fla_swap import inspect

    load = os.getloadavg()[0]
    start = time.perf_counter()
    model = build(builder, layers)
    built, busy = time.perf_counter(), time.process_time()
    report = inspect(model)
    done = time.perf_counter()
    return {
        "builder": builder,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e9,
        "build": built - start,
        "inspect": done - built,
        "cpu": time.process_time() - busy,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "proved": sum(s.proved for s in report.sites),
        "sites": len(report.sites),
        "error": max((s.max_error or 0.0 for s in report.sites), default=0.0),
        "load": load,
        "notes": list(report.notes),
    }


def run(builder: str, layers: int, threads: int) -> dict[str, Any]:
    """Inspect once, in a fresh process."""
    command = [sys.executable, "-m", "fla_swap.bench.scale", "--layers", str(layers), "--measure", builder]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def passed(row: dict[str, Any], layers: int) -> bool:
    """Whether a run found and proved every layer within the limits."""
    return row["proved"] == row["sites"] == layers and row["inspect"] < SECONDS and row["peak"] < GIGABYTES


def report_of(rows: list[dict[str, Any]], layers: int, threads: int, command: str) -> str:
    """The runs as Markdown."""
    about = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {threads} threads, no GPU",
        "versions": f"python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
        "command": f"`{command}`",
        "model": f"the shape of Llama 3 70B, {layers} layers, {rows[0]['parameters']:.1f}B parameters, no weights",
        "limits": f"inspect < {SECONDS:g} s and < {GIGABYTES:g} GB, every layer proved",
    }
    columns = (
        "built under",
        "build s",
        "inspect s",
        "of the CPU s",
        "peak GB",
        "sites",
        "proved",
        "largest error",
        "load before",
        "",
    )
    lines = ["# Inspecting a 70B model without weights", "", *(f"- {k}: {v}" for k, v in about.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row["builder"], *(f"{row[n]:.2f}" for n in ("build", "inspect", "cpu", "peak"))]
        cells += [str(row["sites"]), str(row["proved"]), f"{row['error']:.1e}", f"{row['load']:.1f}"]
        lines.append("| " + " | ".join([*cells, "ok" if passed(row, layers) else "MISSED"]) + " |")
    middle = statistics.median(row["inspect"] for row in rows)
    lines += ["", f"Median {middle:.1f} s, peak {max(row['peak'] for row in rows):.2f} GB (the whole process)."]
    lines += [
        "The time is that of a clock on the wall; where the load before is above 0 other programs ran too, and the "
        "CPU's time is the better measure then."
    ]
    lines += [f"The report says: {note}." for note in rows[0]["notes"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fla_swap.bench.scale", description="Inspect a 70B model without weights."
    )
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--runs", type=int, default=3, help="runs for each way of building the model")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="folder for scale.md")
    parser.add_argument("--measure", choices=BUILDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console()
    if options.measure:
        console.file.write(json.dumps(measure(options.measure, options.layers)) + "\n")
        return 0
    rows = [run(builder, options.layers, options.threads) for builder in BUILDERS for _ in range(options.runs)]
    command = f"python -m fla_swap.bench.scale --layers {options.layers} --runs {options.runs}"
    text = report_of(rows, options.layers, options.threads, command)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale.md").write_text(text)
    return 0 if all(passed(row, options.layers) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
