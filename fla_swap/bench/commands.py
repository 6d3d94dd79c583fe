"""`fla-swap bench …`: the benchmarks as commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fla_swap.bench.generation import generate_command
from fla_swap.bench.operators import ops_command
from fla_swap.bench.retention import retention_command
from fla_swap.bench.serving import serve_bench_command

bench = typer.Typer(no_args_is_help=True, help="Measure: operators against floor and peer, numerics against float64.")
bench.command("ops")(ops_command)
bench.command("retention")(retention_command)
bench.command("generate")(generate_command)
bench.command("serve")(serve_bench_command)


@bench.command("numerics")
def numerics_command(
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for numerics.json and numerics.md.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
) -> None:
    """Every operator's output, state and gradients against its float64 reference; status 1 when a bar is missed."""
    from fla_swap.bench import numerics

    arguments = [f"--device={device}"] * bool(device) + [f"--out={folder}"] * bool(folder) + ["--quick"] * quick
    sys.exit(numerics.main(arguments + [f"--case={name}" for name in case or ()]))


@bench.command("mixers")
def mixers_command(
    out: Annotated[Path | None, typer.Option(help="File for the table, such as results/mixers.md.")] = None,
    table: Annotated[
        str, typer.Option(help="mixers, or generation: every search with a state and without.")
    ] = "mixers",
    mixer: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="Of torch.compile: aot_eager, inductor.")] = "aot_eager",
) -> None:
    """Every mixer by every check: operator, layer, packing, swap, model, generation, compilation, training."""
    from fla_swap.bench import mixers

    arguments = [f"--table={table}", f"--backend={backend}"] + [f"--out={out}"] * bool(out)
    arguments += [f"--mixer={name}" for name in mixer or ()] + [f"--check={name}" for name in check or ()]
    sys.exit(mixers.main(arguments))
