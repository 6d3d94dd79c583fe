"""What `mixer="same"` gains for models that are linear already: time and peak memory before and after.

    python -m fla_swap.bench.same --device cuda --out results/same-h200.md [--quick]

Three models as transformers builds them, random weights, bf16, hidden size 2048: three linear layers and one of softmax
attention in the shape of Qwen3-Next (gated delta rule), Bamba (state space) and MiniMax (fixed decay), with dense
feed-forwards. Before: transformers' torch code of the linear layers, which it runs where no kernel package is
installed. After: the same model, swapped. Forward is a pass over the tokens, prefill the same with a cache, decode one
token on a cache of 2048; in a CUDA graph (the GPU alone) and as called from Python. Differences: the largest of the
bf16 logits to the original's in fp32, relative to the largest logit. A dash: more than 30% of the GPU's memory, or what
cannot be captured.

Each model runs in a process of its own, one at a time measures.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fla_swap.bench.decode import graph_time
from fla_swap.bench.numerics import environment
from fla_swap.bench.rewrite import alone, measure
from fla_swap.inspection import inspect
from fla_swap.planning import plan
from fla_swap.swapping import swap_

MODELS = ("qwen3_next", "bamba", "minimax")
LENGTHS, QUICK_LENGTHS = (2048, 8192), (48, 96)
MEMORY = 0.3
"""The share of the GPU's memory that one model may take."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of the model before and after: median milliseconds (`_graph`: in a CUDA graph), peak GiB."""

    model: str
    what: str
    before: float | None = None
    after: float | None = None
    before_memory: float | None = None
    after_memory: float | None = None
    before_graph: float | None = None
    after_graph: float | None = None
    note: str = ""


def build(name: str, device: str, quick: bool) -> Any:
    """The model with random weights, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(_config(name, quick))
        if name == "minimax":
            for layer in model.model.layers:
                layer.mlp = nn.Linear(model.config.hidden_size, model.config.hidden_size, bias=False)
    return model.eval()


def _config(name: str, quick: bool) -> Any:
    from transformers import BambaConfig, MiniMaxConfig, Qwen3NextConfig

    width = 64 if quick else 2048
    shared: dict[str, Any] = dict(vocab_size=4096, hidden_size=width, intermediate_size=width, num_hidden_layers=4)
    shared |= dict(
        num_attention_heads=width // 32 if quick else 16, num_key_value_heads=2, max_position_embeddings=16384
    )
    shared |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    layers = ["linear_attention"] * 3 + ["full_attention"]
    if name == "bamba":
        heads = 2 * width // 64
        state = 16 if quick else 128
        return BambaConfig(**shared, attn_layer_indices=[3], mamba_n_heads=heads, mamba_d_head=64, mamba_d_state=state)
    if name == "minimax":
        own: dict[str, Any] = dict(head_dim=32 if quick else 128, num_local_experts=1)
        return MiniMaxConfig(**shared | own, num_experts_per_tok=1, layer_types=layers)
    sizes = (2, 4, 16) if quick else (16, 32, 128)
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    linear: dict[str, Any] = dict(zip(names, sizes, strict=True))
    linear |= dict(linear_value_head_dim=sizes[2], head_dim=32 if quick else 128, layer_types=layers)
    return Qwen3NextConfig(**shared | linear, num_experts=1, num_experts_per_tok=1, mlp_only_layers=[0, 1, 2, 3])


@torch.no_grad()
def work(name: str, device: str, quick: bool, lock: Path, report: Callable[[Row], None]) -> None:
    """Measure one model before and after; `report` gets every row at once."""
    if device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(MEMORY)
    model = build(name, device, quick)
    begin = time.perf_counter()
    found = inspect(model)
    took, errors = time.perf_counter() - begin, [s.max_error or 0.0 for s in found.linear]
    note = f"{len(errors)} linear layers found in {took:.1f} s, proved to {max(errors):.1e} in fp32"
    report(Row(model=name, what="inspect", note=note))
    lengths = QUICK_LENGTHS if quick else LENGTHS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (1, max(lengths)), generator=generator).to(device)
    short = ids[:, : lengths[0]]
    exact = model(short, use_cache=False).logits
    before = copy.deepcopy(model).to(torch.bfloat16)
    after = swap_(model, plan(found, mixer="same"), keep_originals=False).to(torch.bfloat16)
    logits = [m(short, use_cache=False).logits.float() for m in (before, after)]
    apart = [float((x - exact).abs().max() / exact.abs().max()) for x in logits]
    report(Row(model=name, what="difference", before=apart[0], after=apart[1]))
    del exact, logits
    caches = {id(m): m(short, use_cache=True).past_key_values for m in (before, after)}

    def decode(m: Any) -> None:
        m(ids[:, :1], past_key_values=caches[id(m)], use_cache=True)

    passes: dict[str, Callable[[Any], Any]] = {"decode": decode}
    for n in lengths:
        passes[f"forward {n}"] = lambda m, n=n: m(ids[:, :n], use_cache=False)
        passes[f"prefill {n}"] = lambda m, n=n: m(ids[:, :n], use_cache=True)
    for what, run in passes.items():
        old, new = (_guarded(lambda m=m, run=run: measure(lambda: run(m), device), lock) for m in (before, after))
        cells = {"before": old, "after": new}
        times = {side: cell[0] for side, cell in cells.items() if cell}
        report(Row(model=name, what=what, **times, **{f"{s}_memory": cell[1] for s, cell in cells.items() if cell}))
    for what, run in passes.items() if device.startswith("cuda") else ():
        old, new = (_guarded(lambda m=m, run=run: graph_time(lambda: run(m), 10), lock) for m in (before, after))
        report(Row(model=name, what=what, before_graph=old, after_graph=new))


def _guarded(run: Callable[[], Any], lock: Path) -> Any:
    """What `run` gives while nothing else is measured; None where it runs out of memory, or cannot be captured."""
    try:
        with alone(lock):
            return run()
    except RuntimeError as error:
        sys.stdout.write(f"{str(error)[:300]}\n")
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def merged(rows: list[Row]) -> list[Row]:
    """One row for each model and pass."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = {n: v for n, v in asdict(row).items() if v is not None}
        key = (row.model, row.what)
        found[key] = dataclasses.replace(found[key], **known) if key in found else row
    return list(found.values())


