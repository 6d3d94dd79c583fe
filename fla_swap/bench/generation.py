"""How long generation takes: prefill, each step, in all; of a saved model, or of the 1.4B shape with random weights.

    fla-swap bench generate DIR --prompt "…" --lengths 64,256 --repetition-penalty 2.0
    fla-swap bench generate --shape hybrid-1.4b --context 2048,32768 --batch 1,16 --lengths 128 --compile

A step's time is that of `generate` with all new tokens less that with one, over the tokens between: everything that a
user waits for counts. Medians of `--repeats` runs after one warm-up, which is the cold start. Shapes are measured on
random prompts of `--context` tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from fla_swap.bench.numerics import environment
from fla_swap.consoles import err, out
from fla_swap.errors import FlaSwapError
from fla_swap.options import Device, Dtype, Json, Prompt, Seed

VOCABULARY = 32_000
SHAPES = ("hybrid-1.4b", "linear-1.4b", "llama-1.4b", "hybrid-tiny")
"""Llama of 2,048 channels, 24 layers, 16 heads, 4 key/value heads; its swaps for Gated DeltaNet, keep 1/4 or none."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times in milliseconds (`cold_seconds`: the first call of this size), memory in GiB (0 on a CPU)."""

    model: str
    batch: int
    prompt: int
    new: int
    prefill: float
    step: float
    total: float
    cold_seconds: float
    gigabytes: float


def build(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A model of a named shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import fla_swap as fs

    if shape not in SHAPES:
        raise FlaSwapError(f"no shape is called {shape!r}; the shapes are {list(SHAPES)}")
    small = shape.endswith("tiny")
    config = LlamaConfig(
        vocab_size=512 if small else VOCABULARY,
        hidden_size=64 if small else 2048,
        num_hidden_layers=4 if small else 24,
        num_attention_heads=4 if small else 16,
        num_key_value_heads=2 if small else 4,
        intermediate_size=128 if small else 5632,
        max_position_embeddings=1 << 20,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if not shape.startswith("llama"):
        keep = 0 if shape.startswith("linear") else "1/4"
        fs.swap_(model, fs.plan(fs.inspect(model), mixer="gated_deltanet", keep=keep), keep_originals=False)
    return model


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(model: Any, name: str, ids: Tensor, new: int, repeats: int, sampling: dict[str, Any]) -> Timing:
    """Time `generate` on ids [B, T] with `new` ≥ 2 tokens, and with one."""
    device = ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def run(tokens: int) -> float:
        mask = torch.ones_like(ids)
        return seconds(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **sampling), device)

    cold = run(new)
    run(1)
    prefill = statistics.median(run(1) for _ in range(repeats))
    total = statistics.median(run(new) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return Timing(
        model=name,
        batch=ids.shape[0],
        prompt=ids.shape[1],
        new=new,
        prefill=prefill * 1e3,
        step=(total - prefill) * 1e3 / (new - 1),
        total=total * 1e3,
        cold_seconds=cold,
        gigabytes=peak,
    )


def table(rows: Sequence[Timing]) -> Table:
    """For the terminal."""
    shown = Table(title="generation")
    for heading in (
        "model",
        "batch",
        "prompt",
        "new",
        "prefill ms",
        "ms a step",
        "total ms",
        "tokens/s",
        "cold s",
        "GiB",
    ):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Timing) -> list[str]:
    numbers = (row.batch, row.prompt, row.new)
    rate = row.batch * 1e3 / row.step if row.step > 0 else float("nan")
    times = (f"{row.prefill:.1f}", f"{row.step:.3f}", f"{row.total:.0f}", f"{rate:.0f}", f"{row.cold_seconds:.1f}")
    return [row.model, *map(str, numbers), *times, f"{row.gigabytes:.2f}"]


def markdown(rows: Sequence[Timing], command: str, device: str) -> str:
    """The table with the machine, the versions and the command."""
    facts = [f"- {name}: {value}" for name, value in environment(device).items()]
    head = "| model | batch | prompt | new | prefill ms | ms a step | total ms | tokens/s | cold start s | peak GiB |"
    lines = ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(["# Generation", "", *facts, f"- command: `{command}`", "", head, "|---" * 10 + "|", *lines, ""])


def prompts(
    model: Any, tokenizer: Any, prompt: str, contexts: Sequence[int], batches: Sequence[int]
) -> Iterator[Tensor]:
    """The prompt, or random tokens of each length, in batches of each size."""
    device = next(model.parameters()).device
    for batch in batches:
        if not contexts:
            yield tokenizer(prompt, return_tensors="pt")["input_ids"].to(device).expand(batch, -1).contiguous()
        for length in contexts:
            size = model.config.get_text_config(decoder=True).vocab_size
            yield torch.randint(3, size, (batch, length), device=device)


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{name} takes numbers such as 64,256; got {text!r}") from error
    if any(n < 1 for n in numbers):
        raise typer.BadParameter(f"{name} must be positive, got {text!r}")
    return numbers


def generate_command(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; or give --shape.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights: {', '.join(SHAPES)}.")] = None,
    prompt: Prompt = "The history of the sea is",
    lengths: Annotated[str, typer.Option(help="New tokens, one or several numbers.")] = "64",
    context: Annotated[str, typer.Option(help="Random prompts of these lengths instead of --prompt.")] = "",
    batch: Annotated[str, typer.Option(help="Rows, one or several numbers.")] = "1",
    repetition_penalty: Annotated[float, typer.Option(help="As in transformers.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Through fs.compile.")] = True,
    repeats: Annotated[int, typer.Option(help="Runs behind a median.", min=1)] = 3,
    file: Annotated[Path | None, typer.Option("--out", help="Write the table here (markdown).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Prompt length, generated length, prefill, time a step and total time of `generate`."""
    import sys

    from fla_swap.checkpoint import load
    from fla_swap.compilation import compile as compile_model
    from fla_swap.conversion import find_device, load_tokenizer, pick_dtype

    if (model is None) == (shape is None):
        raise typer.BadParameter("give either a model or --shape")
    where = find_device(device)
    kind: Any = pick_dtype(dtype, where)
    tokenizer = None
    if shape is not None:
        loaded = build(shape, str(where), kind if isinstance(kind, torch.dtype) else torch.float32)
        context = context or "128"
    else:
        assert model is not None
        loaded: Any = load(model, dtype=kind, device=where).eval()
        tokenizer = None if context else load_tokenizer(model)
    if compiled:
        compile_model(loaded)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
    if temperature:
        sampling |= {"temperature": temperature, "top_p": top_p}
    loaded.generation_config.eos_token_id = None  # every run makes all of its tokens
    loaded.generation_config.pad_token_id = loaded.generation_config.pad_token_id or 0
    rows: list[Timing] = []
    for ids in prompts(loaded, tokenizer, prompt, _numbers(context, "--context"), _numbers(batch, "--batch")):
        for new in _numbers(lengths, "--lengths"):
            row = measure(loaded, str(shape or model), ids, max(new, 2), repeats, sampling)
            rows.append(row)
            err.print(f"{row.model}: batch {row.batch}, prompt {row.prompt}, {new} new: {row.step:.3f} ms a step")
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(markdown(rows, "fla-swap " + " ".join(sys.argv[1:]), str(where)), encoding="utf-8")
    if as_json:
        out.print_json(json.dumps([asdict(row) for row in rows]))
    else:
        out.print(table(rows))