def in_process(name: str, device: str, quick: bool, lock: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fla_swap.bench.same", "--device", device, "--model", name, "--rows"]
    command += ["--lock", str(lock)]
    return subprocess.Popen([*command, *["--quick"] * quick], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line for each model and pass."""
    lines = ["| model | pass | before, in a graph | after | faster | before, as called | after | faster | memory |"]
    lines += ["|---" * 9 + "|"]
    for row in (r for r in merged(rows) if r.what.split()[0] in ("forward", "prefill", "decode")):
        cells = [row.model, row.what]
        for old, new in ((row.before_graph, row.after_graph), (row.before, row.after)):
            cells += [_cell(old), _cell(new), f"{old / new:.1f}×" if old and new else "–"]
        sizes = [f"{x:.2f}" if x else "–" for x in (row.before_memory, row.after_memory)]
        lines.append("| " + " | ".join([*cells, " → ".join(sizes) + " GiB"]) + " |")
    lines += ["", "| model | logits before, to fp32 | after |", "|---|---|---|"]
    lines += [f"| {r.model} | {r.before:.1e} | {r.after:.1e} |" for r in rows if r.what == "difference"]
    return [*lines, "", *(f"- {r.model}: {r.note}" for r in rows if r.note)]


def _cell(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds:.2f} ms"


def write(rows: list[Row], device: str, out: Path) -> None:
    about = environment(device) | {"command": f"python -m fla_swap.bench.same --device {device} --out {out}"}
    lines = ['# Models that are linear already: before and after `mixer="same"`', ""]
    lines += [*(f"- {n}: {v}" for n, v in about.items()), "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*lines, *table(rows)]) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fla_swap.bench.same", description="Linear models, swapped.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the markdown file to write")
    parser.add_argument("--quick", action="store_true", help="tiny models and lengths, for a CPU")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this model; may be repeated")
    parser.add_argument("--time-limit", type=float, default=240.0, help="seconds for all of it")
    parser.add_argument("--lock", type=Path, help="file whose lock is held while something is measured")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rows:

        def report(row: Row) -> None:
            sys.stdout.write("ROW " + json.dumps(asdict(row)) + "\n")
            sys.stdout.flush()

        work(options.model[0], options.device, options.quick, options.lock, report)
        return 0
    console, rows, end = Console(width=180), [], time.perf_counter() + options.time_limit
    with tempfile.TemporaryDirectory() as folder:
        lock = options.lock or Path(folder) / "lock"
        names = options.model or MODELS
        running = {n: in_process(n, options.device, options.quick, lock) for n in names}
        for name, process in running.items():
            try:
                text = process.communicate(timeout=max(end - time.perf_counter(), 0.1))[0].decode()
            except subprocess.TimeoutExpired:
                process.kill()
                text = process.communicate()[0].decode()
            found = [Row(**json.loads(line[4:])) for line in text.splitlines() if line.startswith("ROW ")]
            if process.returncode:
                found.append(Row(model=name, what="failed", note=" | ".join(text.strip().splitlines()[-3:])[-400:]))
            rows += found
    console.print("\n".join(table(rows)))
    if options.out:
        write(rows, options.device, options.out)
    return 0 if all(any(r.model == n and r.what == "difference" for r in rows) for n in names) else 1


if __name__ == "__main__":
    sys.exit(main())
